"""Engines that a session comes to by itself: what is promised of the bound one holds for each of them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any, cast

import pytest
from sqlalchemy import Connection, delete, event, func, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_async_sqlalchemy import (
    ConfigurationError,
    PartialCommitError,
    PoolTimeoutError,
    UnexpectedRollbackError,
    UnitOfWork,
    atomic,
    create_middleware_and_session_proxy,
)
from tests.support.databases import JudgeFor
from tests.support.engines import WAYS, Routed, Way, open_routed
from tests.support.hooks import Log
from tests.support.settings import REFUSED_BY_DATABASE
from tests.support.site import complaints
from tests.support.tables import Note, Reply, engine_with_tables
from tests.support.versions import require_settings_of_derived_engines

TEA = insert(Note).values(text="tea")
TEXTS = select(Note.text)
LEVEL = select(func.coalesce(func.max(Note.text), func.current_setting("transaction_isolation")))
"""A statement that a mapper routes, whose answer is the isolation level as long as there is no note."""
GIVEN_UP = "a statement in it failed and the database has aborted the transaction"
Unit = UnitOfWork[AsyncSession]
UNBOUND = sorted(WAYS.keys() - {"binds"})
"""The ways that `atomic()` learns of when the session comes to the engine."""

each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@pytest.fixture
def log() -> Log:
    """An empty log."""
    return Log()


@pytest.fixture
async def routed(way: Way, postgresql_url: str, judge_for: JudgeFor) -> AsyncIterator[Routed]:
    """A session that comes to a second engine, on the same PostgreSQL."""
    async with open_routed(way, (postgresql_url, postgresql_url), judge_for) as routed:
        yield routed


@each_way
async def test_error_that_is_swallowed(routed: Routed, log: Log) -> None:
    """COMMIT would be a silent ROLLBACK there, too: it is refused, and the hooks are told of a rollback."""

    async def work() -> None:
        async with routed.db(commit_on_exit=True) as unit:
            log.both(unit)
            await routed.send(TEA)
            with suppress(IntegrityError):
                await routed.send(TEA)

    for _ in range(2):  # the second time the engine is known
        with pytest.raises(UnexpectedRollbackError, match=GIVEN_UP) as raised:
            await work()
        assert isinstance(raised.value.__cause__, IntegrityError)
        assert log == ["rolled back"]
        assert await routed.notes() == []
        assert routed.out() == [0, 0]
        log.clear()


@each_way
async def test_first_statement_fails(routed: Routed) -> None:
    """So it is where the engine's very first statement fails, and what was written is at the bound engine."""

    async def work() -> None:
        async with routed.db(commit_on_exit=True) as unit:
            await unit.session.execute(
                text("INSERT INTO note (text) VALUES ('own')"),
                bind_arguments={"bind": routed.own.sync_engine},
            )
            with suppress(DBAPIError):
                await routed.send(select(func.nothing(Note.text)))

    with pytest.raises(UnexpectedRollbackError, match=GIVEN_UP):
        await work()
    assert await routed.notes() == []


@each_way
async def test_commit(routed: Routed, log: Log) -> None:
    """What is written there is committed with the unit, and the hooks run by that."""
    async with routed.db(commit_on_exit=True) as unit:
        log.both(unit)
        await routed.send(TEA)
    assert log == ["committed"]
    assert await routed.notes() == ["tea"]


@each_way
async def test_error_in_a_savepoint(routed: Routed) -> None:
    """An error that a savepoint undoes there leaves the rest to be committed."""
    async with routed.db(commit_on_exit=True) as unit:
        await routed.send(TEA)
        with suppress(IntegrityError):
            async with unit.savepoint():
                await routed.send(TEA)
    assert await routed.notes() == ["tea"]


