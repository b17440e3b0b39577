"""The page about deployment: each server starts its workers, sees clients leave, and ends in good order."""

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

pytest.importorskip("gunicorn", reason="requirements/guides.in is not in the lowest row")

from examples.deployment.tables import create
from tests.support.databases import Judge, JudgeFor
from tests.support.deployed import (
    BUSY,
    CONNECTIONS,
    NOT_CLOSED,
    ROOT,
    WAITING,
    Deployed,
    Exchange,
    Server,
    deployed,
)

pytestmark = pytest.mark.servers
APP = "examples.deployment.app:app"
PAGE = (ROOT / "docs/how-to/deployment.md").read_text("utf-8")
ADDED = {"gunicorn": ["--no-control-socket"]}
"""What the tests add to a command."""
COMMANDS = re.findall(r"^\$ ((uvicorn|gunicorn|hypercorn|granian) .+)$", PAGE, re.MULTILINE)
SERVERS = [Server.parse(line, *ADDED.get(program, ())) for line, program in COMMANDS]
HYPERCORN, GUNICORN = (
    next(server for server in SERVERS if server.words[0] == name) for name in ("hypercorn", "gunicorn")
)
REQUESTS = {
    "uvicorn": "timeout_graceful_shutdown",
    "gunicorn": "graceful_timeout",
    "hypercorn": "graceful_timeout",
    "granian": "workers_kill_timeout",
}
"""The setting of each server that limits requests under way after SIGTERM."""
IDLE = {"uvicorn": "timeout_keep_alive", "gunicorn": "keepalive", "hypercorn": "keep_alive_timeout"}
"""The setting that limits idle connections; granian has none."""
GRACE = "asgi_disconnect_grace_period"
TABLE = {
    row: dict(zip(REQUESTS, cells, strict=True))
    for row, *cells in (line.strip("| ").split(" | ") for line in re.findall(r"^\|.+\|$", PAGE, re.MULTILINE))
    if len(cells) == len(REQUESTS)
}
"""What the page says of the servers, by row and program."""
PROCESSES = f"SELECT count(DISTINCT application_name) FROM ({CONNECTIONS}) AS connection"
every_server = pytest.mark.parametrize("server", SERVERS, ids=str)


@pytest.fixture
async def judge(postgresql_url: str, judge_for: JudgeFor) -> Judge:
    """Look at a database that has the tables, with tea in the stock."""
    await create(postgresql_url)
    return await judge_for(postgresql_url)


@pytest.fixture
async def other(judge: Judge, postgresql_url: str, judge_for: JudgeFor) -> AsyncIterator[Judge]:
    """Another client of the database, which takes locks; it gives them back at the end."""
    other = await judge_for(postgresql_url)
    yield other
    await other.execute("ROLLBACK")


@asynccontextmanager
async def locked(other: Judge, rows: str) -> AsyncGenerator[None]:
    """Have everybody wait who would change these rows."""
    await other.execute("BEGIN")
    await other.execute(f"SELECT * FROM {rows} FOR UPDATE")
    yield
    await other.execute("ROLLBACK")


async def orders(judge: Judge) -> object:
    """Return how many orders are stored."""
    return await judge.scalar("SELECT count(*) FROM orders")


def default(program: str, name: str) -> Any:
    """Return what a server takes for a setting that nobody gives."""
    if program == "gunicorn":
        settings: Any = import_module("gunicorn.config").KNOWN_SETTINGS
        return {setting.name: setting.default for setting in settings}[name]
    if program == "hypercorn":
        return getattr(import_module("hypercorn.config").Config, name)
    made_by = {"uvicorn": "Config", "granian": "Granian"}[program]
    return signature(getattr(import_module(program), made_by)).parameters[name].default


