"""The examples can be found and run: a table has them all, and each program does what its guide prints."""

import asyncio
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
from attrs import define
from httpx2 import AsyncClient, Response

from tests.support.commands import Curl
from tests.support.databases import JudgeFor
from tests.support.leftovers import temporary_place
from tests.support.pages import ROOT

EXAMPLES = ROOT / "examples"
ROWS = re.findall(
    r"^\| \[(\w+)\]\(([\w/.]+)\) \| .* \| `(make [^`]+)` \| [^|]+ \|$",
    (EXAMPLES / "README.md").read_text("utf-8"),
    re.MULTILINE,
)
"""Name, file and command of each example."""
MAKE = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "NAME", "ARGS"}}
"""An environment in which make knows nothing of a make around it."""
NAMES = ("alice", "bob", "carol")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Ask make what it would do."""
    return subprocess.run(  # noqa: S603  # the arguments come from the table
        ["make", "--dry-run", *arguments],  # noqa: S607  # as a reader starts it
        cwd=ROOT,
        env=MAKE,
        capture_output=True,
        text=True,
        check=False,
    )


def programs() -> set[str]:
    """Find the examples that can be started."""
    files = {path.stem for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text("utf-8")}
    return files | {path.parent.name for path in EXAMPLES.glob("*/__main__.py")}


def names(folder: Path) -> list[str]:
    """Return what is in a folder."""
    return [path.name for path in folder.iterdir()]


def test_table_has_each_example() -> None:
    """Each file and folder of examples/ has one row, in whose file it begins; a program is started there."""
    files = {path.stem for path in EXAMPLES.glob("*.py") if path.name != "__init__.py"}
    found = files | {path.parent.name for path in EXAMPLES.glob("*/__init__.py")}
    assert sorted(name for name, _, _ in ROWS) == sorted(found)
    started = {name for name, _, command in ROWS if not command.startswith("make test")}
    assert started == programs()


@pytest.mark.parametrize(("name", "file", "command"), ROWS, ids=[row[0] for row in ROWS])
def test_command_exists(name: str, file: str, command: str) -> None:
    """Make knows the command, which starts the example or its tests."""
    assert file.partition("/")[0] in {name, f"{name}.py"}
    planned = make(*shlex.split(command)[1:])
    assert planned.returncode == 0, planned.stderr
    if "make test" in command:
        (path,) = re.findall(r"tests/guides\S*", planned.stdout)
        assert (ROOT / path).exists()
    else:
        assert f"-m examples.{name} " in f"{planned.stdout} ".replace("\n", " ")


def test_make_lists_the_examples() -> None:
    """Without a name, or with one that it does not know, `make example` names all of them."""
    for arguments in (["example"], ["example", "NAME=none"]):
        refused = make(*arguments)
        assert refused.returncode == 2
        assert programs() <= set(re.findall(r"\w+", refused.stderr))


@define
class Program:
    """An example that runs, and the curl commands of the guide that it has printed."""

    guide: str
    client: AsyncClient
    process: asyncio.subprocess.Process

    @property
    def curls(self) -> list[Curl]:
        """The curl commands, in order."""
        return [Curl.parse(line) for line in re.findall(r"^ +(curl .+)$", self.guide, re.MULTILINE)]

    async def follow(self, *statuses: int) -> list[Response]:
        """Send all curl commands in turn, and see that they are answered by these statuses."""
        responses = [await curl.send(self.client) for curl in self.curls]
        assert [response.status_code for response in responses] == [*statuses]
        return responses


@asynccontextmanager
async def started(
    program: list[str], temporary: Path, ending: signal.Signals = signal.SIGINT
) -> AsyncGenerator[Program]:
    """Start a program as a newcomer does, while its port is taken; a signal ends it, and nothing stays."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, *program),
            cwd=ROOT,
            env={**os.environ, "PORT": str(taken.getsockname()[1]), "TMPDIR": str(temporary)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            assert process.stdout
            guide = (await process.stdout.readuntil(b"Ctrl-C stops")).decode()
            [address] = {*re.findall(r"127\.0\.0\.1:\d+", guide)}
            async with AsyncClient(base_url=f"http://{address}", timeout=30) as client:
                for page in re.findall(rf"^Open +http://{address}(\S+)", guide, re.MULTILINE):
                    assert (await client.get(page, follow_redirects=True)).status_code == 200
                assert names(temporary) != []
                yield Program(guide, client, process)
            if process.returncode is None:
                process.send_signal(ending)
            _, log = await process.communicate()
            assert process.returncode == 0, log.decode()
            assert names(temporary) == []
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.communicate()


@pytest.mark.parametrize(
    ("program", "ending"),
    [(["examples/quickstart.py"], signal.SIGINT), (["-m", "examples.demo"], signal.SIGTERM)],
    ids=["quickstart", "demo"],
)
async def test_bank(program: list[str], ending: signal.Signals, tmp_path: Path) -> None:
    """Money moves by a transfer alone that is committed; a signal ends the program."""
    async with started(program, tmp_path, ending) as bank:
        read, _, fail_at_commit, fail_at_statement = await bank.follow(200, 201, 409, 409)
        assert read.json() == [{"name": name, "balance": 100} for name in NAMES]
        for refused in (fail_at_commit, fail_at_statement):
            assert list(refused.json()) == ["refused"]
        accounts = (await bank.curls[0].send(bank.client)).json()
        left = {account["name"]: account["balance"] for account in accounts}
        assert left == {"alice": 70, "bob": 130, "carol": 100}


async def test_tickets(tmp_path: Path) -> None:
    """A team has its ticket, which is done once."""
    async with started(["-m", "examples.sqlmodel_app"], tmp_path, signal.SIGTERM) as tickets:
        _, added, team, done, *_ = await tickets.follow(201, 201, 200, 200, 409, 409)
        assert team.json()["tickets"] == [added.json()]
        assert done.json() == {**added.json(), "done": True}


async def test_other_database(postgresql_url: str, judge_for: JudgeFor, tmp_path: Path) -> None:
    """A program whose command names a database uses that one."""
    async with started(["-m", "examples.sqlmodel_app", postgresql_url], tmp_path) as tickets:
        await tickets.follow(201, 201, 200, 200, 409, 409)
    judge = await judge_for(postgresql_url)
    assert await judge.rows("SELECT name FROM team") == [("web",)]


async def test_streams(tmp_path: Path) -> None:
    """Both readings are events and lines of the CSV; the program ends while a client follows the events."""
    async with started(["-m", "examples.streaming"], tmp_path) as streaming:
        events, attic, cellar, export = streaming.curls
        async with streaming.client.stream("GET", events.url.path) as response:
            lines = response.aiter_lines()
            for reading in (attic, cellar):
                assert (await reading.send(streaming.client)).status_code == 201
                while not (line := await anext(lines)).startswith("data: "):
                    pass
                assert line == f"data: {reading.body}"
            csv = (await export.send(streaming.client)).text
            assert csv.splitlines() == ["id,place,celsius", "1,attic,31", "2,cellar,12"]
            streaming.process.send_signal(signal.SIGINT)
            await streaming.process.wait()


@asynccontextmanager
async def chatting(command: str) -> AsyncGenerator[asyncio.subprocess.Process]:
    """Run a client of the chat, as its guide prints it."""
    client = await asyncio.create_subprocess_exec(
        *shlex.split(command),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "TERM": "xterm"},
    )
    try:
        assert client.stdout
        await client.stdout.readuntil(b"Connected")
        yield client
    finally:
        client.kill()
        await client.communicate()