@each_way
async def test_discarded_writes(routed: Routed, caplog: pytest.LogCaptureFixture) -> None:
    """What nobody commits there is warned of."""
    async with routed.db():
        await routed.send(TEA)
        await routed.send(delete(Note))
    (told,) = complaints(caplog)
    assert "2 statements and 0 unflushed objects are rolled back" in told
    async with routed.db():
        await routed.send(TEXTS)
    assert len(complaints(caplog)) == 1


@each_way
async def test_commit_that_is_cut(routed: Routed, log: Log, caplog: pytest.LogCaptureFixture) -> None:
    """A COMMIT there whose connection breaks has an unknown outcome: that is logged, and no hook runs."""

    def cut(connection: Any) -> None:
        connection.connection.dbapi_connection.run_async(terminate)

    async def terminate(driver: Any) -> None:
        driver.terminate()

    async def work() -> None:
        async with routed.db(commit_on_exit=True) as unit:
            log.both(unit)
            await routed.send(TEA)

    event.listen(routed.other.sync_engine, "commit", cut)
    with pytest.raises(DBAPIError):
        await work()
    (told,) = complaints(caplog)
    assert told.startswith("ERROR: COMMIT on AsyncSession (")
    assert "its outcome is unknown, no hook runs and the connection is discarded" in told
    assert log == []


@pytest.mark.parametrize("options", [{}, {"pool_timeout": 0.2}], ids=["pool's", "unit's"])
@each_way
async def test_no_connection_in_time(
    way: Way, postgresql_url: str, judge_for: JudgeFor, options: dict[str, Any]
) -> None:
    """A pool there that has no connection in time is a `PoolTimeoutError`, with that pool's figures."""
    urls = postgresql_url, postgresql_url
    waiting = 30 if options else 0.2
    async with open_routed(way, urls, judge_for, pool_size=1, max_overflow=0, pool_timeout=waiting) as routed:
        async with routed.other.connect():
            with pytest.raises(PoolTimeoutError, match=r"within 0\.2 seconds \(1 of 1 are") as raised:
                async with routed.db(**options):
                    await routed.send(TEXTS)
        assert raised.value.pool_status.capacity == 1
        async with routed.db(**options):
            assert (await routed.send(TEXTS)).all() == []


@each_way
async def test_isolation_level(routed: Routed) -> None:
    """A unit's isolation level is that of its transactions there, and of no later one."""
    if routed.way is WAYS["derived"]:
        require_settings_of_derived_engines()
    async with routed.db(isolation_level="SERIALIZABLE") as unit:
        for _ in range(2):
            assert (await routed.send(LEVEL)).scalar_one() == "serializable"
            await unit.rollback()
    async with routed.db():
        assert (await routed.send(LEVEL)).scalar_one() == "read committed"


@each_way
async def test_read_only(routed: Routed) -> None:
    """A read-only unit writes nothing there, and the next one does."""
    if routed.way is WAYS["derived"]:
        require_settings_of_derived_engines()
    with pytest.raises(DBAPIError, match=REFUSED_BY_DATABASE):
        async with routed.db(read_only=True, commit_on_exit=True):
            await routed.send(TEA)
    async with routed.db(commit_on_exit=True):
        await routed.send(TEA)
    assert await routed.notes() == ["tea"]


@each_way
async def test_settings_with_limits(routed: Routed) -> None:
    """Settings and limits hold there at the same time."""
    if routed.way is WAYS["derived"]:
        require_settings_of_derived_engines()
    async with routed.db(isolation_level="SERIALIZABLE", pool_timeout=5):
        assert (await routed.send(LEVEL)).scalar_one() == "serializable"
    async with routed.db(multi_sessions=True, max_concurrent=1, isolation_level="REPEATABLE READ"):
        assert (await routed.send(LEVEL)).scalar_one() == "repeatable read"


