"""A Galera cluster: conflicts at COMMIT, reads on another node, and nodes that take no commands."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from importlib import import_module
from time import monotonic

import psutil  # type: ignore[import-untyped]
import pytest
from attrs import Factory, define
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from sqlalchemy import Connection, make_url, select, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession

from examples.cluster.galera import DEADLINE, first_of
from fastapi_async_sqlalchemy import (
    ConfigurationError,
    EngineArgs,
    SessionProxy,
    atomic,
    create_middleware_and_session_proxy,
)
from tests.failover.conftest import missing
from tests.support.databases import Judge
from tests.support.galera import Galera, Node, galera_cluster
from tests.support.programs import ProgramMissingError
from tests.support.serving import asgi_client
from tests.support.site import checked_out
from tests.support.tables import Note, create_tables

DEADLOCK, NOT_READY = 1213, 1047
CLIENTS = 6
ROUND = 40
BOUND = 15.0  # all COMMITs wait for evs.suspect_timeout, which is 5
"""Seconds in which each write must be answered."""
Pair = SessionProxy[AsyncSession]


@pytest.fixture(scope="session")
def lasting_galera() -> Iterator[Galera]:
    """The Galera cluster of this run."""
    try:
        with galera_cluster() as cluster:
            yield cluster
    except ProgramMissingError as error:
        missing(error)


@pytest.fixture
def galera(lasting_galera: Galera) -> Galera:
    """The Galera cluster, whole and empty."""
    lasting_galera.healthy()
    lasting_galera.nodes[0].run("DROP TABLE IF EXISTS shop.note, shop.counter")
    lasting_galera.nodes[0].run(
        "CREATE TABLE shop.counter (id INT PRIMARY KEY, n INT); INSERT INTO shop.counter VALUES (1, 0)"
    )
    return lasting_galera


@pytest.fixture(params=["aiomysql", "asyncmy"])
def driver(request: pytest.FixtureRequest) -> str:
    """Each driver in turn."""
    name: str = request.param
    return name


@asynccontextmanager
async def connected(
    node: Node, driver: str = "aiomysql", engine_args: EngineArgs | None = None
) -> AsyncGenerator[Pair]:
    """Make a pair of a node; on exit no connection is out."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    async with db.connect(make_url(node.url).set(drivername=f"mysql+{driver}"), engine_args=engine_args):
        await create_tables(db.engine)
        yield db
        assert checked_out(db.engine.pool) == 0


async def increment(db: Pair) -> None:
    """Add one to the counter by the current unit."""
    await db.session.execute(text("UPDATE counter SET n = n + 1 WHERE id = 1"))


async def counted(node: Node) -> object:
    """Return the counter, when the node has all that was committed so far."""
    async with Judge(node.url) as judge:
        await judge.execute("SET SESSION wsrep_sync_wait = 1")
        return await judge.scalar("SELECT n FROM counter")


async def test_conflicts_between_nodes_are_retried(galera: Galera, driver: str) -> None:
    """Increments of one row on all nodes at a time are all there: those that met another were repeated."""
    attempts = 0
    async with AsyncExitStack() as exits:
        pairs = [await exits.enter_async_context(connected(node, driver)) for node in galera.nodes]

        async def ten(db: Pair) -> None:
            @db.transactional(retries=100)
            async def once() -> None:
                nonlocal attempts
                attempts += 1
                await increment(db)

            for _ in range(10):
                await once()

        async with asyncio.TaskGroup() as group:
            for db in pairs:
                group.create_task(ten(db))
    assert await counted(galera.nodes[0]) == 30
    assert attempts > 30


