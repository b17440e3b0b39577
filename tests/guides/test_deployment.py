"""The page about deployment: each server starts its workers, sees clients leave, and ends in good order."""

import asyncio
import json
import re
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from attrs import evolve

pytest.importorskip("gunicorn", reason="requirements/guides.in is not in the lowest row")

from sqlalchemy.ext.asyncio import create_async_engine

from examples.deployment.tables import Base
from tests.support.databases import Judge, JudgeFor
from tests.support.deployed import BUSY, CONNECTIONS, NOT_CLOSED, ROOT, WAITING, Deployed, Server, deployed

pytestmark = pytest.mark.servers
APP = "examples.deployment.app:app"
PAGE = (ROOT / "docs/how-to/deployment.md").read_text("utf-8")
FASTER = {"gunicorn": ["--no-control-socket", "--asgi-disconnect-grace-period", "1"]}
"""What the tests add to a command."""
COMMANDS = re.findall(r"^\$ ((uvicorn|gunicorn|hypercorn|granian) .+)$", PAGE, re.MULTILINE)
SERVERS = [Server.parse(line, *FASTER.get(program, ())) for line, program in COMMANDS]
HYPERCORN, GUNICORN = (
    next(server for server in SERVERS if server.words[0] == name) for name in ("hypercorn", "gunicorn")
)
PROCESSES = f"SELECT count(DISTINCT application_name) FROM ({CONNECTIONS}) AS connection"
every_server = pytest.mark.parametrize("server", SERVERS, ids=str)


@pytest.fixture
async def judge(postgresql_url: str, judge_for: JudgeFor) -> Judge:
    """Look at a database that migrations have made, with tea in the stock."""
    engine = create_async_engine(postgresql_url)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await engine.dispose()
    judge = await judge_for(postgresql_url)
    await judge.execute("INSERT INTO stock VALUES ('tea', 100)")
    return judge


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


@every_server
async def test_server(
    server: Server, judge: Judge, other: Judge, postgresql_url: str, tmp_path: Path
) -> None:
    """The lifespan runs in each worker, a client that leaves leaves nothing, and SIGTERM costs no request."""
    async with deployed(server, APP, postgresql_url, judge, tmp_path / "log") as site:
        await opens_a_pool_in_each_worker(site, server.processes)
        assert await site.answer("GET", "/health/ready") == (200, '"ready"')
        assert (await site.answer("POST", "/orders?item=tea"))[0] == 201
        await loses_a_client_that_uploads(site)
        assert await orders(judge) == 1
        await loses_a_client_that_waits(site, other, "/orders/if-wanted?item=tea")
        assert await orders(judge) == 1
        await loses_a_client_of_a_stream(site, other)
        assert await judge.scalar("SELECT count(*) FROM orders WHERE exported") == 0

        before = await judge.scalar(NOT_CLOSED)
        await lets_a_request_finish(site, other, server.processes)
        assert await judge.scalar("SELECT amount FROM stock") == 98
        assert await judge.rows(CONNECTIONS) == []
        assert await judge.scalar(NOT_CLOSED) == before


async def opens_a_pool_in_each_worker(site: Deployed, processes: int) -> None:
    """Wait until each of so many processes has opened its first connection, at startup."""
    await site.until(PROCESSES, is_true=lambda count: count == processes)


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


async def loses_a_client_of_a_stream(site: Deployed, other: Judge) -> None:
    """Cut a client between two lines of its stream, of which the first was written."""
    await site.judge.execute("INSERT INTO orders (item, exported) VALUES ('tea', false)")
    last = "orders WHERE id = (SELECT max(id) FROM orders)"
    async with locked(other, last), site.request("POST", "/orders/export") as exchange:
        assert await exchange.status() == 200
        await exchange.until(b" tea\n")
        await site.until(WAITING)
        exchange.cut()
        await site.until(BUSY, is_true=lambda count: not count)


async def begins_to_stop(site: Deployed, processes: int) -> None:
    """Send SIGTERM and wait for its first effect: idle workers end, a single one closes idle connections."""
    if processes == 1:
        async with site.idle() as idle:
            site.stop()
            await idle.rest()
    else:
        site.stop()
        await site.until(PROCESSES, is_true=lambda count: count == processes - 1)


async def lets_a_request_finish(site: Deployed, other: Judge, processes: int) -> None:
    """Send SIGTERM while a request waits for a lock, which is given back when the server is stopping."""
    async with AsyncExitStack() as request:
        async with locked(other, "stock"):  # before the request, which would be answered at once
            exchange = await request.enter_async_context(site.request("POST", "/orders?item=tea"))
            await site.until(WAITING)
            await begins_to_stop(site, processes)
        assert await exchange.status() == 201
    assert await site.process.wait() == 0


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
    """A request that takes longer than the server waits after SIGTERM is rolled back, and not answered."""
    if server is HYPERCORN and sys.version_info >= (3, 12):
        pytest.skip("asyncio's Server.wait_closed() waits for all connections, and hypercorn awaits it")
    async with deployed(server, APP, postgresql_url, judge, tmp_path / "log", patience=1) as site:
        await opens_a_pool_in_each_worker(site, server.processes)
        async with locked(other, "stock"), site.request("POST", "/orders?item=tea") as exchange:
            await site.until(WAITING)
            site.stop()
            assert b"201" not in await exchange.rest()
            await site.process.wait()
        await site.until(PROCESSES, is_true=lambda count: not count, ended=True)
    assert await orders(judge) == 0


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
