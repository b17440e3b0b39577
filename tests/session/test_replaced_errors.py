"""Listeners of an engine that stand before the package's own: they replace errors, or execute statements."""

from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from sqlalchemy import Engine, ExceptionContext, event, insert, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_async_sqlalchemy import UnexpectedRollbackError, create_middleware_and_session_proxy
from tests.support.databases import JudgeFor
from tests.support.hooks import COMMITS, Act, Log, Unit, begin_block, die_in_commit, leave, listening
from tests.support.site import Site, complaints
from tests.support.tables import ORPHAN, Note, Reply, engine_with_tables
from tests.support.worker import open_worker

Statement = Callable[[AsyncSession], Awaitable[object]]


class OwnError(Exception):
    """An application's own error for that of a driver."""


def replace(context: ExceptionContext) -> None:
    """Raise the application's error, as SQLAlchemy's documentation of `handle_error` shows."""
    message = "ours"
    raise OwnError(message) from context.original_exception


async def by_session(session: AsyncSession) -> object:
    """Send a statement that fails by the session."""
    return await session.execute(text("INSERT INTO nowhere VALUES (1)"))


async def by_scalar(session: AsyncSession) -> object:
    """Send it by another method of the session."""
    return await session.scalar(text("INSERT INTO nowhere VALUES (1)"))


async def by_connection(session: AsyncSession) -> object:
    """Send it by the session's connection."""
    connection = await session.connection()
    return await connection.execute(text("INSERT INTO nowhere VALUES (1)"))


async def by_flush(session: AsyncSession) -> object:
    """Flush two objects of which one is refused, in a savepoint of SQLAlchemy's own."""
    async with session.begin_nested():
        session.add_all([Note(text="twice"), Note(text="twice")])
    return None


@contextmanager
def replacing(worker: Site, target: Any = None) -> Generator[None]:
    """Bind the worker's engine after a listener that replaces every error, on it or another target."""
    worker.db.unbind()
    with listening(target or worker.engine.sync_engine, "handle_error", replace):
        worker.db.bind(worker.engine)
        yield


def classes(worker: Site) -> dict[str, Any]:
    """Return where a listener stands before the package's own."""
    return {"engine": worker.engine.sync_engine, "class": Engine}


@pytest.mark.parametrize("statement", [by_session, by_scalar, by_connection])
@pytest.mark.parametrize("place", ["engine", "class"])
async def test_swallowed_error(
    driver_url: str, judge_for: JudgeFor, statement: Statement, place: str
) -> None:
    """A statement's error that was replaced and swallowed: COMMIT stores all of the rest, or is refused."""
    log = Log()
    async with open_worker(driver_url, judge_for) as worker:
        with replacing(worker, classes(worker)[place]):
            try:
                async with worker.db.begin() as unit:
                    log.both(unit)
                    await unit.session.execute(insert(Note).values(text="before"))
                    with suppress(OwnError):
                        await statement(unit.session)
                    log.append("swallowed")
            except UnexpectedRollbackError:
                log.append("refused")
        aborts = worker.engine.dialect.name == "postgresql"
        assert log == ["swallowed", *(["rolled back", "refused"] if aborts else ["committed"])]
        assert await worker.notes() == ([] if aborts else ["before"])


async def test_undone_by_a_savepoint(driver_url: str, judge_for: JudgeFor) -> None:
    """An error that a savepoint has undone forbids nothing, although it was replaced."""
    async with open_worker(driver_url, judge_for) as worker:
        with replacing(worker):
            async with worker.db.begin() as unit:
                await unit.session.execute(insert(Note).values(text="before"))
                with suppress(OwnError):
                    await by_flush(unit.session)
        assert await worker.notes() == ["before"]


@pytest.fixture(params=["mariadb_url", "asyncmy_url"])
def mysql_url(request: pytest.FixtureRequest) -> str:
    """An empty MariaDB database by each of two drivers."""
    url: str = request.getfixturevalue(request.param)
    return url


DEADLOCK = text("SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213, MESSAGE_TEXT = 'deadlock'")


async def test_deadlock(mysql_url: str, judge_for: JudgeFor) -> None:
    """A deadlock undoes MariaDB's whole transaction, so that nothing later is committed as if it were all."""

    async def work(unit: Unit) -> None:
        with suppress(OwnError):
            await unit.session.execute(DEADLOCK)
        unit.session.add(Note(text="later"))

    async with open_worker(mysql_url, judge_for) as worker:
        refused = pytest.raises(UnexpectedRollbackError, match="rolled it back after a conflict")
        with replacing(worker), refused:
            async with worker.db.begin() as unit:
                await work(unit)
        assert await worker.notes() == []


@pytest.mark.parametrize("act", COMMITS)
async def test_unknown_outcome(
    postgresql_url: str, judge_for: JudgeFor, act: Act, caplog: pytest.LogCaptureFixture
) -> None:
    """A connection that breaks in the middle of COMMIT leaves the outcome unknown, by whatever error."""
    log = Log()

    async def work(unit: Unit) -> None:
        log.both(unit)
        await act(unit)

    async with open_worker(postgresql_url, judge_for) as worker:
        await die_in_commit(worker.judge)
        with replacing(worker), pytest.raises(OwnError):
            async with worker.db.begin() as unit:
                await work(unit)
        assert log == []
        assert ["outcome is unknown" in one for one in complaints(caplog)] == [True]


@pytest.mark.parametrize("act", [leave, begin_block])
async def test_refused_commit(deferring_url: str, judge_for: JudgeFor, act: Act) -> None:
    """A COMMIT that the database refuses is a rollback, by whatever error."""
    log = Log()

    async def work(unit: Unit) -> None:
        log.both(unit)
        unit.session.add(Reply(**ORPHAN))
        await unit.session.flush()
        if act is leave:
            await act(unit)

    async with open_worker(deferring_url, judge_for) as worker:
        with replacing(worker), pytest.raises(OwnError):
            async with worker.db.begin() as unit:
                await work(unit)
        assert log == ["rolled back"]
        assert await worker.notes() == []


async def test_listener_that_executes(
    driver_url: str, judge_for: JudgeFor, caplog: pytest.LogCaptureFixture
) -> None:
    """Writes that a user's listener sends count: forgotten ones are named, and errors forbid COMMIT."""
    log = Log()
    _, db = create_middleware_and_session_proxy(AsyncSession)
    judge = await judge_for(driver_url)
    async with engine_with_tables(driver_url) as engine:

        def execute(cursor: Any, statement: str, values: Any, context: Any) -> bool:
            context.dialect.do_execute(cursor, statement, values, context)
            return True

        event.listen(engine.sync_engine, "do_execute", execute)
        async with db.connect(engine):
            async with db() as unit:
                log.both(unit)
                await unit.session.execute(insert(Note).values(text="forgotten"))
            assert log == ["rolled back"]
            assert len(complaints(caplog)) == 1
            with suppress(UnexpectedRollbackError):
                async with db.begin() as unit:
                    await unit.session.execute(insert(Note).values(text="kept"))
                    with suppress(DBAPIError):
                        await by_session(unit.session)
        aborts = engine.dialect.name == "postgresql"
        assert await judge.rows("SELECT text FROM note") == ([] if aborts else [("kept",)])
        assert not list(engine.sync_engine.dispatch.before_cursor_execute)
