"""The program of the bookshop: its README is true, and it leaves nothing behind."""

import asyncio
import os
import re
import shlex
import signal
import sys
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from httpx2 import AsyncClient
from sqlalchemy import URL, NullPool, text
from sqlalchemy.ext.asyncio import create_async_engine

pytest.importorskip("alembic", reason="requirements/guides.in is not in the lowest row")

from examples.bookshop.__main__ import WORKER
from tests.support.bookshop import ISBN, PATIENCE, ROOT, environment, migrated, order
from tests.support.commands import Curl, same_answer
from tests.support.databases import JudgeFor
from tests.support.leftovers import temporary_place

README = (ROOT / "examples/bookshop/README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```console\n(.+?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [command for block in BLOCKS for command in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]


def commands(program: str) -> Iterator[str]:
    """Find the README's commands of a program, with what they answer."""
    return (command for command in COMMANDS if command.split()[0] == program)


@asynccontextmanager
async def bookshop(**environment: str) -> AsyncGenerator[asyncio.subprocess.Process]:
    """Start the program with its standby; it ends by SIGINT, which lets it end its servers."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "ignore", "-m", "examples.bookshop", "--replica"),
        cwd=ROOT,
        env={**os.environ, "PORT": "0", **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
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


async def replay(command: str, client: AsyncClient) -> None:
    """Send a curl command until it is answered as shown; only the worker's part may take a moment."""
    line, _, shown = command.partition("\n")
    status = re.match(r"HTTP/1.1 (\d+)", shown)
    body = shown.partition("\n\n")[2] if status else shown
    response = await Curl.parse(line).send(client)
    async with asyncio.timeout(PATIENCE):
        while "/reports/" in line and not same_answer(body, response.text):
            response = await Curl.parse(line).send(client)
    assert response.status_code == int(status[1] if status else 200), line
    assert same_answer(body, response.text), (line, response.text)


def traces(text: str) -> list[list[str]]:
    """Return the spans of each trace that is printed in a text, without ids and durations."""
    found = defaultdict[str, list[str]](list)
    for trace, span in re.findall(r"^(\w{6}) +[\d.]+ ms  (.+)$", text, re.MULTILINE):
        found[trace].append(span)
    return [*found.values()]


@pytest.mark.slow
@pytest.mark.usefixtures("postgresql_server", "redis_url")  # the user of root's servers is there, and a Redis
async def test_readme_is_true() -> None:
    """Each curl command of the README is answered as shown, an order has its spans, and SIGTERM ends all."""
    with temporary_place() as place:
        async with bookshop(**place.environment, BOOKSHOP_TELEMETRY="on") as process:
            assert process.stdout
            guide = (await process.stdout.readuntil(b"ends the shop.")).decode()
            found = re.search(r"(http://[^/]+)/docs", guide)
            assert found, guide
            async with AsyncClient(base_url=found[1], timeout=30) as client:
                for command in commands("curl"):
                    await replay(command, client)
            assert [mail.name for mail in place.path.glob("bookshop-*/mail/*.eml")] == ["order-1.eml"]
            process.send_signal(signal.SIGTERM)
            printed, _ = await process.communicate()
        (shown,), orders = traces(README), traces(printed.decode())
        assert shown[-1] == "POST /orders"
        assert shown in orders
        assert process.returncode == 0
        assert (place.servers(), place.data(), list(place.path.glob("bookshop-*"))) == ([], [], [])


@pytest.fixture(scope="module")
def deployed(postgresql_server: URL, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The variables of a deployment whose databases are migrated."""
    with migrated(postgresql_server, tmp_path_factory.mktemp("mail")) as settings:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        yield {**os.environ, "PATH": path, **environment(settings)}


async def test_migrating_commands(deployed: dict[str, str]) -> None:
    """The commands that migrate, and those of Alembic, work with the variables of a deployment."""
    for command in (*commands("python"), *commands("alembic")):
        process = await asyncio.create_subprocess_exec(*shlex.split(command), cwd=ROOT, env=deployed)
        assert await process.wait() == 0, command


async def test_serving_command(deployed: dict[str, str], judge_for: JudgeFor) -> None:
    """The command that serves does so; SIGTERM ends it once the order that is under way has its answer."""
    [command] = commands("uvicorn")
    shop_url = deployed["BOOKSHOP_SHOP_URL"]
    judge = await judge_for(shop_url)
    process = await asyncio.create_subprocess_exec(
        *(*shlex.split(command), "--port", "0"), cwd=ROOT, env=deployed, stderr=asyncio.subprocess.PIPE
    )
    try:
        assert process.stderr
        said = (await process.stderr.readuntil(b"(Press CTRL+C to quit)")).decode()
        found = re.search(r"running on (\S+)", said)
        assert found, said
        async with AsyncClient(base_url=found[1], timeout=30) as client:
            assert (await client.get("/health/ready")).json() == "ready"
            book = {"isbn": ISBN, "title": "Emma", "cents": 699, "stock": 1}
            assert (await client.post("/books", json=book)).status_code == 201
            async with create_async_engine(shop_url, poolclass=NullPool).connect() as locking:
                await locking.execute(text("LOCK TABLE orders IN ACCESS EXCLUSIVE MODE"))
                under_way = asyncio.create_task(order(client, {ISBN: 1}))
                while not await judge.scalar("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                    assert not under_way.done()
                process.terminate()
                await process.stderr.readuntil(b"Shutting down")
            assert (await under_way).status_code == 201
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        _, rest = await process.communicate()
    assert "Application shutdown complete." in rest.decode()


def test_worker_command() -> None:
    """The README's worker is the one that the program starts, and the tests of the outbox."""
    [command] = commands("taskiq")
    assert ["-m", *shlex.split(command)] == list(WORKER)


def test_make_has_the_target() -> None:
    """`make bookshop` runs the module."""
    assert [command.strip() for command in commands("make")] == ["make bookshop"]
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert re.search(r"^bookshop: venv .*\n\t.*-m examples\.bookshop \$\(ARGS\)$", makefile, re.MULTILINE)


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("examples.bookshop", "there is no program redis-server"),
        ("examples.bookshop.migrating", "BOOKSHOP_SHOP_URL: Field required"),
    ],
)
async def test_what_is_missing_is_named(module: str, said: str) -> None:
    """A program that finds no Redis, or not its variables, ends and says so."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module), cwd=ROOT, env={"PATH": ""}, stderr=asyncio.subprocess.PIPE
    )
    _, errors = await process.communicate()
    assert process.returncode == 1
    assert said in errors.decode()


def test_links_lead_somewhere() -> None:
    """The README links to files that are there, and names every module."""
    folder = ROOT / "examples/bookshop"
    links = set(re.findall(r"\]\(([^)]+)\)", README))
    assert all((folder / link).exists() for link in links)
    assert {path.name for path in folder.glob("*.py")} - links == {"__init__.py"}