@pytest.mark.parametrize("way", [WAYS[name] for name in UNBOUND], ids=UNBOUND)
async def test_atomic(routed: Routed, psycopg_url: str) -> None:
    """A unit of `atomic()` refuses a second engine before anything is sent to it."""
    sent: list[str] = []
    event.listen(routed.other.sync_engine, "before_cursor_execute", lambda *given: sent.append(given[2]))
    _, peer = create_middleware_and_session_proxy(AsyncSession)
    async with engine_with_tables(psycopg_url) as engine:
        peer.bind(engine)
        with pytest.raises(ConfigurationError, match=r"atomic\(\) may use the engine of its pair alone"):
            async with atomic(routed.db, peer):
                await routed.send(TEA)
    assert sent == []
    assert await routed.notes() == []


@pytest.mark.parametrize("settings", [{"read_only": True}, {"isolation_level": "SERIALIZABLE"}])
@pytest.mark.parametrize("by", ["execute", "connection", "get_bind"])
async def test_connection_instead_of_an_engine(
    postgresql_url: str, judge_for: JudgeFor, by: str, settings: dict[str, Any]
) -> None:
    """Settings that cannot apply, because the transaction is somebody else's, are refused before all."""
    async with (
        open_routed(WAYS["derived"], (postgresql_url, postgresql_url), judge_for) as routed,
        routed.other.connect() as connection,
    ):
        given = {"bind": connection.sync_connection}

        async def send(session: AsyncSession) -> None:
            if by == "execute":
                await session.execute(TEA, bind_arguments=given)
            elif by == "connection":
                await session.connection(bind_arguments=given)
            else:
                session.sync_session.bind_mapper(Note, cast("Connection", connection.sync_connection))
                await session.execute(TEA)

        with pytest.raises(
            ConfigurationError, match=r"holds a connection, whose transactions are its owner.s"
        ):
            async with routed.db(**settings) as unit:
                await send(unit.session)
        assert not connection.in_transaction()
        async with routed.db(commit_on_exit=True) as unit:
            await send(unit.session)


@pytest.mark.parametrize(
    "way", [WAYS["get_bind"], WAYS["bind_arguments"]], ids=["get_bind", "bind_arguments"]
)
async def test_level_that_the_other_database_lacks(
    way: Way, postgresql_url: str, sqlite_url: str, judge_for: JudgeFor
) -> None:
    """A level that the other engine's database does not have is refused before anything is sent."""
    async with open_routed(way, (postgresql_url, sqlite_url), judge_for) as routed:
        with pytest.raises(ConfigurationError, match="isolation_level"):
            async with routed.db(isolation_level="REPEATABLE READ"):
                await routed.send(TEXTS)


@pytest.mark.parametrize("way", [WAYS["bind_arguments"]], ids=["bind_arguments"])
async def test_one_of_two_commits(routed: Routed, log: Log) -> None:
    """Where a COMMIT fails on one engine, no `on_commit` hook runs, and no connection is lost.

    SQLAlchemy commits the engines in no certain order.
    """

    async def work() -> None:
        async with routed.db(commit_on_exit=True) as unit:
            log.both(unit)
            unit.session.add(Reply(note_id=404))
            await unit.session.flush()
            await routed.send(TEA)

    with pytest.raises((IntegrityError, PartialCommitError)):
        await work()
    assert "committed" not in log
    assert routed.out() == [0, 0]


@each_way
async def test_tasks_in_turn(routed: Routed) -> None:
    """Many units that come to the other engine at the same time keep their own books."""

    async def write(note: str, *, fails: bool) -> None:
        await routed.send(insert(Note).values(text=note))
        if fails:
            with suppress(IntegrityError):
                await routed.send(insert(Note).values(text=note))

    results = await routed.db.gather(
        *(write(f"{number:02}", fails=number % 2 == 0) for number in range(10)),
        commit_on_exit=True,
        return_exceptions=True,
    )
    assert [type(result) for result in results[::2]] == [UnexpectedRollbackError] * 5
    assert results[1::2] == [None] * 5
    assert await routed.notes() == [f"{number:02}" for number in range(1, 10, 2)]
    await asyncio.sleep(0)
