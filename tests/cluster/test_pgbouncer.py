"""PgBouncer in transaction mode: what lives in a transaction holds, and nothing is left for the next one."""

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from uuid import uuid4

import pytest
from attrs import frozen
from fastapi import FastAPI, HTTPException
from httpx2 import AsyncClient
from sqlalchemy import AsyncAdaptedQueuePool, Connection, NullPool, func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from starlette.responses import StreamingResponse

from fastapi_async_sqlalchemy import (
    ConfigurationError,
    EngineArgs,
    ReadOnlyError,
    SessionProxy,
    create_middleware_and_session_proxy,
    pgbouncer_engine_args,
)
from tests.support.databases import Judge, JudgeFor
from tests.support.gate import Gate, closed, gate_of, passing
from tests.support.pgbouncer import CONSOLE, PgBouncerError, PgBouncerMissingError, pgbouncer, tell
from tests.support.serving import asgi_client, raw_get, serve
from tests.support.tables import Note, create_tables
from tests.support.versions import survives_cancellation

CLIENTS = 200
SERVERS = 10
WRITES = 3
"""How often each client writes; it reads as often."""

Bounce = Callable[..., str]
Make = Callable[[], EngineArgs]


def pooled() -> EngineArgs:
    """Return the arguments of an engine that keeps as many connections to PgBouncer as there are clients."""
    return {**pgbouncer_engine_args(), "poolclass": AsyncAdaptedQueuePool, "pool_size": CLIENTS}


def unpooled() -> EngineArgs:
    """Return the arguments of an engine that keeps none."""
    return {**pgbouncer_engine_args(), "poolclass": NullPool}


ENGINE_ARGS: list[Make] = [pooled, unpooled]
UNFINISHED = (
    "SELECT state, query FROM pg_stat_activity WHERE datname = current_database()"
    " AND backend_type = 'client backend' AND pid <> pg_backend_pid() AND state <> 'idle'"
)


@frozen(eq=False)
class Bounced:
    """An application in front of a PgBouncer, and the judge, who goes round that one."""

    url: str
    app: FastAPI
    db: SessionProxy[AsyncSession]
    judge: Judge
    gate: Gate

    async def notes(self) -> list[object]:
        """Return the texts that are committed, in order."""
        return [note for (note,) in await self.judge.rows("SELECT text FROM note ORDER BY text")]

    async def server(self) -> object:
        """Return the process that serves the current unit."""
        return await self.db.session.scalar(select(func.pg_backend_pid()))

    async def asked(self, sql: str) -> object:
        """Return what a unit of its own is told; it has a connection to PgBouncer of its own."""
        async with self.db():
            return await self.db.session.scalar(text(sql))

    async def write(self, note: str) -> None:
        """Write a note in a unit of its own."""
        async with self.db(commit_on_exit=True):
            self.db.session.add(Note(text=note))

    async def nobody_waits(self) -> None:
        """Look until no statement waits at the gate."""
        while await self.judge.scalar("SELECT count(*) FROM pg_locks WHERE NOT granted"):
            pass


@pytest.fixture
def bounce(postgresql_url: str, databases: ExitStack) -> Bounce:
    """A function that starts a PgBouncer as asked; without one a skip, but not with REQUIRE_PGBOUNCER."""

    def start(**settings: object) -> str:
        try:
            return databases.enter_context(pgbouncer(postgresql_url, **settings))
        except PgBouncerMissingError as error:
            reason = f"{error}"
        if os.environ.get("REQUIRE_PGBOUNCER"):
            pytest.fail(reason)
        pytest.skip(reason)

    return start


@asynccontextmanager
async def bounced(
    url: str, postgresql_url: str, judge_for: JudgeFor, engine_args: EngineArgs
) -> AsyncGenerator[Bounced]:
    """Make an application whose engine goes through PgBouncer; on exit wait until no server is busy."""
    engine = create_async_engine(postgresql_url, poolclass=NullPool)
    await create_tables(engine)
    judge = await judge_for(postgresql_url)
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    app = FastAPI()
    app.add_middleware(middleware, db_url=url, engine_args=engine_args, commit_on_exit=True)
    yield Bounced(url, app, db, judge, gate_of(engine, judge))
    while await judge.rows(UNFINISHED):
        pass