def test_settings() -> None:
    """The page's figures are the servers' own, and its commands have the options of its table."""
    for program, name in REQUESTS.items():
        seconds = default(program, name)
        said = "no limit" if seconds is None else f"{seconds:g} seconds"
        assert TABLE["without the option"][program] == said
    uvicorn, gunicorn, hypercorn = (f"{default(program, name):g}" for program, name in IDLE.items())
    assert f"Uvicorn closes an idle connection after {uvicorn} seconds" in PAGE
    assert f"gunicorn after {gunicorn} and hypercorn after {hypercorn}" in PAGE
    grace = f"after {default('gunicorn', GRACE)} seconds"
    assert TABLE["a stream whose client has left is cancelled"]["gunicorn"] == grace
    for server in SERVERS:
        assert TABLE["option for requests in progress"][server.program].strip("`") in server.words


async def test_tables(postgresql_url: str, judge_for: JudgeFor) -> None:
    """The page's command creates the tables, with tea in the stock."""
    command = ["-m", "examples.deployment.tables"]
    assert f"$ python {' '.join(command)}\n" in PAGE
    environment = {**os.environ, "DATABASE_URL": postgresql_url}
    process = await asyncio.create_subprocess_exec(sys.executable, *command, cwd=ROOT, env=environment)
    assert await process.wait() == 0
    assert await (await judge_for(postgresql_url)).rows("SELECT * FROM stock") == [("tea", 100)]


@every_server
async def test_server(
    server: Server, judge: Judge, other: Judge, postgresql_url: str, tmp_path: Path
) -> None:
    """The lifespan runs in each worker, a client that leaves leaves nothing, and SIGTERM costs no request."""
    async with deployed(server, APP, postgresql_url, judge, tmp_path / "log") as site:
        await opens_a_pool_in_each_worker(site, server.processes)
        async with asyncio.TaskGroup() as meanwhile:
            if server.program in IDLE:
                seconds = default(server.program, IDLE[server.program])
                meanwhile.create_task(closes_an_idle_connection(site, seconds))
            assert await site.answer("GET", "/health/ready") == (200, '"ready"')
            assert (await site.answer("POST", "/orders?item=tea"))[0] == 201
            await loses_a_client_that_uploads(site)
            assert await orders(judge) == 1
            await loses_a_client_that_waits(site, other, "/orders/if-wanted?item=tea")
            assert await orders(judge) == 1
            await loses_a_client_of_a_stream(
                site, other, default("gunicorn", GRACE) if server is GUNICORN else 0
            )
            assert await judge.scalar("SELECT count(*) FROM orders WHERE exported") == 0
        assert "TimeoutError" not in site.log.read_text("utf-8")  # nothing waited for `command_timeout`

        before = await judge.scalar(NOT_CLOSED)
        await lets_a_request_finish(site, other, server)
        assert await judge.scalar("SELECT amount FROM stock") == 98
        assert await judge.rows(CONNECTIONS) == []
        assert await judge.scalar(NOT_CLOSED) == before


async def opens_a_pool_in_each_worker(site: Deployed, processes: int) -> None:
    """Wait until each of so many processes has opened its first connection, at startup."""
    await site.until(PROCESSES, is_true=lambda count: count == processes)


async def closes_an_idle_connection(site: Deployed, seconds: float) -> None:
    """Send one request and wait until the server closes the connection, not before so many seconds."""
    began = asyncio.get_running_loop().time()
    async with site.idle() as exchange:
        await exchange.send(b"GET /health/live HTTP/1.1\r\nHost: test\r\n\r\n")
        assert await exchange.status() == 200
        assert await exchange.rest() == b'"alive"'
    assert asyncio.get_running_loop().time() - began >= seconds


async def loses_a_client_that_uploads(site: Deployed) -> None:
    """Cut a client in the middle of its body, when the application has stored a part of it."""
    async with site.request("POST", "/orders/import", length=100) as exchange:
        await exchange.send(b"tea\ntea\nte")
        await site.until(f"SELECT count(*) FROM ({CONNECTIONS} AND state = 'idle in transaction') AS open")
        exchange.cut()
        await site.until(BUSY, is_true=lambda count: not count)


