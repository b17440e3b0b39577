"""No connection came free in time: what is raised then, what it says, and what the pool says of itself."""

import asyncio
import copy
import json
import pickle
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from attrs.exceptions import FrozenInstanceError
from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse, StreamingResponse
from sqlalchemy import AsyncAdaptedQueuePool, NullPool, StaticPool, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as SQLAlchemyTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from starlette.middleware import Middleware

from fastapi_async_sqlalchemy import (
    EngineArgs,
    FastAPIAsyncSQLAlchemyError,
    PoolStatus,
    PoolTimeoutError,
    SessionNotInitialisedError,
    SessionProxy,
    UnitOfWork,
    create_middleware_and_session_proxy,
)
from tests.support.databases import JudgeFor
from tests.support.interruption import Exchange
from tests.support.site import Site, checked_out
from tests.support.tables import Note, engine_with_tables
from tests.support.versions import survives_cancellation

TIMEOUT = 0.2
"""Seconds that a unit waits for a connection here."""
DRIVERS_TIMEOUT = 2
"""Seconds that a driver waits for each statement: also for those that must succeed on a busy machine."""
TIMED_OUT = r"^AsyncSession \(.+\) had no free connection within 0\.2 seconds \(1 of 1 are checked out\): "
LONELY = TIMED_OUT + "hold connections for a shorter time, or give engine_args a larger pool_size"
NESTED = (
    TIMED_OUT + r"this unit stands inside one that holds a connection itself, so end that one's transaction "
    r"first, or, in the same task, join it by propagation='required' or 'nested'\.\n"
)

UNREACHABLE = (
    r"^AsyncSession \(.+\) had no free connection within 0\.2 seconds \(0 of (5|no limit) are checked out\): "
    r"the pool has room, so look why the database does not let a new connection in\.\n"
)

Unit = UnitOfWork[AsyncSession]


@asynccontextmanager
async def open_tight(
    url: str, judge_for: JudgeFor, *, engine_args: Mapping[str, Any] | None = None, **options: Any
) -> AsyncGenerator[Site]:
    """Bind a fresh pair, and mount it, to a pool of one connection; on exit that is in the pool."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    pool_args = {"pool_size": 1, "max_overflow": 0, "pool_timeout": TIMEOUT, **(engine_args or {})}
    async with engine_with_tables(url, **pool_args) as engine:
        db.bind(engine)
        app = FastAPI(middleware=[Middleware(cast("Any", middleware), custom_engine=engine, **options)])
        tight = Site(app, db, engine, await judge_for(url))
        yield tight
        assert tight.checked_out() == 0


@pytest.fixture
async def tight(database_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """An application and a pool of one connection, on each of the three databases."""
    async with open_tight(database_url, judge_for, commit_on_exit=True) as tight:
        yield tight


@pytest.fixture
async def tight_postgresql(postgresql_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """An application and a pool of one connection, on PostgreSQL."""
    async with open_tight(postgresql_url, judge_for, commit_on_exit=True) as tight:
        yield tight


@asynccontextmanager
async def held(tight: Site) -> AsyncGenerator[None]:
    """Have a unit of another task hold the only connection."""
    inside, done = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        async with tight.db() as unit:
            await unit.session.scalar(select(1))
            inside.set()
            await done.wait()

    task = asyncio.create_task(hold())
    await inside.wait()
    assert tight.checked_out() == 1
    try:
        yield
    finally:
        done.set()
        await task


async def read(db: SessionProxy[AsyncSession], **options: Any) -> object:
    """Read in a unit of its own."""
    async with db(**options) as unit:
        return await unit.session.scalar(select(1))


async def read_current(db: SessionProxy[AsyncSession]) -> object:
    """Read in the current unit."""
    return await db.session.scalar(select(1))


async def assert_whole(tight: Site) -> None:
    """See that the connection is in the pool and serves the next unit."""
    assert tight.checked_out() == 0
    async with tight.db(commit_on_exit=True) as unit:
        await unit.session.execute(insert(Note).values(text="next"))
    assert await tight.notes() == ["next"]


def through_pickle(error: BaseException) -> BaseException:
    """Send an error to another process and back."""
    received: BaseException = pickle.loads(pickle.dumps(error))  # noqa: S301  # written here
    return received


# What is raised, and what it says.


async def test_two_tasks(tight: Site) -> None:
    """A unit that finds the pool empty raises, with the ordinary remedy, and the next one works."""
    async with held(tight):
        with pytest.raises(PoolTimeoutError, match=LONELY):
            await read(tight.db)
        assert tight.checked_out() == 1
    await assert_whole(tight)


async def test_unit_inside_another(tight: Site) -> None:
    """A unit that waits for the connection of the unit around it raises and says so, instead of hanging."""
    async with tight.db() as outer:
        await outer.session.scalar(select(1))
        with pytest.raises(PoolTimeoutError, match=NESTED):
            await read(tight.db)
        assert tight.db.unit is outer
        assert await outer.session.scalar(select(1)) == 1
    await assert_whole(tight)


@pytest.mark.parametrize("how", ["block", "gather", "connection"])
async def test_deadlock_with_oneself(database_url: str, how: str) -> None:
    """A wait for a connection that only this task's own units hold is refused at once, not after a minute."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    args = EngineArgs(pool_size=1, max_overflow=0, pool_timeout=60.0, poolclass=AsyncAdaptedQueuePool)

    async def wait() -> None:
        if how == "connection":
            async with db.connection():
                pass
        elif how == "gather":
            await db.gather(read_current(db))
        else:
            await read(db)

    async with asyncio.timeout(10), db.connect(database_url, engine_args=args), db() as outer:
        await outer.session.scalar(select(1))
        with pytest.raises(PoolTimeoutError, match=r"within 60 seconds .+ this unit stands inside one"):
            await wait()
        assert await outer.session.scalar(select(1)) == 1


