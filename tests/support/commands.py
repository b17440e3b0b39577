"""The curl commands that the example prints and the documentation shows, sent to where the test runs."""

import json
import re
import shlex

from attrs import frozen
from httpx2 import URL, AsyncClient, Response
from starlette.applications import Starlette

from tests.support.pages import Block
from tests.support.serving import asgi_client


@frozen
class Curl:
    """One curl command: of its options, those that the project's own texts use."""

    method: str
    url: URL
    headers: dict[str, str]
    body: str | None

    @classmethod
    def parse(cls, line: str) -> "Curl":
        """Read a command line; an option that is not known here is an error."""
        words = iter(shlex.split(line))
        assert next(words) == "curl", line
        method, url, body, headers = "", "", None, dict[str, str]()
        for word in words:
            if word == "-X":
                method = next(words)
            elif word == "-H":
                name, _, value = next(words).partition(": ")
                headers[name] = value
            elif word == "-d":
                body = next(words)
            elif not word.startswith("-"):
                url = word
            else:
                assert word in {"-i", "-N"}, f"{word} in {line}"
        return cls(method or ("GET" if body is None else "POST"), URL(url), headers, body)

    async def send(self, client: AsyncClient) -> Response:
        """Send the request by a client that knows the host, whatever host the text names."""
        target = self.url.raw_path.decode()
        return await client.request(self.method, target, headers=self.headers, content=self.body)


def same_answer(shown: str, answered: str) -> bool:
    """Whether a text and a response's body say the same: as JSON if it is JSON, else letter by letter."""
    try:
        return bool(json.loads(shown) == json.loads(answered))
    except ValueError:
        return shown.strip() == answered.strip()


async def replay(block: Block, app: Starlette) -> None:
    """Send a block's curl commands and compare the answers; other commands are the reader's to run."""
    app.middleware_stack = None  # the page may have added to the application since it was last started
    commands = re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]
    async with asgi_client(app, raise_app_exceptions=False) as client:
        for command in commands:
            line, _, shown = command.partition("\n")
            if not line.startswith("curl"):
                continue
            response = await Curl.parse(line).send(client)
            if " -i " in line:
                head, _, shown = shown.partition("\n\n")
                assert head.split()[1] == str(response.status_code), line
            else:
                assert response.is_success, (line, response.text)
            assert same_answer(shown, response.text), (block.page, line, response.text)
