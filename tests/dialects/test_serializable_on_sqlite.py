"""A SERIALIZABLE unit on SQLite: its reads agree, and its connection is whole afterwards."""

from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import event, func, select
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from fastapi_async_sqlalchemy import create_middleware_and_session_proxy
from tests.support.databases import JudgeFor
from tests.support.settings import (
    REFUSED_BY_DATABASE,
    BoomError,
    End,
    each_end,
    open_single,
    run,
    write,
    write_by_text,
)
from tests.support.site import Site
from tests.support.tables import Note, engine_with_tables


@pytest.fixture
async def single_sqlite(sqlite_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """A process without an application and with one connection, on an SQLite whose readers stop nobody."""
    async with open_single(sqlite_url, judge_for) as single:
        await single.judge.execute("PRAGMA journal_mode = WAL")
        yield single


async def in_transaction(engine: AsyncEngine) -> bool:
    """Ask Python's driver of SQLite whether the connection in the pool is in the middle of a transaction."""
    async with engine.connect() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        found: bool = driver.in_transaction
        return found


@pytest.mark.parametrize("settings", [{}, {"read_only": True}], ids=str)
async def test_serializable_on_sqlite(single_sqlite: Site, settings: dict[str, Any]) -> None:
    """Two reads of one transaction agree while others commit between them; the next transaction sees it."""
    single, count = single_sqlite, select(func.count()).select_from(Note)
    async with single.db(isolation_level="SERIALIZABLE", **settings) as unit:
        for number in range(3):
            assert await unit.session.scalar(count) == number
            await single.judge.execute("INSERT INTO note (text) VALUES (:text)", text=str(number))
            assert await unit.session.scalar(count) == number
            if settings:
                with pytest.raises(DBAPIError, match=REFUSED_BY_DATABASE):
                    await write_by_text(unit.session)
            await unit.commit()
    await write(single.db)
    assert await single.notes() == ["0", "1", "2", "written"]


async def test_plain_unit_on_sqlite(single_sqlite: Site) -> None:
    """The schedule is a real one: without an isolation level the second read sees what others committed."""
    count = select(func.count()).select_from(Note)
    async with single_sqlite.db() as unit:
        assert await unit.session.scalar(count) == 0
        await single_sqlite.judge.execute("INSERT INTO note (text) VALUES ('other')")
        assert await unit.session.scalar(count) == 1


@each_end
@pytest.mark.parametrize("settings", [{}, {"read_only": True}], ids=str)
async def test_connection_of_sqlite_is_whole_afterwards(
    single_sqlite: Site, end: End, settings: dict[str, Any]
) -> None:
    """However a SERIALIZABLE unit of SQLite ends, its connection is in no transaction, and writes again."""
    single, begun = single_sqlite, list[bool]()

    def note(connection: Any, *_: object) -> None:
        begun.append(connection.connection.driver_connection.in_transaction)

    event.listen(single.engine.sync_engine, "after_cursor_execute", note)
    await run(single, end, isolation_level="SERIALIZABLE", **settings)
    assert begun
    assert all(begun)
    assert not await in_transaction(single.engine)
    await write(single.db)
    assert await single.notes() == ["written"]


@pytest.mark.parametrize("way", ["the unit's", "the session's"])
async def test_serializable_unit_that_begins_with_a_savepoint(single_sqlite: Site, way: str) -> None:
    """A savepoint may be the first statement: it is undone alone, and the rest commits with the unit."""
    single = single_sqlite
    async with single.db(isolation_level="SERIALIZABLE", commit_on_exit=True) as unit:
        for note in ("kept", "lost"):
            savepoint = unit.savepoint() if way == "the unit's" else unit.session.begin_nested()
            with suppress(BoomError):
                async with savepoint:
                    unit.session.add(Note(text=note))
                    await unit.session.flush()
                    if note == "lost":
                        raise BoomError
            assert await single.notes() == []
    assert await single.notes() == ["kept"]
    assert not await in_transaction(single.engine)


@pytest.mark.parametrize("begin", ["BEGIN", "BEGIN IMMEDIATE"])
async def test_serializable_where_the_engine_begins_by_itself(sqlite_url: str, begin: str) -> None:
    """An engine that begins by a listener, as SQLAlchemy's documentation tells to, is served, too."""

    def listen(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    _, db = create_middleware_and_session_proxy(AsyncSession)
    async with engine_with_tables(sqlite_url, pool_size=1, max_overflow=0) as engine:
        event.listen(engine.sync_engine, "begin", listen)
        db.bind(engine)
        for note in "ab":
            async with db(isolation_level="SERIALIZABLE", commit_on_exit=True) as unit:
                await unit.session.scalar(select(Note.text))
                unit.session.add(Note(text=note))
        async with db() as unit:
            assert (await unit.session.scalars(select(Note.text).order_by(Note.text))).all() == ["a", "b"]
        db.unbind()