async def test_unit_deep_inside_another(tight_postgresql: Site) -> None:
    """It is nested, too, where a unit stands between that holds nothing."""
    async with tight_postgresql.db() as outer, tight_postgresql.db():
        await outer.session.scalar(select(1))
        with pytest.raises(PoolTimeoutError, match=NESTED):
            await read(tight_postgresql.db)
    await assert_whole(tight_postgresql)


async def test_child_task_inside_a_unit(tight_postgresql: Site) -> None:
    """It is nested, too, where a child task opens the unit, for which the outer one waits."""
    async with tight_postgresql.db() as outer:
        await outer.session.scalar(select(1))
        with pytest.raises(PoolTimeoutError, match=NESTED):
            await asyncio.create_task(cast("Any", read(tight_postgresql.db)))
    await assert_whole(tight_postgresql)


async def test_gathered_inside_a_unit(tight_postgresql: Site) -> None:
    """It is nested, too, where `db.gather()` opens the unit, for which the caller waits while it holds."""
    db = tight_postgresql.db
    async with db() as outer:
        await outer.session.scalar(select(1))
        for found in await db.gather(read_current(db), read(db), return_exceptions=True):
            assert isinstance(found, PoolTimeoutError)
            assert re.search(NESTED, str(found))
        with pytest.raises(PoolTimeoutError, match=NESTED):
            await db.gather(read_current(db))
    await assert_whole(tight_postgresql)


@pytest.mark.parametrize("where", ["the block's task", "another task"])
@pytest.mark.parametrize("options", [{}, {"pool_timeout": TIMEOUT}, {"max_concurrent": 2}], ids=str)
async def test_tasks_inside_a_unit(tight_postgresql: Site, where: str, options: dict[str, Any]) -> None:
    """It is nested, too, where the unit is that of a task, and the one that holds is around them all."""
    db = tight_postgresql.db
    async with db() as outer:
        await outer.session.scalar(select(1))
        async with db(multi_sessions=True, **options):
            with pytest.raises(PoolTimeoutError, match=NESTED):
                await (
                    read_current(db) if where == "the block's task" else asyncio.create_task(read_current(db))
                )
    await assert_whole(tight_postgresql)