async def test_conflict_at_the_commit_of_a_request(galera: Galera, driver: str) -> None:
    """The application's handler answers for a COMMIT that lost to another node, and nothing is stored."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    app = FastAPI()
    app.add_middleware(
        middleware,
        db_url=make_url(galera.nodes[0].url).set(drivername=f"mysql+{driver}").render_as_string(),
        commit_on_exit=True,
    )

    @app.post("/increments")
    async def add() -> None:
        await increment(db)
        async with connected(galera.nodes[1]) as other, other.begin():
            await increment(other)

    @app.exception_handler(OperationalError)
    async def conflict(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, OperationalError)
        assert error.orig is not None
        return JSONResponse(error.orig.args[0], status_code=409)

    async with asgi_client(app) as client:
        answer = await client.post("/increments")
        assert (answer.status_code, answer.json()) == (409, DEADLOCK)
        assert checked_out(db.engine.pool) == 0
    assert await counted(galera.nodes[0]) == 1


@pytest.mark.parametrize("at_commit", [False, True], ids=["at a statement", "at COMMIT"])
async def test_node_that_takes_no_commands(galera: Galera, driver: str, *, at_commit: bool) -> None:
    """What it refuses was not done, so that retries do it again; connections to it are discarded."""
    node, attempts = galera.nodes[0], 0
    async with connected(node, driver) as db:
        async with db():
            before = await db.session.scalar(text("SELECT connection_id()"))

        @db.transactional(retries=5)
        async def add() -> None:
            nonlocal attempts
            attempts += 1
            if at_commit:
                await increment(db)
            if attempts == 1:
                await asyncio.to_thread(node.run, "SET GLOBAL wsrep_reject_queries = ALL")
                db.unit.on_rollback(lambda: node.run("SET GLOBAL wsrep_reject_queries = NONE"))
            if not at_commit:
                await increment(db)

        try:
            await add()
        finally:
            node.run("SET GLOBAL wsrep_reject_queries = NONE")
        assert attempts == 2
        async with db():
            assert await db.session.scalar(text("SELECT connection_id()")) != before
    assert await counted(node) == 1


async def test_node_that_takes_no_commands_is_told(galera: Galera, driver: str) -> None:
    """Without retries it is an error that says what the node says; afterwards the pool serves again."""
    node = galera.nodes[0]
    async with connected(node, driver, {"pool_pre_ping": True}) as db:
        node.run("SET GLOBAL wsrep_reject_queries = ALL")
        try:
            with pytest.raises(OperationalError, match="WSREP has not yet prepared node") as caught:
                async with db.begin():
                    await increment(db)
        finally:
            node.run("SET GLOBAL wsrep_reject_queries = NONE")
        assert caught.value.connection_invalidated
        async with db.begin():
            await increment(db)
    assert await counted(node) == 1


async def test_own_writes_on_another_node(galera: Galera, driver: str) -> None:
    """With wsrep_sync_wait a read waits for what was committed anywhere; without it it does not."""
    writing, reading = galera.nodes[:2]
    sync_wait = "SET SESSION wsrep_sync_wait = 1"
    async with AsyncExitStack() as exits:
        db = await exits.enter_async_context(connected(writing, driver))
        other = await exits.enter_async_context(connected(reading, driver))
        waiting_args: EngineArgs = {"connect_args": {"init_command": sync_wait}}
        patient = await exits.enter_async_context(connected(reading, driver, waiting_args))

        def sync(connection: Connection) -> None:
            connection.execute(text(sync_wait))

        async def read(pair: Pair, *, hook: bool = False) -> object:
            async with pair() as unit:
                if hook:
                    unit.on_begin(sync)
                return await unit.session.scalar(text("SELECT n FROM counter"))

        async with Judge(reading.url) as lock:
            await lock.execute("FLUSH TABLES WITH READ LOCK")  # it receives, and applies nothing
            async with db.begin():
                await increment(db)
            assert await read(other) == 0
            waiting = [asyncio.create_task(one) for one in (read(other, hook=True), read(patient))]
            done, _ = await asyncio.wait(waiting, timeout=0.3)
            assert not done
            await lock.execute("UNLOCK TABLES")
            assert await asyncio.gather(*waiting) == [1, 1]


async def test_atomic_is_refused(galera: Galera, driver: str) -> None:
    """Galera has no two-phase commit: the first statement says so, and nothing is written."""
    async with AsyncExitStack() as exits:
        first, second = [
            await exits.enter_async_context(connected(node, driver)) for node in galera.nodes[:2]
        ]

        async def write() -> None:
            async with atomic(first, second):
                await increment(first)

        with pytest.raises(ConfigurationError, match="a Galera cluster has no two-phase commit"):
            await write()
    assert await counted(galera.nodes[0]) == 0


@asynccontextmanager
async def killed(node: Node) -> AsyncGenerator[None]:
    """Lose a node."""
    await asyncio.to_thread(node.kill)
    yield


@asynccontextmanager
async def isolated(node: Node) -> AsyncGenerator[None]:
    """Cut a node off until exit: it runs, finds itself alone, and takes no commands any more."""
    await asyncio.to_thread(node.run, "SET GLOBAL wsrep_provider_options = 'gmcast.isolate=1'")
    try:
        yield
    finally:
        await asyncio.to_thread(node.run, "SET GLOBAL wsrep_provider_options = 'gmcast.isolate=0'")


@asynccontextmanager
async def silent(node: Node) -> AsyncGenerator[None]:
    """Let a node say nothing until exit, while its machine still accepts connections."""
    node.pause()
    try:
        yield
    finally:
        node.resume()


@define(eq=False)
class Writers:
    """Tasks that write one note after another, and know what they were told."""

    db: Pair
    deadline: float | None = None
    """Seconds for a write."""
    told: set[str] = Factory(set[str])
    errors: list[str] = Factory(list[str])
    longest: float = 0.0
    _ended: bool = False
    _successes: asyncio.Queue[str] = Factory(asyncio.Queue[str])
    _refused: asyncio.Event = Factory(asyncio.Event)

    async def _write(self, name: int) -> None:
        for number in itertools.count():
            if self._ended:
                return
            begun, note = monotonic(), f"{name}-{number}"
            try:
                async with asyncio.timeout(self.deadline), self.db.begin() as unit:
                    unit.session.add(Note(text=note))
            except (DBAPIError, OSError) as error:
                self.errors.append(type(error).__name__)
                self._refused.set()
                await asyncio.sleep(0.02)
            else:
                self.told.add(note)
                self._successes.put_nowait(note)
            self.longest = max(self.longest, monotonic() - begun)

    async def more(self, count: int) -> None:
        """Wait until so many more writes are told than are now."""
        while not self._successes.empty():
            self._successes.get_nowait()
        for _ in range(count):
            await self._successes.get()

    async def refused(self) -> None:
        """Wait for the first error."""
        await self._refused.wait()

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Run them; each ends with its last write."""
        async with asyncio.TaskGroup() as tasks:
            for name in range(CLIENTS):
                tasks.create_task(self._write(name))
            try:
                yield
            finally:
                self._ended = True