@pytest.fixture(params=ENGINE_ARGS)
async def single(
    request: pytest.FixtureRequest, bounce: Bounce, postgresql_url: str, judge_for: JudgeFor
) -> AsyncIterator[Bounced]:
    """A PgBouncer with one server connection: what one transaction leaves on it, the next one finds."""
    url = bounce(default_pool_size=1)
    async with bounced(url, postgresql_url, judge_for, request.param()) as single:
        yield single


@pytest.fixture
async def client(single: Bounced) -> AsyncIterator[AsyncClient]:
    """A client of the application, which is started; one process must serve all that it does."""
    async with asgi_client(single.app, raise_app_exceptions=False) as client:
        before = await single.asked("SELECT pg_backend_pid()")
        yield client
        assert await single.asked("SELECT pg_backend_pid()") == before


@pytest.fixture
async def db(client: AsyncClient, single: Bounced) -> SessionProxy[AsyncSession]:
    """The proxy, connected."""
    return single.db


async def test_further_connect_args(bounce: Bounce) -> None:
    """Arguments of asyncpg's are added to the recipe, which goes on serving."""
    engine_args = pgbouncer_engine_args(server_settings={"application_name": "shop"})
    _, db = create_middleware_and_session_proxy(AsyncSession)
    async with db.connect(bounce(default_pool_size=1), engine_args=engine_args):
        for _ in range(3):
            async with db() as unit:
                assert await unit.session.scalar(text("SHOW application_name")) == "shop"
                named = "SELECT count(*) FROM pg_prepared_statements WHERE name <> ''"
                assert await unit.session.scalar(text(named)) == 0


def test_wrong_connect_args() -> None:
    """What the recipe sets itself, and what belongs to the engine, is refused."""
    for name in pgbouncer_engine_args().get("connect_args", {}):
        with pytest.raises(ConfigurationError, match=f"sets {name} itself: leave it out"):
            pgbouncer_engine_args(**{name: 100})
    for name in ("pool_size", "connect_args"):
        with pytest.raises(ConfigurationError, match=f"{name} is no connect_args of asyncpg: write"):
            pgbouncer_engine_args(**{name: 5})


@pytest.mark.parametrize("engine_args", ENGINE_ARGS)
async def test_many_clients_share_few_servers(
    engine_args: Make, bounce: Bounce, postgresql_url: str, judge_for: JudgeFor
) -> None:
    """200 clients write and read by ten server connections: every row is there, and no prepared statement."""
    url = bounce(default_pool_size=SERVERS)
    servers: set[int] = set()
    prepared: set[int] = set()
    async with bounced(url, postgresql_url, judge_for, engine_args()) as site:

        @site.app.post("/notes/{note}", status_code=201)
        async def write(note: str) -> None:
            await site.db.session.execute(text("SELECT pg_advisory_xact_lock_shared(1)"))
            site.db.session.add(Note(text=note))

        @site.app.get("/notes/{note}")
        async def read(note: str) -> None:
            known = select(func.count()).select_from(text("pg_prepared_statements"))
            servers.add(await site.db.session.scalar(select(func.pg_backend_pid())) or 0)
            prepared.add(await site.db.session.scalar(known) or 0)
            if await site.db.session.scalar(select(Note.id).where(Note.text == note)) is None:
                raise HTTPException(404)

        async with asgi_client(site.app) as client:

            async def come(number: int) -> list[int]:
                calls = [(m, f"/notes/{number}-{i}") for i in range(WRITES) for m in ("POST", "GET")]
                return [(await client.request(method, path)).status_code for method, path in calls]

            # An engine's first connections are made one by one, and asyncpg up to 0.30 asks for types then.
            assert (await client.get("/notes/none")).status_code == 404
            await site.gate.close()
            coming = asyncio.gather(*(come(number) for number in range(CLIENTS)))
            await queue_of(url, waiting=CLIENTS - SERVERS)
            await site.gate.open()
            assert await coming == [[201, 200] * WRITES] * CLIENTS
            assert prepared == {0}
            assert len(servers) <= SERVERS
            assert len(await site.notes()) == CLIENTS * WRITES


async def queue_of(url: str, waiting: int) -> None:
    """Look until so many clients wait in PgBouncer, and see that all server connections are in use then."""
    in_use = found = 0
    while (found, in_use) != (waiting, SERVERS):  # a server that logs in is not in use yet
        pools = [row for row in await tell(url, "SHOW POOLS") if row["database"] != CONSOLE]
        in_use, found = (sum(int(pool[count]) for pool in pools) for count in ("sv_active", "cl_waiting"))
        assert in_use <= SERVERS