@pytest.mark.parametrize("end", ["never began", "commit", "rollback"])
async def test_unit_inside_one_that_holds_nothing(tight_postgresql: Site, end: str) -> None:
    """It is not nested where the unit around it has no connection, and only another task has."""
    async with tight_postgresql.db() as outer:
        if end != "never began":
            await outer.session.scalar(select(1))
            await (outer.commit() if end == "commit" else outer.rollback())
        async with held(tight_postgresql):
            with pytest.raises(PoolTimeoutError, match=LONELY):
                await read(tight_postgresql.db)
    await assert_whole(tight_postgresql)


async def test_remedies_of_a_nested_unit(tight: Site) -> None:
    """The remedies in the error work: join the outer unit, or end its transaction first."""
    async with tight.db() as outer:
        await outer.session.scalar(select(1))
        assert await read(tight.db, propagation="required") == 1
        assert await read(tight.db, propagation="nested") == 1
        await outer.commit()
        assert await read(tight.db) == 1
    await assert_whole(tight)


@pytest.mark.parametrize("options", [{"read_only": True}, {"isolation_level": "SERIALIZABLE"}], ids=str)
async def test_unit_with_settings(tight: Site, options: dict[str, Any]) -> None:
    """A unit with settings of its own waits for the same pool and raises alike."""
    async with held(tight):
        with pytest.raises(PoolTimeoutError, match=LONELY):
            await read(tight.db, **options)
    await assert_whole(tight)


async def test_decorated_function(tight_postgresql: Site) -> None:
    """A decorated function with a unit of its own raises as a block does."""

    @tight_postgresql.db.transactional(propagation="requires_new")
    async def work() -> object:
        return await tight_postgresql.db.session.scalar(select(1))

    async with tight_postgresql.db() as outer:
        await outer.session.scalar(select(1))
        with pytest.raises(PoolTimeoutError, match=NESTED):
            await work()
    await assert_whole(tight_postgresql)


async def test_error_is_a_timeout_with_facts(tight: Site) -> None:
    """The error is the builtin TimeoutError and carries seconds and the pool's state; its cause is kept."""
    async with held(tight):
        with pytest.raises(TimeoutError, match=LONELY) as raised:
            await read(tight.db)
        status = tight.db.pool_status()
    error = raised.value
    assert isinstance(error, PoolTimeoutError)
    assert isinstance(error, FastAPIAsyncSQLAlchemyError)
    assert error.timeout == TIMEOUT
    assert (type(error.retry_after), error.retry_after) == (int, 1)
    assert isinstance(error.pool_status, PoolStatus)
    assert error.pool_status["checked_out"] == 1
    assert dict(error.pool_status) == dict(status)
    assert isinstance(error.__cause__, SQLAlchemyTimeoutError)
    assert "QueuePool limit of size 1 overflow 0 reached" in str(error.__cause__)


