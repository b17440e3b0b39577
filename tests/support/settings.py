"""A pool of one connection, what the database says of it, and the ways in which a unit ends."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import event, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from fastapi_async_sqlalchemy import SessionProxy, UnitOfWork, create_middleware_and_session_proxy
from tests.support.databases import JudgeFor
from tests.support.site import Site
from tests.support.tables import Note, engine_with_tables

REFUSED = r"^1 changed object of AsyncSession \(.+\) cannot be flushed in a read-only unit of work: write"
REFUSED_BY_DATABASE = r"(?i)read.?only"
LEVELS = {
    "postgresql": ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"],  # asyncpg's: it lacks the fourth
    "mariadb": ["READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"],
    "sqlite": ["READ UNCOMMITTED", "SERIALIZABLE"],
}
DEFAULT_LEVEL = {"postgresql": "READ COMMITTED", "mysql": "REPEATABLE READ", "sqlite": "SERIALIZABLE"}
OTHER_LEVEL = {"postgresql": "SERIALIZABLE", "mysql": "SERIALIZABLE", "sqlite": "READ UNCOMMITTED"}
LEVEL_AT_HAND = {
    "postgresql": "SHOW transaction_isolation",
    "mysql": "SHOW VARIABLES WHERE Variable_name IN ('tx_isolation', 'transaction_isolation')",
    "sqlite": "PRAGMA read_uncommitted",
}
SQLITE_LEVELS = {0: "SERIALIZABLE", 1: "READ UNCOMMITTED"}
NO_SERVER = {
    "postgresql": "postgresql+asyncpg://127.0.0.1:1/database",
    "mysql": "mysql+aiomysql://127.0.0.1:1/database",
    "sqlite": "sqlite+aiosqlite://",
}
"""Engines that never connect: what is refused at once needs no database."""
Unit = UnitOfWork[AsyncSession]
Proxy = SessionProxy[AsyncSession]


class BoomError(Exception):
    """The error of a test's own."""


@asynccontextmanager
async def open_single(url: str, judge_for: JudgeFor) -> AsyncGenerator[Site]:
    """Bind a fresh pair to a pool of one connection, which must be the same one all the time."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    async with engine_with_tables(url, pool_size=1, max_overflow=0, pool_timeout=10) as engine:
        made: list[object] = []

        def note(driver: object, record: object) -> None:
            made.append(driver)

        event.listen(engine.sync_engine, "connect", note)
        db.bind(engine)
        single = Site(FastAPI(), db, engine, await judge_for(url))
        yield single
        assert single.checked_out() == 0
        assert made == []
        db.unbind()


def bound_to(url: str) -> Proxy:
    """Return a proxy whose engine never connects."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    db.bind(create_async_engine(url))
    return db


async def write(db: Proxy, note: str = "written") -> None:
    """Write a note in an ordinary unit."""
    async with db(commit_on_exit=True):
        db.session.add(Note(text=note))


async def write_by_text(session: AsyncSession, **bind_arguments: Any) -> None:
    """Write by SQL of the caller's own."""
    await session.execute(text("INSERT INTO note (text) VALUES ('by text')"), bind_arguments=bind_arguments)


async def level_of(session: AsyncSession, **bind_arguments: Any) -> str:
    """Ask the database for the isolation level of the transaction at hand."""
    dialect = session.get_bind(**bind_arguments).dialect.name
    rows = await session.execute(text(LEVEL_AT_HAND[dialect]), bind_arguments=bind_arguments)
    value: object = rows.all()[0][-1]
    return SQLITE_LEVELS[value] if isinstance(value, int) else str(value).upper().replace("-", " ")


End = Callable[[Site, Unit], Awaitable[None]]
ENDS: dict[str, End] = {}


def an_end(end: End) -> End:
    """Note an end."""
    ENDS[end.__name__] = end
    return end


@an_end
async def well(single: Site, unit: Unit) -> None:
    """Return."""


@an_end
async def by_error(single: Site, unit: Unit) -> None:
    """Raise."""
    raise BoomError


@an_end
async def by_cancellation(single: Site, unit: Unit) -> None:
    """Be cancelled while waiting for something else than the database."""
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.Event().wait()


@an_end
async def by_commit(single: Site, unit: Unit) -> None:
    """Commit, and read on."""
    await unit.commit()
    assert single.checked_out() == 0
    await unit.session.scalar(select(Note.text))


@an_end
async def by_rollback(single: Site, unit: Unit) -> None:
    """Roll back, and read on."""
    await unit.rollback()
    assert single.checked_out() == 0
    await unit.session.scalar(select(Note.text))


@an_end
async def by_closing(single: Site, unit: Unit) -> None:
    """Close the session."""
    await unit.session.close()


@an_end
async def by_failed_statement(single: Site, unit: Unit) -> None:
    """Let an error of the database leave the block."""
    await unit.session.execute(text("SELECT nothing FROM nowhere"))


each_end = pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)


async def run(single: Site, end: End, **settings: Any) -> None:
    """Open a unit, read, and end it so, in a task that may fail."""

    async def work() -> None:
        async with single.db(**settings) as unit:
            await unit.session.scalar(select(Note.text))
            await end(single, unit)

    task = asyncio.create_task(work())
    await asyncio.wait([task])
    if end is by_cancellation:
        assert task.cancelled()
    elif end is by_error:
        assert isinstance(task.exception(), BoomError)
    elif end is by_failed_statement:
        assert isinstance(task.exception(), DBAPIError)
    else:
        await task