async def test_isolation_level(db: SessionProxy[AsyncSession], single: Bounced) -> None:
    """A unit has the isolation level that it asks for, and the next one has the database's own."""
    async with db(isolation_level="SERIALIZABLE", read_only=True, deferrable=True) as unit:
        assert await unit.session.scalar(text("SHOW transaction_isolation")) == "serializable"
        assert await unit.session.scalar(text("SHOW transaction_deferrable")) == "on"
        await unit.rollback()
        assert await unit.session.scalar(text("SHOW transaction_isolation")) == "serializable"
    assert await single.asked("SHOW transaction_isolation") == "read committed"
    assert await single.asked("SHOW transaction_deferrable") == "off"


@pytest.mark.parametrize("engine_args", ENGINE_ARGS)
async def test_serializable_is_enforced(
    engine_args: Make, bounce: Bounce, postgresql_url: str, judge_for: JudgeFor
) -> None:
    """Of two serializable units that each write what the other one has counted, one is refused."""
    url = bounce(default_pool_size=2)
    count = select(func.count()).select_from(Note)
    async with (
        bounced(url, postgresql_url, judge_for, engine_args()) as site,
        site.db.connect(url, engine_args=engine_args()) as db,
        db(isolation_level="SERIALIZABLE") as one,
        db(isolation_level="SERIALIZABLE") as other,
    ):
        for unit in (one, other):
            unit.session.add(Note(text=f"{await unit.session.scalar(count)} from {id(unit)}"))
            await unit.session.flush()
        await one.commit()
        with pytest.raises(DBAPIError, match="could not serialize access"):
            await other.commit()
        await other.rollback()
        assert len(await site.notes()) == 1


async def test_read_only(db: SessionProxy[AsyncSession], single: Bounced) -> None:
    """The database refuses a read-only unit's write, and lets the next unit on the connection write."""
    async with db(read_only=True) as unit:
        assert await unit.session.scalar(text("SHOW transaction_read_only")) == "on"
        with pytest.raises(DBAPIError, match="read-only transaction"):
            await unit.session.execute(text("INSERT INTO note (text) VALUES ('refused')"))
    async with db(read_only=True) as unit:
        unit.session.add(Note(text="refused"))
        with pytest.raises(ReadOnlyError, match="1 changed object of"):
            await unit.session.scalar(select(Note.text))
    assert await single.asked("SHOW transaction_read_only") == "off"
    await single.write("allowed")
    assert await single.notes() == ["allowed"]


TENANT = "SELECT current_setting('app.tenant', true)"


def set_tenant(tenant: str) -> Callable[[Connection], None]:
    """Return a hook that sets the tenant for the transaction that begins, in both ways there are."""

    def set_both(connection: Connection) -> None:
        connection.execute(text("SELECT set_config('app.tenant', :tenant, true)"), {"tenant": tenant})
        connection.exec_driver_sql("SET LOCAL statement_timeout = '7s'")

    return set_both


async def test_on_begin(db: SessionProxy[AsyncSession], single: Bounced) -> None:
    """What on_begin sets holds for every transaction of the unit, and for nobody else's in between."""
    async with db() as unit:
        unit.on_begin(set_tenant("red"))
        for end in (unit.commit, unit.rollback):
            assert await unit.session.scalar(text(TENANT)) == "red"
            assert await unit.session.scalar(text("SHOW statement_timeout")) == "7s"
            await end()
            assert await single.asked(TENANT) == ""
            assert await single.asked("SHOW statement_timeout") == "0"
        assert await unit.session.scalar(text(TENANT)) == "red"


async def test_tenants_at_once(client: AsyncClient, single: Bounced) -> None:
    """Requests of many tenants at once see their own, statement by statement, on one server connection."""

    @single.app.get("/tenants/{tenant}")
    async def seen(tenant: str) -> list[object]:
        single.db.unit.on_begin(set_tenant(tenant))
        return [await single.db.session.scalar(text(TENANT)) for _ in range(3)]

    tenants = [f"tenant-{number}" for number in range(40)]
    answers = await asyncio.gather(*(client.get(f"/tenants/{tenant}") for tenant in tenants))
    assert [answer.json() for answer in answers] == [[tenant] * 3 for tenant in tenants]


async def add_nested(db: SessionProxy[AsyncSession], *notes: str) -> None:
    """Write notes in a savepoint of the current unit."""
    async with db(propagation="nested"):
        db.session.add_all(Note(text=note) for note in notes)