@asynccontextmanager
async def mute_server() -> AsyncGenerator[int]:
    """Listen on a port of this machine, let everybody in, and never say a word."""
    callers: list[asyncio.StreamWriter] = []

    async def listen(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        callers.append(writer)

    async with await asyncio.start_server(listen, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
        for caller in callers:
            caller.close()


@pytest.mark.parametrize("driver", ["postgresql+asyncpg", "mysql+aiomysql", "mysql+asyncmy"])
@pytest.mark.parametrize("poolclass", [AsyncAdaptedQueuePool, NullPool])
@pytest.mark.parametrize(
    "options", [{}, {"multi_sessions": True, "max_concurrent": 1}], ids=["alone", "places"]
)
async def test_server_that_does_not_answer(driver: str, poolclass: Any, options: dict[str, Any]) -> None:
    """Where the pool has room the error says that it is the database which lets no connection in."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    size: dict[str, Any] = {} if poolclass is NullPool else {"pool_size": 5, "max_overflow": 0}
    engine_args: Any = {"poolclass": poolclass, **size}
    async with mute_server() as port:
        url = f"{driver}://user@127.0.0.1:{port}/database"
        async with (
            db.connect(url, engine_args=engine_args),
            db(pool_timeout=TIMEOUT, **options) as unit,
        ):
            for _ in range(2):
                with pytest.raises(PoolTimeoutError, match=UNREACHABLE) as raised:
                    await unit.session.scalar(select(1))
                status = raised.value.pool_status
                assert isinstance(status, PoolStatus)
                assert (status.pool_class, status.available) == (poolclass.__name__, size.get("pool_size"))
                await unit.rollback()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, through_pickle])
async def test_error_survives_a_copy(tight_postgresql: Site, duplicate: Callable[[Any], Any]) -> None:
    """An error that crosses a process arrives with its message and the pool's state."""
    async with held(tight_postgresql):
        with pytest.raises(PoolTimeoutError, match=LONELY) as raised:
            await read(tight_postgresql.db)
    error, double = raised.value, duplicate(raised.value)
    assert type(double) is PoolTimeoutError
    assert str(double) == str(error)
    assert (double.timeout, double.retry_after) == (error.timeout, error.retry_after)
    assert dict(double.pool_status) == dict(error.pool_status)


async def test_engine_of_binds(postgresql_url: str, sqlite_url: str, judge_for: JudgeFor) -> None:
    """With several engines the error tells of the pool that was waited for."""
    async with (
        open_tight(sqlite_url, judge_for) as tight,
        engine_with_tables(postgresql_url, pool_size=4, max_overflow=0, pool_timeout=30) as roomy,
    ):
        _, db = create_middleware_and_session_proxy(AsyncSession)
        db.bind(roomy, session_args={"binds": {Note: tight.engine}})
        async with held(tight), db() as unit:
            with pytest.raises(PoolTimeoutError, match=r"within 0\.2 seconds \(1 of 1 ") as raised:
                await unit.session.scalar(select(Note.text))
        assert (raised.value.timeout, raised.value.retry_after) == (TIMEOUT, 1)
        assert raised.value.pool_status["capacity"] == 1


async def test_connection_of_binds(postgresql_url: str, sqlite_url: str, judge_for: JudgeFor) -> None:
    """The unit's deadline is for the engine whose connection is asked for, and takes none of another's."""
    async with (
        open_tight(sqlite_url, judge_for, engine_args={"pool_timeout": 30}) as tight,
        engine_with_tables(postgresql_url) as roomy,
    ):
        _, db = create_middleware_and_session_proxy(AsyncSession)
        db.bind(roomy, session_args={"binds": {Note: tight.engine}})
        async with held(tight), db(pool_timeout=TIMEOUT) as unit:
            with pytest.raises(PoolTimeoutError, match=r"within 0\.2 seconds \(1 of 1 ") as raised:
                await unit.session.connection(bind_arguments={"mapper": Note})
            assert checked_out(roomy.pool) == 0
        assert raised.value.pool_status["capacity"] == 1


# Which operations raise it.

Act = Callable[[Unit, AsyncSession, Note], Any]


def commit_new(unit: Unit, session: AsyncSession, note: Note) -> Awaitable[None]:
    """Commit an object that nobody has flushed."""
    session.add(Note(text="lost"))
    return session.commit()


def commit_unit(unit: Unit, session: AsyncSession, note: Note) -> Awaitable[None]:
    """Commit an object that nobody has flushed, by the unit."""
    session.add(Note(text="lost"))
    return unit.commit()


def flush_new(unit: Unit, session: AsyncSession, note: Note) -> Awaitable[None]:
    """Flush an object."""
    session.add(Note(text="lost"))
    return session.flush()


async def begin_block(unit: Unit, session: AsyncSession, note: Note) -> None:
    """Commit by the end of a transaction begun by hand."""
    async with session.begin():
        session.add(Note(text="lost"))


async def savepoint(unit: Unit, session: AsyncSession, note: Note) -> None:
    """Read inside a savepoint that begins the transaction."""
    async with unit.savepoint():
        await session.scalar(select(1))


async def expired_attribute(unit: Unit, session: AsyncSession, note: Note) -> None:
    """Read an attribute that must be loaded."""
    session.expire(note)

    def load(_: Session) -> str:
        return note.text

    await session.run_sync(load)


ACTS: dict[str, Act] = {
    "execute": lambda unit, session, note: session.execute(select(1)),
    "execute insert": lambda unit, session, note: session.execute(insert(Note).values(text="lost")),
    "execute many": lambda unit, session, note: session.execute(insert(Note), [{"text": "lost"}]),
    "scalar": lambda unit, session, note: session.scalar(select(1)),
    "scalars": lambda unit, session, note: session.scalars(select(1)),
    "stream": lambda unit, session, note: session.stream(select(1)),
    "stream_scalars": lambda unit, session, note: session.stream_scalars(select(1)),
    "get": lambda unit, session, note: session.get(Note, 404),
    "refresh": lambda unit, session, note: session.refresh(note),
    "merge": lambda unit, session, note: session.merge(Note(id=404, text="lost")),
    "connection": lambda unit, session, note: session.connection(),
    "run_sync": lambda unit, session, note: session.run_sync(lambda sync: sync.execute(select(1))),
    "expired attribute": expired_attribute,
    "savepoint": savepoint,
    "flush": flush_new,
    "commit": commit_new,
    "unit.commit": commit_unit,
    "session.begin": begin_block,
}


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
async def test_operation_that_needs_a_connection(tight_postgresql: Site, act: Act) -> None:
    """Whatever first needs the connection raises; the session goes on when the connection is free."""
    tight = tight_postgresql
    async with tight.db(commit_on_exit=True) as unit:
        unit.session.add(Note(text="before"))
    async with tight.db() as unit:
        note = (await unit.session.scalars(select(Note))).one()
        await unit.commit()
        async with held(tight):
            with pytest.raises(PoolTimeoutError, match=LONELY):
                await act(unit, unit.session, note)
        await unit.rollback()
        assert await unit.session.scalar(select(Note.text)) == "before"
    assert tight.checked_out() == 0
    assert await tight.notes() == ["before"]


async def test_commit_at_the_end(tight: Site) -> None:
    """The commit at a block's end raises out of the block, and the unit is over."""
    units: list[Unit] = []

    async def write() -> None:
        async with tight.db(commit_on_exit=True) as unit:
            units.append(unit)
            unit.session.add(Note(text="lost"))

    async with held(tight):
        with pytest.raises(PoolTimeoutError, match=LONELY):
            await write()
    assert units[0].closed
    await assert_whole(tight)


async def test_hooks_of_a_unit_that_timed_out(tight_postgresql: Site) -> None:
    """A unit whose only statement timed out has not committed: its rollback hooks run."""
    told: list[str] = []

    async def work() -> None:
        async with tight_postgresql.db(commit_on_exit=True) as unit:
            unit.on_commit(lambda: told.append("committed"))
            unit.on_rollback(lambda: told.append("rolled back"))
            await unit.session.scalar(select(1))

    async with held(tight_postgresql):
        with pytest.raises(PoolTimeoutError, match=LONELY):
            await work()
    assert told == ["rolled back"]


# Requests.


@pytest.mark.parametrize("path", ["/read", "/commit", "/nested"])
@pytest.mark.parametrize("handled", [True, False])
async def test_request(tight: Site, path: str, *, handled: bool) -> None:
    """A request that gets no connection answers 500, or what a handler says; the next one works."""
    if handled:

        @tight.app.exception_handler(PoolTimeoutError)
        async def handle(request: Request, error: PoolTimeoutError) -> Response:
            headers = {"Retry-After": str(error.retry_after)}
            return PlainTextResponse("busy", status_code=503, headers=headers)

    @tight.app.get("/read")
    async def read_one() -> object:
        return await tight.db.session.scalar(select(1))

    @tight.app.get("/commit")
    async def commit_one() -> str:
        tight.db.session.add(Note(text="lost"))
        return "written"

    @tight.app.get("/nested")
    async def nested() -> object:
        return await read(tight.db)

    async with tight.client(raise_app_exceptions=False) as client:
        async with held(tight):
            answer = await client.get(path)
        assert answer.status_code == (503 if handled else 500)
        assert answer.headers.get("Retry-After") == ("1" if handled else None)
        assert tight.checked_out() == 0
        assert await tight.notes() == []
        assert (await client.get(path)).status_code == 200


async def test_request_waits_for_another(tight: Site) -> None:
    """Of two requests at once one gets the connection and commits, the other gives up and answers 500."""
    inside, done = asyncio.Event(), asyncio.Event()

    @tight.app.get("/first")
    async def first() -> None:
        tight.db.session.add(Note(text="first"))
        await tight.db.session.flush()
        inside.set()
        await done.wait()

    @tight.app.get("/second")
    async def second() -> None:
        tight.db.session.add(Note(text="second"))

    async with tight.client(raise_app_exceptions=False) as client:
        request = asyncio.create_task(client.get("/first"))
        await inside.wait()
        assert (await client.get("/second")).status_code == 500
        done.set()
        assert (await request).status_code == 200
        assert await tight.notes() == ["first"]
        assert (await client.get("/second")).status_code == 200
    assert await tight.notes() == ["first", "second"]


@pytest.mark.parametrize("handled", [True, False])
async def test_stream_that_cannot_commit(tight_postgresql: Site, *, handled: bool) -> None:
    """A stream whose commit finds no connection answers as any other response, and none of it is sent."""
    tight = tight_postgresql
    if handled:

        @tight.app.exception_handler(PoolTimeoutError)
        async def handle(request: Request, error: Exception) -> Response:
            return PlainTextResponse("busy", status_code=503)

    async def body() -> AsyncGenerator[str]:
        yield "written"

    @tight.app.get("/")
    async def route() -> Response:
        tight.db.session.add(Note(text="lost"))
        return StreamingResponse(body())

    exchange = Exchange("/")
    async with tight.client(), held(tight):
        if handled:
            await exchange.call(tight.app)
        else:
            with pytest.raises(PoolTimeoutError, match=LONELY):
                await exchange.call(tight.app)
    assert exchange.status == (503 if handled else 500)
    assert b"written" not in exchange.body
    await assert_whole(tight)


async def test_unit_inside_a_request(tight: Site) -> None:
    """A unit that a request opens while it holds the connection itself raises and says that it is nested."""

    @tight.app.get("/")
    async def route() -> None:
        await tight.db.session.scalar(select(1))
        await read(tight.db)

    with pytest.raises(PoolTimeoutError, match=NESTED):
        await tight.get()
    assert (await tight.get(raise_app_exceptions=False)).status_code == 500
    await assert_whole(tight)


# What is no timeout of the pool.


async def test_waiting_is_no_error(database_url: str, judge_for: JudgeFor) -> None:
    """A unit that waits for the connection and gets it in time notices nothing."""
    async with open_tight(database_url, judge_for, engine_args={"pool_timeout": 30}) as patient:
        async with held(patient):
            task = asyncio.create_task(cast("Any", read(patient.db)))
            await asyncio.sleep(0)
        assert await task == 1


@survives_cancellation
async def test_timeout_of_the_caller_s_own(tight: Site) -> None:
    """An `asyncio.timeout()` that ends inside the block leaves it as the TimeoutError that it is."""

    async def work() -> None:
        async with tight.db() as unit, asyncio.timeout(0):
            await unit.session.scalar(select(1))
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError, match=r"^$") as raised:
        await work()
    assert type(raised.value) is TimeoutError
    await assert_whole(tight)


async def test_timeout_of_the_caller_s_own_while_waiting(tight: Site) -> None:
    """An `asyncio.timeout()` that ends before the pool's is the caller's, and takes no connection along."""

    async def work() -> None:
        async with asyncio.timeout(TIMEOUT / 10):
            await read(tight.db)

    async with held(tight):
        with pytest.raises(TimeoutError, match=r"^$") as raised:
            await work()
    assert type(raised.value) is TimeoutError
    await assert_whole(tight)


@pytest.mark.parametrize(
    "error", [TimeoutError("mine"), SQLAlchemyTimeoutError("mine")], ids=["builtin", "SQLAlchemy"]
)
async def test_timeout_that_the_block_raises(tight_postgresql: Site, error: Exception) -> None:
    """A timeout error of the caller's own, whatever its class, leaves the block as it is."""

    async def work() -> None:
        async with tight_postgresql.db() as unit:
            await unit.session.scalar(select(1))
            raise error

    with pytest.raises(type(error), match=r"^mine$") as raised:
        await work()
    assert raised.value is error
    await assert_whole(tight_postgresql)


async def test_statement_timeout_of_the_database(tight_postgresql: Site) -> None:
    """A statement that the database cuts short is the database's error."""

    async def work() -> None:
        async with tight_postgresql.db() as unit:
            await unit.session.execute(text("SET LOCAL statement_timeout = '20ms'"))
            await unit.session.execute(text("SELECT pg_sleep(60)"))

    with pytest.raises(DBAPIError, match="canceling statement due to statement timeout"):
        await work()
    await assert_whole(tight_postgresql)


async def test_statement_timeout_of_the_driver(postgresql_url: str, judge_for: JudgeFor) -> None:
    """A statement that the driver gives up is no timeout of the pool."""
    engine_args = {"connect_args": {"command_timeout": DRIVERS_TIMEOUT}}
    async with open_tight(postgresql_url, judge_for, engine_args=engine_args) as tight:

        async def work() -> None:
            async with tight.db() as unit:
                await unit.session.execute(text("SELECT pg_sleep(60)"))

        with pytest.raises(Exception, match=r"^$|(?i:timeout)") as raised:
            await work()
        assert not isinstance(raised.value, PoolTimeoutError)
        await assert_whole(tight)


# What the pool says of itself.


NAMES = {
    *("pool_class", "size", "max_overflow", "capacity"),
    *("checked_in", "checked_out", "available", "saturation"),
}


async def test_status_of_a_queue(database_url: str, judge_for: JudgeFor) -> None:
    """The pool counts what is out, what is left and what lies in it, also beyond its size."""
    args = {"pool_size": 2, "max_overflow": 2}
    async with open_tight(database_url, judge_for, engine_args=args) as site:
        fixed = {"pool_class": "AsyncAdaptedQueuePool", "size": 2, "max_overflow": 2, "capacity": 4}

        def counted() -> list[object]:
            status = site.db.pool_status()
            assert {name: status[name] for name in fixed} == fixed
            return [status.checked_out, status.available, status.saturation, status.checked_in]

        seen = [counted()]
        async with site.db() as one, site.db() as two, site.db() as three:
            for unit in (one, two, three):
                await unit.session.scalar(select(1))
                seen.append(counted())
            await two.commit()
            seen.append(counted())
        assert seen == [[0, 4, 0.0, 1], [1, 3, 0.25, 0], [2, 2, 0.5, 0], [3, 1, 0.75, 0], [2, 2, 0.5, 1]]
        assert counted() == [0, 4, 0.0, 2]


@pytest.mark.parametrize(
    "engine_args", [{"pool_size": 0}, {"pool_size": 1, "max_overflow": -1}], ids=["size 0", "overflow -1"]
)
async def test_status_without_a_limit(sqlite_url: str, engine_args: dict[str, Any]) -> None:
    """A pool without a limit has neither a capacity nor anything that follows from it."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    arguments: Any = {"poolclass": AsyncAdaptedQueuePool, **engine_args}
    async with db.connect(sqlite_url, engine_args=arguments):
        async with db() as unit:
            await unit.session.scalar(select(1))
            status = db.pool_status()
        unlimited = (status.max_overflow, status.capacity, status.available, status.saturation)
        assert unlimited == (None, None, None, None)
        assert (status.size, status.checked_out) == (engine_args["pool_size"], 1)


@pytest.mark.parametrize("poolclass", [NullPool, StaticPool])
async def test_status_of_a_pool_that_does_not_count(sqlite_url: str, poolclass: Any) -> None:
    """A pool that does not count says its class and nothing else, whatever is out."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    async with db.connect(sqlite_url, engine_args={"poolclass": poolclass}), db() as unit:
        await unit.session.scalar(select(1))
        expected = dict.fromkeys(NAMES) | {"pool_class": poolclass.__name__}
        assert dict(db.pool_status()) == expected


def bound() -> SessionProxy[AsyncSession]:
    """Return a proxy whose engine never connects."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    db.bind(create_async_engine("postgresql+asyncpg://user:s3cret@127.0.0.1:1/database?password=s3cret2"))
    return db


def test_status_is_a_mapping() -> None:
    """The status is a mapping of its attributes, which can be sent as JSON."""
    status = bound().pool_status()
    assert isinstance(status, Mapping)
    assert set(status) == NAMES
    assert len(status) == len(NAMES)
    assert dict(status) == {name: getattr(status, name) for name in NAMES}
    assert status["size"] == status.size == 5
    assert status.get("nosuch") is None
    assert json.loads(json.dumps(dict(status)))["pool_class"] == "AsyncAdaptedQueuePool"


@pytest.mark.parametrize("name", ["nosuch", "get", "__class__", ""])
def test_status_has_no_other_keys(name: str) -> None:
    """What is no field is no key, even if it is an attribute."""
    status = bound().pool_status()
    assert name not in status
    with pytest.raises(KeyError, match=rf"^'{name}'$"):
        _ = status[name]


def test_status_cannot_be_changed() -> None:
    """The status is of one moment: it can be changed neither as an object nor as a mapping."""
    status: Any = bound().pool_status()
    with pytest.raises(FrozenInstanceError):  # its message is empty before attrs 23.2
        status.size = 1
    assert status.size == bound().pool_status().size
    with pytest.raises(TypeError, match="does not support item assignment"):
        status["size"] = 1
    assert not isinstance(status, MutableMapping)


async def test_status_is_of_one_moment(tight_postgresql: Site) -> None:
    """A status that was kept says what it said, while the pool goes on."""
    async with held(tight_postgresql):
        status = tight_postgresql.db.pool_status()
    assert status.checked_out == 1
    assert tight_postgresql.db.pool_status().checked_out == 0


async def test_status_shows_no_secret() -> None:
    """Neither the status nor anything in it shows the password."""
    status = bound().pool_status()
    assert "s3cret" not in f"{status!r} {status} {dict(status)}"
    assert repr(status).startswith("PoolStatus(pool_class='AsyncAdaptedQueuePool', size=5")


async def test_status_needs_an_engine(sqlite_url: str) -> None:
    """Before there is an engine, and after it is gone, the proxy says how to give one."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    for _ in range(2):
        with pytest.raises(SessionNotInitialisedError, match=r"no engine yet: .* `async with db\.connect\("):
            db.pool_status()
        async with db.connect(sqlite_url):
            assert db.pool_status().pool_class


async def test_connection_handed_out(tight_postgresql: Site) -> None:
    """A connection that the session has handed out counts as the unit's own."""
    async with tight_postgresql.db() as outer:
        connection = await outer.session.connection()
        assert isinstance(connection, AsyncConnection)
        assert tight_postgresql.db.pool_status().saturation == 1.0
        with pytest.raises(PoolTimeoutError, match=NESTED):
            await read(tight_postgresql.db)