async def hear(client: asyncio.subprocess.Process, text: str) -> None:
    """Wait until a client of the chat has received a text."""
    assert client.stdout
    await client.stdout.readuntil(text.encode())


async def test_chat(tmp_path: Path) -> None:
    """Two clients receive what one says, a third one later; a message that is too long is refused."""
    async with started(["-m", "examples.websocket"], tmp_path, signal.SIGTERM) as chat:
        as_ann, as_bob, as_joe = re.findall(r"^  (\S+ -m websockets .+)$", chat.guide, re.MULTILINE)
        async with chatting(as_ann) as ann, chatting(as_bob) as bob:
            assert ann.stdin
            ann.stdin.write(b"tea?\n")
            for client in (ann, bob):
                await hear(client, "ann: tea?")
            ann.stdin.write(b"x" * 201 + b"\n")
            await hear(ann, "! not said: ")
            async with chatting(as_joe) as joe:
                await hear(joe, "ann: tea?")


def needs(package: str) -> pytest.MarkDecorator:
    """Skip a test without a package of requirements/guides.in, which is not in the lowest row."""
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


async def test_memory() -> None:
    """The program prints the memory for a CSV, and for all rows at once, on each database."""
    with temporary_place() as place:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "examples.streaming_memory", "2000"),
            cwd=ROOT,
            env={**os.environ, **place.environment},
            stdout=asyncio.subprocess.PIPE,
        )
        printed, _ = await process.communicate()
        lines = r"^(\w+): 2,000 rows(?:, | at once: ).*MB more$"
        measured = re.findall(lines, printed.decode(), re.MULTILINE)
        assert (process.returncode, measured) == (0, ["SQLite", "SQLite", "PostgreSQL", "PostgreSQL"])
        assert (place.servers(), place.data()) == ([], [])


@needs("fastapi_pagination")
async def test_pages(tmp_path: Path) -> None:
    """Six pages have the thirty tasks."""
    async with started(["-m", "examples.pagination"], tmp_path) as tasks:
        first, last = await tasks.follow(200, 200)
        assert (first.json()["total"], first.json()["pages"], len(last.json()["items"])) == (30, 6, 5)


@needs("redis")
async def test_cached_prices(tmp_path: Path) -> None:
    """Responses say that they used the database, except for those from the cache."""
    async with started(["-m", "examples.caching"], tmp_path, signal.SIGTERM) as prices:
        answers = await prices.follow(200, 200, 200, 200)
        assert [answer.json()["cents"] for answer in answers] == [100, 100, 250, 250]
        assert ["Server-Timing" in answer.headers for answer in answers] == [True, False, True, False]


@needs("strawberry")
async def test_library(tmp_path: Path) -> None:
    """A mutation with an error stores nothing, and the log says which error."""
    async with started(["-m", "examples.graphql"], tmp_path) as library:
        added, failed, everything = await library.follow(200, 200, 200)
        assert "errors" not in added.json()
        assert failed.json()["data"] is None
        assert everything.json()["data"] == {
            "count": 1,
            "authors": [{"name": "Jane Austen", "books": [{"title": "Emma"}]}],
        }
        assert library.process.stderr
        await library.process.stderr.readuntil(b"UNIQUE constraint failed")


@needs("sqladmin")
async def test_admins(tmp_path: Path) -> None:
    """What one interface creates the other shows, and the program says so; a price of 0 is refused."""
    async with started(["-m", "examples.admin"], tmp_path, signal.SIGTERM) as shop:
        create = "/admin/product/create"
        assert (await shop.client.post(create, data={"name": "cup", "price": "0"})).status_code == 400
        assert (await shop.client.post(create, data={"name": "tea", "price": "3"})).is_redirect
        listed = (await shop.client.get("/starlette-admin/product/list")).text
        assert "tea" in listed
        assert "cup" not in listed
        assert shop.process.stderr
        await shop.process.stderr.readuntil(b"tea has changed")