async def test_savepoint(db: SessionProxy[AsyncSession], single: Bounced) -> None:
    """A savepoint is rolled back by itself, and the rest of the transaction is committed."""
    async with db(commit_on_exit=True) as unit:
        unit.session.add(Note(text="kept"))
        await unit.session.flush()
        async with unit.session.begin_nested() as savepoint:
            unit.session.add(Note(text="undone"))
            await unit.session.flush()
            await savepoint.rollback()
        with pytest.raises(DBAPIError, match="note_text_key"):
            await add_nested(db, "undone", "kept")
        await add_nested(db, "kept too")
    assert await single.notes() == ["kept", "kept too"]


async def test_rollback(client: AsyncClient, single: Bounced) -> None:
    """A request that fails leaves nothing, and the next one writes by the same server connection."""

    @single.app.get("/{status}")
    async def answer(status: int) -> None:
        single.db.session.add(Note(text=f"{status}"))
        await single.db.session.flush()
        if status >= 400:
            raise HTTPException(status)

    assert [(await client.get(path)).status_code for path in ("/409", "/200")] == [409, 200]
    assert await single.notes() == ["200"]


async def test_statement_error(client: AsyncClient, single: Bounced) -> None:
    """A statement that the database refuses is an error of its own request alone."""

    @single.app.get("/{table}")
    async def count(table: str) -> object:
        await single.db.session.execute(text("SELECT 1"))
        return await single.db.session.scalar(text(f"SELECT count(*) FROM {table}"))

    answers = await asyncio.gather(*(client.get(path) for path in ["/nowhere", "/note"] * 10))
    assert [answer.status_code for answer in answers] == [500, 200] * 10


@survives_cancellation
async def test_cancelled_request(single: Bounced) -> None:
    """A request that is cancelled in a statement ends the statement, and the only server place is free."""

    @single.app.get("/waits")
    async def wait() -> None:
        single.db.session.add(Note(text="lost"))
        await single.db.session.flush()
        await single.db.session.execute(passing(single.gate))

    async with asgi_client(single.app) as client, closed(single.gate):
        request = asyncio.create_task(client.get("/waits"))
        await single.gate.reached()
        request.cancel()
        with pytest.raises(asyncio.CancelledError, match=r"^$"):
            await request
        await single.write("next")
        await single.nobody_waits()
    assert await single.notes() == ["next"]


@survives_cancellation
async def test_client_leaves(single: Bounced) -> None:
    """A client that leaves a stream in a statement frees its place among the servers; its tail is lost."""

    @single.app.get("/")
    async def stream() -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            yield b"first"
            single.db.session.add(Note(text="tail"))
            await single.db.session.flush()
            # Else the abandoned process finds out when the statement has ended, also without PgBouncer.
            await single.db.session.execute(text("SET LOCAL client_connection_check_interval = 10"))
            await single.db.session.execute(passing(single.gate))
            yield b"last"

        single.db.session.add(Note(text="head"))
        return StreamingResponse(chunks())

    async with serve(single.app) as address, closed(single.gate):
        async with raw_get(address, "/") as response:
            await response.until(b"first")
            await single.gate.reached()
            response.cut()
        await single.write("next")
        await single.nobody_waits()
    assert await single.notes() == ["head", "next"]


async def test_statements_in_turn(db: SessionProxy[AsyncSession], single: Bounced) -> None:
    """Rows of a stream come whole though other statements, with types still unknown, run in between."""
    async with db(commit_on_exit=True) as unit:
        await unit.session.execute(text("CREATE TYPE mood AS ENUM ('good', 'bad')"))
        unit.session.add_all(Note(text=f"{number:03}") for number in range(200))
        await unit.session.flush()
        seen: list[str] = []
        async for note in await unit.session.stream_scalars(select(Note.text).order_by(Note.text)):
            seen.append(note)
            if len(seen) % 40 == 0:
                assert await unit.session.scalar(text("SELECT CAST(:mood AS mood)"), {"mood": "bad"}) == "bad"
        assert seen == [f"{number:03}" for number in range(200)]
    assert await single.notes() == seen


LEFT = {
    "setting": "SELECT current_setting('app.tenant', true) IS NOT DISTINCT FROM 'left'",
    "table": "SELECT to_regclass('pg_temp.scratch') IS NOT NULL",
    "lock": "SELECT count(*) = 1 FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory'",
    "cursor": "SELECT count(*) = 1 FROM pg_cursors WHERE name = 'mine'",
    "channel": "SELECT count(*) = 1 FROM pg_listening_channels()",
    "statement": "SELECT count(*) = 1 FROM pg_prepared_statements",
}
"""Whether a server connection still has what another transaction has made there."""


