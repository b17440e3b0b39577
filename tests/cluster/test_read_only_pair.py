"""A pair made with `read_only=True`: whichever way a unit is opened, the database enforces it."""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias, assert_type, cast

import pytest
from fastapi import FastAPI
from sqlalchemy import event, insert, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.requests import Request

from fastapi_async_sqlalchemy import (
    ConfigurationError,
    ReadOnlyError,
    SessionProxy,
    create_middleware_and_session_proxy,
)
from tests.support.databases import JudgeFor
from tests.support.serving import asgi_client
from tests.support.tables import Note, create_tables, engine_with_tables

REFUSED = "(?i)read.?only|changed objects"
"""What each of the three databases says of a write in a transaction that only reads."""


class ReplicaSession(AsyncSession):
    """The session of a pair that only reads."""


Replica: TypeAlias = SessionProxy[ReplicaSession]
Work: TypeAlias = Callable[[ReplicaSession], Awaitable[None]]


async def flush(session: AsyncSession) -> None:
    """Try to write an object."""
    session.add(Note(text="refused"))
    await session.flush()


async def insert_by_sql(session: AsyncSession) -> None:
    """Try to write by a statement."""
    await session.execute(insert(Note).values(text="refused"))


@pytest.fixture
async def replica(database_url: str) -> AsyncIterator[Replica]:
    """A read-only pair on a database that takes writes from others; nothing was written in the end."""
    _, replica = create_middleware_and_session_proxy(ReplicaSession, read_only=True)
    async with engine_with_tables(database_url) as engine, replica.connect(engine):
        yield replica
        async with engine.connect() as connection:
            assert await connection.scalar(text("SELECT count(*) FROM note")) == 0


async def by_unit(replica: Replica, work: Work) -> None:
    """Work in an explicit unit."""
    async with replica(commit_on_exit=True) as unit:
        await work(unit.session)


async def by_joining(replica: Replica, work: Work) -> None:
    """Work in a block that joins another one, by a savepoint."""
    async with replica(commit_on_exit=True), replica(propagation="nested") as unit:
        await work(unit.session)


async def by_connection(replica: Replica, work: Work) -> None:
    """Work in a unit with its connection checked out."""
    async with replica.connection(commit_on_exit=True) as session:
        await work(session)


async def by_gather(replica: Replica, work: Work) -> None:
    """Work in a gathered coroutine's unit."""

    async def child() -> None:
        await work(replica.session)

    await replica.gather(child(), commit_on_exit=True)


async def by_task_units(replica: Replica, work: Work) -> None:
    """Work in a unit of a block of many."""
    async with replica(commit_on_exit=True, multi_sessions=True):
        await work(replica.session)


async def by_decorator(replica: Replica, work: Work) -> None:
    """Work in a decorated function's unit."""

    @replica.transactional
    async def function() -> None:
        await work(replica.session)

    await function()


async def by_session_args(replica: Replica, work: Work) -> None:
    """Work in a unit with session arguments of its own."""
    async with replica({"autoflush": False}, commit_on_exit=True) as unit:
        await work(unit.session)


async def by_isolation_level(replica: Replica, work: Work) -> None:
    """Work in a unit with another setting."""
    async with replica(commit_on_exit=True, isolation_level="SERIALIZABLE") as unit:
        await work(unit.session)


WAYS = [
    by_unit,
    by_joining,
    by_connection,
    by_gather,
    by_task_units,
    by_decorator,
    by_session_args,
    by_isolation_level,
]


@pytest.mark.parametrize("way", WAYS)
async def test_unit_only_reads(replica: Replica, way: Callable[[Replica, Work], Awaitable[None]]) -> None:
    """Objects are not flushed and the database refuses a statement, whichever way the unit is opened."""
    with pytest.raises(ReadOnlyError, match="1 changed object of"):
        await way(replica, flush)
    with pytest.raises(DBAPIError, match=REFUSED):
        await way(replica, insert_by_sql)


@asynccontextmanager
async def replica_site(database_url: str) -> AsyncGenerator[tuple[FastAPI, Replica]]:
    """Make an application on a read-only pair that is told to commit."""
    middleware, replica = create_middleware_and_session_proxy(ReplicaSession, read_only=True)
    async with engine_with_tables(database_url) as engine:
        app = FastAPI()
        app.add_middleware(cast("Any", middleware), custom_engine=engine, commit_on_exit=True)
        yield app, replica
        async with engine.connect() as connection:
            assert await connection.scalar(text("SELECT count(*) FROM note")) == 0