async def loses_a_client_that_waits(site: Deployed, other: Judge, path: str) -> None:
    """Cut a client while its request waits for a lock; the wait ends though the lock stays."""
    async with locked(other, "stock"), site.request("POST", path) as exchange:
        await site.until(WAITING)
        exchange.cut()
        await site.until(BUSY, is_true=lambda count: not count)


async def loses_a_client_of_a_stream(site: Deployed, other: Judge, seconds: float) -> None:
    """Cut a client of a stream; the stream waits for a lock and is cancelled, not before so many seconds."""
    async with a_stream(site, other) as exchange:
        began = asyncio.get_running_loop().time()
        exchange.cut()
        await site.until(BUSY, is_true=lambda count: not count)
        assert asyncio.get_running_loop().time() - began >= seconds


@asynccontextmanager
async def a_stream(site: Deployed, other: Judge) -> AsyncGenerator[Exchange]:
    """Ask for a stream of two lines, of which the first was sent and the second waits for a lock."""
    await site.judge.execute("INSERT INTO orders (item, exported) VALUES ('tea', false)")
    last = "orders WHERE id = (SELECT max(id) FROM orders)"
    async with locked(other, last), site.request("POST", "/orders/export") as exchange:
        assert await exchange.status() == 200
        await exchange.until(b" tea\n")
        await site.until(WAITING)
        yield exchange


async def begins_to_stop(site: Deployed, server: Server) -> None:
    """Send SIGTERM, and wait for what a server does when it has stopped to take connections."""
    match server.program:
        case "hypercorn":  # it closes idle connections
            async with site.idle() as idle:
                site.stop()
                await idle.rest()
        case "uvicorn":  # a worker with a request says so
            site.stop()
            await site.until_logged("Waiting for connections to close")
        case _:
            site.stop()
            await site.until_refused()


async def lets_a_request_finish(site: Deployed, other: Judge, server: Server) -> None:
    """Send SIGTERM while a request waits for a lock, which is given back when another has come too late."""
    said = TABLE["a new connection while the server stops"][server.program]
    async with AsyncExitStack() as requests:
        async with locked(other, "stock"):  # before the request, which would be answered at once
            exchange = await requests.enter_async_context(site.request("POST", "/orders?item=tea"))
            await site.until(WAITING)
            await begins_to_stop(site, server)
            if said == "is refused":
                with pytest.raises(ConnectionRefusedError):
                    await site.answer("GET", "/health/live")
            else:
                assert said == "waits, and is cut at the end"
                newcomer = await requests.enter_async_context(site.request("GET", "/health/live"))
                requests.push_async_callback(is_cut, newcomer)
        assert await exchange.status() == 201
    assert await site.process.wait() == 0


async def is_cut(exchange: Exchange) -> None:
    """Wait until the server closes a connection that it has not answered."""
    with suppress(ConnectionResetError):
        assert await exchange.rest() == b""


@every_server
async def test_polling(server: Server, judge: Judge, postgresql_url: str, tmp_path: Path) -> None:
    """A route that polls sees its client leave; under gunicorn also a client who is still there."""
    said = TABLE["`request.is_disconnected()`"][server.program]
    async with deployed(server, "tests.support.polling:app", postgresql_url, judge, tmp_path / "log") as site:
        still_there = {"works": "true", "is true too early": "false"}[said]
        assert await site.answer("POST", "/still-there") == (200, still_there)
        async with site.request("POST", "/once-left?item=tea") as exchange:
            if said == "works":
                await site.until(BUSY)
                exchange.cut()
            await site.until("SELECT count(*) FROM orders")


async def test_gunicorn_waits_for_connections(
    judge: Judge, other: Judge, postgresql_url: str, tmp_path: Path
) -> None:
    """A stream whose client has left may end in the grace period; the end waits for idle connections."""
    words = [*GUNICORN.words, "-w", "1", "--asgi-disconnect-grace-period", "60"]
    server = evolve(GUNICORN, words=words)
    async with deployed(server, APP, postgresql_url, judge, tmp_path / "log", patience=1) as site:
        assert (await site.answer("POST", "/orders?item=tea"))[0] == 201
        async with a_stream(site, other) as exchange:
            exchange.cut()
            assert await site.answer("GET", "/health/live") == (200, '"alive"')  # it has seen the cut, too
        await site.until("SELECT count(*) FROM orders WHERE exported", is_true=lambda count: count == 2)
        async with site.idle() as idle:
            site.stop()
            await idle.rest()
        await site.until_logged("Waiting for 1 connections to finish")