async def leaves(site: Bounced, made: str, found: str) -> bool:
    """Tell whether something is found by the unit after the one that has made it, and was not before."""
    assert await site.asked(found) is False
    async with site.db() as unit:
        await unit.session.execute(text(made))
        assert await unit.session.scalar(text(found)) is True
        await unit.commit()
    return bool(await site.asked(found))


@pytest.mark.parametrize(
    ("what", "made"),
    [
        ("setting", "SELECT set_config('app.tenant', 'left', true)"),
        ("table", "CREATE TEMPORARY TABLE scratch () ON COMMIT DROP"),
        ("lock", "SELECT pg_advisory_xact_lock(2)"),
        ("cursor", "DECLARE mine CURSOR FOR SELECT 1"),
    ],
)
async def test_transaction_state_is_gone(
    what: str, made: str, db: SessionProxy[AsyncSession], single: Bounced
) -> None:
    """What belongs to a transaction ends with it, and is found by nobody."""
    assert not await leaves(single, made, LEFT[what])


@pytest.mark.parametrize(
    ("what", "made"),
    [
        ("setting", "SET app.tenant = 'left'"),
        ("table", "CREATE TEMPORARY TABLE scratch ()"),
        ("lock", "SELECT pg_advisory_lock(2)"),
        ("cursor", "DECLARE mine CURSOR WITH HOLD FOR SELECT 1"),
        ("statement", "PREPARE mine AS SELECT 1"),
    ],
)
async def test_session_state_is_left(
    what: str, made: str, db: SessionProxy[AsyncSession], single: Bounced
) -> None:
    """What belongs to a session outlives the unit and is found by another, as the documentation warns."""
    assert await leaves(single, made, LEFT[what])


async def test_listener_is_left(db: SessionProxy[AsyncSession], single: Bounced) -> None:
    """LISTEN takes effect when it is committed, for whoever has the server connection then."""
    async with db(commit_on_exit=True) as unit:
        await unit.session.execute(text("LISTEN news"))
    assert await single.asked(LEFT["channel"]) is True


@pytest.mark.parametrize("engine_args", ENGINE_ARGS)
async def test_no_prepared_statement_is_left(
    engine_args: Make, bounce: Bounce, postgresql_url: str, judge_for: JudgeFor
) -> None:
    """However many transactions a server connection has served, it keeps no statement of theirs."""
    url = bounce(default_pool_size=1)
    async with bounced(url, postgresql_url, judge_for, engine_args()) as site:
        for _ in range(2):  # engines of two processes, whose statements might have the same names
            async with site.db.connect(url, engine_args=engine_args()) as db:
                for number in range(10):
                    async with db(commit_on_exit=True) as unit:
                        unit.session.add(Note(text=f"{uuid4()}"))
                        await unit.session.scalar(select(Note.id).where(Note.id == number))
                assert await site.asked("SELECT count(*) FROM pg_prepared_statements") == 0
        assert len(await site.notes()) == 20


async def test_wait_ends(bounce: Bounce, postgresql_url: str, judge_for: JudgeFor) -> None:
    """Who waits in PgBouncer for longer than query_wait_timeout gets an error, and the next one is served."""
    url = bounce(default_pool_size=1)
    other = create_async_engine(url, **unpooled())
    async with (
        bounced(url, postgresql_url, judge_for, pooled()) as site,
        site.db.connect(url, engine_args=pooled()),
    ):
        assert await site.asked("SELECT 1") == 1
        async with other.begin() as holder:
            await holder.execute(text("SELECT 1"))
            await tell(url, "SET query_wait_timeout = 1")  # now only: to log in at the server is a wait, too
            # asyncpg 0.29 does not tell the reason
            with pytest.raises(DBAPIError, match=r"query_wait_timeout|connection was closed in the middle"):
                await site.asked("SELECT 1")
            await tell(url, "SET query_wait_timeout = 30")
        assert await site.asked("SELECT 1") == 1


def test_error_tells_why(bounce: Bounce) -> None:
    """A PgBouncer that does not start is an error that shows what it has said."""
    with pytest.raises(PgBouncerError, match=r"does not start: .*pool_mode"):
        bounce(pool_mode="wrong")