@pytest.mark.parametrize(("write", "error"), [(flush, ReadOnlyError), (insert_by_sql, DBAPIError)])
@pytest.mark.parametrize("injected", [False, True], ids=["proxy", "dependency"])
async def test_request_only_reads(
    database_url: str,
    write: Work,
    error: type[Exception],
    injected: bool,  # noqa: FBT001  # a parameter of the test
) -> None:
    """A request's own unit is read-only as well, and so is the session that a dependency gives."""
    async with replica_site(database_url) as (app, replica):

        @app.get("/")
        async def route(request: Request) -> None:
            session = await replica.dependency(request) if injected else replica.session
            assert isinstance(session, ReplicaSession)
            await session.execute(text("SELECT 1"))
            await write(session)

        async with asgi_client(app) as client:
            with pytest.raises(error, match=REFUSED):
                await client.get("/")


async def test_commit_at_the_response_is_refused(database_url: str) -> None:
    """What a request has added and not flushed makes its commit fail, not vanish."""
    async with replica_site(database_url) as (app, replica):

        @app.get("/")
        async def route() -> None:
            replica.session.add(Note(text="refused"))

        async with asgi_client(app) as client:
            with pytest.raises(ReadOnlyError, match="1 changed object of"):
                await client.get("/")


async def test_flush_is_refused_before_sql(replica: Replica) -> None:
    """Nothing is sent when a flush is refused: on a unit's first use there is not even a connection."""
    sent: list[str] = []

    @event.listens_for(replica.engine.sync_engine, "before_cursor_execute")
    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        sent.append(statement)

    checkouts: list[object] = []
    event.listen(replica.engine.pool, "checkout", lambda *_: checkouts.append(None))
    with pytest.raises(ReadOnlyError, match="1 changed object of"):
        await by_unit(replica, flush)
    assert (sent, checkouts) == ([], [])


async def test_flush_is_refused_before_the_server_sees_it(postgresql_url: str, judge_for: JudgeFor) -> None:
    """In the middle of a transaction, the server's view of the connection stays where it was."""
    _, replica = create_middleware_and_session_proxy(ReplicaSession, read_only=True)
    judge = await judge_for(postgresql_url)
    async with replica.connect(postgresql_url):
        await create_tables(replica.engine)
        async with replica() as unit:
            backend = await unit.session.scalar(text("SELECT pg_backend_pid()"))
            with pytest.raises(ReadOnlyError, match="1 changed object of"):
                await flush(unit.session)
            latest = "SELECT query FROM pg_stat_activity WHERE pid = :backend"
            assert await judge.scalar(latest, backend=backend) == "SELECT pg_backend_pid()"


async def test_pair_leaves_a_shared_engine_writable(database_url: str) -> None:
    """Another pair on the same engine writes, before and after the read-only one has had the connection."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    _, replica = create_middleware_and_session_proxy(ReplicaSession, read_only=True)
    async with (
        engine_with_tables(database_url, pool_size=1, max_overflow=0) as engine,
        db.connect(engine),
        replica.connect(engine),
    ):
        for number in range(2):
            async with db(commit_on_exit=True) as unit:
                unit.session.add(Note(text=f"{number}"))
            async with replica() as reading:
                assert await reading.session.scalar(text("SELECT count(*) FROM note")) == number + 1


def test_writing_cannot_be_asked_for() -> None:
    """A unit of such a pair that shall write is refused when it is asked for."""
    _, replica = create_middleware_and_session_proxy(ReplicaSession, read_only=True)
    assert_type(replica, SessionProxy[ReplicaSession])
    with pytest.raises(ConfigurationError, match="read_only=False was asked of a read-only pair"):
        replica(read_only=False)
    with pytest.raises(ConfigurationError, match="read_only=False was asked of a read-only pair"):
        replica.transactional(read_only=False)


def test_flag_is_a_bool() -> None:
    """A truthy string is a mistake, not a yes."""
    wrong: Any = "yes"
    with pytest.raises(ConfigurationError, match="read_only must be True or False, not 'yes'"):
        create_middleware_and_session_proxy(ReplicaSession, read_only=wrong)