async def test_hypercorn_of_two_workers_cuts_requests(
    judge: Judge, other: Judge, postgresql_url: str, tmp_path: Path
) -> None:
    """Hypercorn ends a busy worker as soon as an idle one has ended; its request is rolled back."""
    server = evolve(HYPERCORN, words=[*HYPERCORN.words, "-w", "2"])
    async with deployed(server, APP, postgresql_url, judge, tmp_path / "log") as site:
        await opens_a_pool_in_each_worker(site, 2)
        async with locked(other, "stock"), site.request("POST", "/orders?item=tea") as exchange:
            await site.until(WAITING)
            site.stop()
            assert await exchange.rest() == b""
        await site.process.wait()
    assert await orders(judge) == 0


@every_server
async def test_server_gives_up_a_request(
    server: Server, judge: Judge, other: Judge, postgresql_url: str, tmp_path: Path
) -> None:
    """A request that takes longer than the server waits after SIGTERM is rolled back, and has no success."""
    if server is HYPERCORN and sys.version_info >= (3, 12):
        pytest.skip("the next test looks at it")
    async with deployed(server, APP, postgresql_url, judge, tmp_path / "log", patience=1) as site:
        await opens_a_pool_in_each_worker(site, server.processes)
        async with locked(other, "stock"), site.request("POST", "/orders?item=tea") as exchange:
            await site.until(WAITING)
            site.stop()
            answer = await exchange.rest()
            await site.process.wait()
        await site.until(PROCESSES, is_true=lambda count: not count, ended=True)
    status = re.match(rb"HTTP/1\.1 (\d+)", answer)
    said = TABLE["response to a request that took too long"][server.program]
    assert (status[1].decode() if status else "none") == said
    assert await orders(judge) == 0


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the test before looks at it")
async def test_hypercorn_waits_without_limit(
    judge: Judge, other: Judge, postgresql_url: str, tmp_path: Path
) -> None:
    """From Python 3.12 on hypercorn ignores its option: asyncio's wait_closed() waits for all connections."""
    async with deployed(HYPERCORN, APP, postgresql_url, judge, tmp_path / "log", patience=1) as site:
        async with site.request("POST", "/orders?item=tea") as exchange:
            async with locked(other, "stock"):
                await site.until(WAITING)
                await begins_to_stop(site, HYPERCORN)
                await asyncio.sleep(2)  # twice as long as it was told to wait
            assert await exchange.status() == 201
        assert await site.process.wait() == 0


async def test_preloaded_engine(judge: Judge, postgresql_url: str, tmp_path: Path) -> None:
    """An engine that was used before the fork gets connections in each worker; the parent keeps its own."""
    app = "examples.deployment.preloaded:app"
    connected = "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
    backends = f"{connected} AND pid <> pg_backend_pid()"
    server = evolve(GUNICORN, words=[*GUNICORN.words, "--preload"])
    async with deployed(server, app, postgresql_url, judge, tmp_path / "log") as site:
        parents = {pid for (pid,) in await judge.rows(backends)}
        served: dict[int, set[int]] = {}
        while len(served) < 2:
            for answer in await asyncio.gather(*(site.answer("GET", "/process") for _ in range(8))):
                process, backend = json.loads(answer[1])
                served.setdefault(process, set()).add(backend)
        first, second = served.values()
        assert len(parents) == 1
        assert first.isdisjoint(second | parents)
        assert second.isdisjoint(parents)
        assert site.process.pid not in served
        assert await site.answer("GET", "/items") == (200, '["tea"]')
        assert parents <= {pid for (pid,) in await judge.rows(backends)}
