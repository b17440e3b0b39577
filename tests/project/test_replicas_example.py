"""The example of a primary and its replica: the program starts, and its guide is true."""

import asyncio
import os
import re
import shlex
import signal
import socket
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from attrs import define
from httpx2 import AsyncClient, Response

from examples.replicas.app import create_app, primary, replica
from tests.support.commands import Curl
from tests.support.leftovers import temporary_place
from tests.support.replication import Server, hot_standby, primary_server, replay_paused
from tests.support.serving import serve
from tests.support.site import checked_out

ROOT = Path(__file__).parent.parent.parent
CLIENTS = 10
TURNS = 5
PATIENCE = 20
"""Seconds that the program has to end its servers."""


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Server, Server]]:
    """A primary and its standby."""
    with primary_server() as first, hot_standby(first) as standby:
        yield first, standby


@pytest.fixture
async def client(servers: tuple[Server, Server]) -> AsyncIterator[AsyncClient]:
    """A client of the application, which runs on a server of its own; no connection is out at its end."""
    first, standby = servers
    app = create_app(first.url, standby.url)
    async with AsyncClient(timeout=30) as client:
        async with serve(app) as address:
            client.base_url = address.url
            yield client
        assert [checked_out(db.engine.pool) for db in (primary, replica)] == [0, 0]


async def write(client: AsyncClient, text: str) -> tuple[str, str]:
    """Post a note; return its path and its position."""
    response = await client.post("/notes", json={"text": text})
    assert response.status_code == 201, response.text
    return f"/notes/{response.json()}", response.headers["X-Position"]


async def read(client: AsyncClient, path: str, position: str) -> Response:
    """Get a note as old as a position."""
    return await client.get(path, headers={"X-Position": position})


async def test_clients_read_what_they_wrote(client: AsyncClient) -> None:
    """Clients that send back the position find their notes, each at its first try."""
    served: list[str] = []

    async def write_and_read(name: int) -> None:
        for turn in range(TURNS):
            text = f"{name}-{turn}"
            answer = await read(client, *await write(client, text))
            assert (answer.status_code, answer.json()["text"]) == (200, text)
            served.append(answer.json()["server"])

    async with asyncio.TaskGroup() as clients:
        for name in range(CLIENTS):
            clients.create_task(write_and_read(name))
    assert len(served) == CLIENTS * TURNS
    assert "standby" in served


async def test_late_standby_is_not_read_unnoticed(
    client: AsyncClient, servers: tuple[Server, Server]
) -> None:
    """While replay is paused a note is missing without its position, and the primary's with it."""
    async with replay_paused(servers[1]):
        path, position = await write(client, "late")
        assert (await client.get(path)).status_code == 404
        answer = await read(client, path, position)
        assert answer.json() == {"text": "late", "server": "primary"}
    while (late := (await read(client, path, position)).json()) == {"text": "late", "server": "primary"}:
        pass  # the standby has half a second to catch up
    assert late == {"text": "late", "server": "standby"}


async def test_header_that_is_no_position(client: AsyncClient) -> None:
    """A client's mistake is a client's error."""
    assert (await read(client, "/notes/1", "soon")).status_code == 422


@asynccontextmanager
async def program(**environment: str) -> AsyncGenerator[asyncio.subprocess.Process]:
    """Start the program as a reader does; it ends by SIGINT, which lets it end its servers."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "examples.replicas"),
            cwd=ROOT,
            env={**os.environ, "PORT": str(taken.getsockname()[1]), **environment},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
            try:
                await asyncio.wait_for(process.communicate(), PATIENCE)
            except TimeoutError:
                process.kill()
                raise


@define
class Reader:
    """Does what the guide says, line by line, and puts the last position in its place."""

    client: AsyncClient
    position: str = ""

    async def follow(self, line: str) -> Response | None:
        """Run a command; a request that meets the failover is repeated, as its 503 says."""
        if not line.startswith("curl"):
            process = await asyncio.create_subprocess_exec(*shlex.split(line), stdout=asyncio.subprocess.PIPE)
            await process.communicate()
            assert process.returncode == 0, line
            return None
        curl = Curl.parse(line.replace("0/0", self.position))
        response = await curl.send(self.client)
        while response.status_code == 503:
            response = await curl.send(self.client)
        self.position = response.headers.get("X-Position", self.position)
        return response


async def test_guide_is_true() -> None:
    """The printed commands do what is said of them, the failover included, and Ctrl-C ends the program."""
    async with program() as process:
        assert process.stdout
        guide = (await process.stdout.readuntil(b"Ctrl-C")).decode()
        commands = re.findall(r"^  (\S.+)$", guide, re.MULTILINE)
        found = re.search(r"(http://[^/]+)/docs", guide)
        assert found, guide
        async with AsyncClient(base_url=found[1], timeout=30) as client:
            reader = Reader(client)
            answers = [answer for line in commands if (answer := await reader.follow(line))]
        first, at_first, second, unseen, seen, third = answers
        assert [answer.status_code for answer in (first, second, third)] == [201] * 3
        assert at_first.status_code in {200, 404}
        assert unseen.status_code == 404
        assert seen.json() == {"text": "second", "server": "primary"}
        process.send_signal(signal.SIGINT)
        _, log = await process.communicate()
        assert process.returncode == 0, log.decode()


@pytest.mark.usefixtures("postgresql_server")  # it has made the user of root's servers
async def test_sigterm_ends_the_servers_too() -> None:
    """The program that is told to end by SIGTERM leaves no server and no folder behind."""
    with temporary_place() as place:
        async with program(**place.environment) as process:
            assert process.stdout
            guide = (await process.stdout.readuntil(b"Ctrl-C")).decode()
            assert len(place.servers()) == 2
            found = re.search(r"(http://[^/]+)/docs", guide)
            assert found, guide
            async with AsyncClient(base_url=found[1], timeout=30) as client:
                # before it serves, Python's own handler of the signal may break uvloop
                assert (await client.get("/openapi.json")).status_code == 200
            process.send_signal(signal.SIGTERM)
            _, log = await process.communicate()
        assert process.returncode == 0, log.decode()
        assert (place.servers(), place.data()) == ([], [])