def by_first_of(galera: Galera, driver: str = "aiomysql") -> EngineArgs:
    """Return the arguments of an engine that tries one node after the other."""
    nodes = [("127.0.0.1", node.port) for node in galera.nodes]
    creator = first_of(nodes, import_module(driver).connect, user="root", db="shop")
    return {"async_creator": creator, "pool_pre_ping": True}


async def test_silent_node_is_passed_over(galera: Galera, driver: str) -> None:
    """A node that says nothing is given up after the deadline, with its connection; the next one serves."""
    first, second = galera.nodes[:2]
    async with connected(first, driver, by_first_of(galera, driver)) as db:
        await db.engine.dispose()
        async with silent(first), asyncio.timeout(2 * DEADLINE), db():
            assert await db.session.scalar(text("SELECT @@port")) == second.port
            peers = {one.raddr.port for one in psutil.Process().net_connections() if one.raddr}
            assert first.port not in peers


async def test_read_timeout_of_asyncmy(galera: Galera) -> None:
    """A statement on a silent node ends with an error, and its connection is discarded."""
    node = galera.nodes[0]
    async with connected(node, "asyncmy", {"connect_args": {"read_timeout": 1}}) as db, db():
        await db.session.execute(text("SELECT 1"))
        async with silent(node):
            with pytest.raises(OperationalError, match="read timeout") as caught:
                await db.session.execute(text("SELECT 1"))
        assert caught.value.connection_invalidated


@pytest.mark.parametrize(("harm", "deadline"), [(killed, None), (isolated, None), (silent, 3)])
async def test_next_node_is_used(
    galera: Galera, harm: Callable[[Node], AbstractAsyncContextManager[None]], deadline: float | None
) -> None:
    """Writes go on at the next node, what was told is there, and what was refused was answered in time."""
    node = galera.nodes[0]
    async with connected(node, engine_args=by_first_of(galera)) as db, AsyncExitStack() as harmed:
        writers = Writers(db, deadline)
        async with writers.running():
            await writers.more(ROUND)
            begun = monotonic()
            await harmed.enter_async_context(harm(node))
            await writers.refused()
            await writers.more(1)
            seconds = monotonic() - begun
            await writers.more(ROUND)
        async with db():
            port = await db.session.scalar(text("SELECT @@port"))
            rows = set(await db.session.scalars(select(Note.text)))
    lost = writers.told - rows
    print(  # noqa: T201  # pytest -rP shows it
        f"{harm.__name__}: told {len(writers.told)}, refused {len(writers.errors)}, lost {len(lost)}, "
        f"stored but not told {len(rows - writers.told)}, first success after {seconds:.1f} s, "
        f"longest {writers.longest:.1f} s"
    )
    assert lost == set()
    assert port == galera.nodes[1].port
    assert writers.longest < BOUND
    await asyncio.to_thread(galera.healthy)
