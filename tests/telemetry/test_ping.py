"""`db.ping()`: whether the database answers, in time."""

from typing import Any

import pytest
from sqlalchemy import Connection, event, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_async_sqlalchemy import (
    ConfigurationError,
    PoolTimeoutError,
    SessionNotInitialisedError,
    create_middleware_and_session_proxy,
)
from tests.support.databases import JudgeFor
from tests.support.gate import closed, gate_of
from tests.support.observing import Recorder, open_observed
from tests.support.site import Site, checked_out
from tests.support.tables import Note
from tests.support.versions import survives_cancellation


async def test_database_that_answers(database_url: str, judge_for: JudgeFor) -> None:
    """A ping takes a connection and gives it back; it is no unit, and nobody is told of one."""
    recorder = Recorder()
    async with open_observed(database_url, judge_for, recorder) as site:
        site.db.on_open(lambda unit: pytest.fail("it is no unit"))
        await site.db.ping()
        await site.db.ping(timeout=30)
        assert site.checked_out() == 0
    assert recorder.moments == []


async def test_inside_a_unit(worker: Site) -> None:
    """A ping in the middle of a unit leaves its transaction alone."""
    async with worker.db(commit_on_exit=True) as unit:
        unit.session.add(Note(text="a"))
        await unit.session.flush()
        await worker.db.ping()
        assert worker.checked_out() == 1
    assert await worker.notes() == ["a"]


async def test_full_pool(sqlite_url: str, judge_for: JudgeFor) -> None:
    """Where no connection comes free in time, the error is the pool's."""
    async with open_observed(sqlite_url, judge_for, pool_size=1, max_overflow=0) as site, site.db() as unit:
        await unit.session.scalar(select(Note.text))
        with pytest.raises(PoolTimeoutError, match=r"no free connection within 0\.05 seconds") as raised:
            await site.db.ping(timeout=0.05)
        assert raised.value.timeout == 0.05


@survives_cancellation
async def test_database_that_is_silent(locking_url: str, judge_for: JudgeFor) -> None:
    """A server that lets a connection in and does not answer is late; the connection is not kept."""
    async with open_observed(locking_url, judge_for) as site:
        gate = gate_of(site.engine, site.judge)

        def wait(_: Connection, __: object, statement: str, values: Any, *rest: object) -> tuple[str, Any]:
            return (gate.statement if statement == "SELECT 1" else statement), values

        event.listen(site.engine.sync_engine, "before_cursor_execute", wait, retval=True)
        async with closed(gate):
            with pytest.raises(TimeoutError, match=r"did not answer within 0\.2 seconds") as raised:
                await site.db.ping(timeout=0.2)
            assert not isinstance(raised.value, PoolTimeoutError)
        await site.db.ping()
        assert site.checked_out() == 0


async def test_database_that_is_away(postgresql_url: str) -> None:
    """The driver's own error passes through, and no connection is out."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    with pytest.raises(SessionNotInitialisedError):
        await db.ping()
    async with db.connect(postgresql_url.replace("test_", "nowhere_")):
        with pytest.raises(Exception, match=r'"nowhere_.+" does not exist'):  # early SQLAlchemy wraps none
            await db.ping()
        assert checked_out(db.engine.pool) == 0
        for wrong in (0, -1, "1", None):
            with pytest.raises(ConfigurationError, match="timeout must be a finite number above 0"):
                await db.ping(timeout=wrong)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # that is the mistake


async def test_sqlmodel_does_not_warn(sqlite_url: str) -> None:
    """A session class that warns of `execute()` has nothing to warn of."""
    _, db = create_middleware_and_session_proxy()
    async with db.connect(sqlite_url):
        await db.ping()
        async with db() as unit:
            assert await unit.session.scalar(text("SELECT 1")) == 1
