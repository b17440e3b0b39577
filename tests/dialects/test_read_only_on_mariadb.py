"""A read-only unit on MariaDB, by each of its drivers: CREATE, DROP and TRUNCATE end a transaction there."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import event, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_async_sqlalchemy import create_middleware_and_session_proxy
from tests.support.databases import JudgeFor
from tests.support.settings import End, each_end, open_single, run, write
from tests.support.site import Site
from tests.support.tables import Note

REFUSED_BY_MARIADB = r"\(1792, 'Cannot execute statement in a READ ONLY transaction'\)"
CHANGES_OF_SCHEMA = (
    *("CREATE TABLE other (id INTEGER)", "DROP TABLE note"),
    *("ALTER TABLE note ADD COLUMN more INTEGER", "TRUNCATE TABLE note"),
)
INSERT = "INSERT INTO note (text) VALUES ('by text')"
MARIADB_SETTINGS: list[dict[str, Any]] = [{}, {"isolation_level": "READ COMMITTED"}]


@pytest.fixture
async def single_mariadb(url_by_driver: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """A process without an application and with one connection, on MariaDB by either of its drivers."""
    async with open_single(url_by_driver, judge_for) as single:
        yield single


@pytest.mark.parametrize("settings", MARIADB_SETTINGS, ids=str)
@pytest.mark.parametrize("sql", CHANGES_OF_SCHEMA)
async def test_change_of_schema_is_refused(single_mariadb: Site, settings: dict[str, Any], sql: str) -> None:
    """Neither it nor the INSERT after it is done, be it the first statement of the unit or a later one."""
    single = single_mariadb
    await write(single.db)
    async with single.db(read_only=True, **settings) as unit:
        for end in (unit.commit, unit.rollback, unit.session.close):
            for statement in (sql, INSERT):
                with pytest.raises(DBAPIError, match=REFUSED_BY_MARIADB):
                    await unit.session.execute(text(statement))
            assert (await unit.session.scalars(select(Note.text))).all() == ["written"]
            with pytest.raises(DBAPIError, match=REFUSED_BY_MARIADB):
                await unit.session.execute(text(sql))
            await end()
    await write(single.db, "afterwards")
    assert await single.notes() == ["afterwards", "written"]
    assert await single.judge.rows("SHOW TABLES") == [("note",)]


@pytest.mark.parametrize("settings", MARIADB_SETTINGS, ids=str)
@each_end
async def test_schema_can_be_changed_afterwards(
    single_mariadb: Site, settings: dict[str, Any], end: End
) -> None:
    """However a read-only unit ends, the next unit of its connection changes what it likes."""
    single = single_mariadb
    await run(single, end, read_only=True, **settings)
    async with single.db(commit_on_exit=True) as unit:
        for sql in (CHANGES_OF_SCHEMA[0], INSERT):
            await unit.session.execute(text(sql))
    assert await single.notes() == ["by text"]
    assert await single.judge.scalar("SELECT count(*) FROM other") == 0


@each_end
async def test_connection_that_was_read_only_stays_so(single_mariadb: Site, end: End) -> None:
    """A session that the engine itself makes read-only does not write after a read-only unit, either."""
    single, made = single_mariadb, list[object]()

    def note(driver: object, record: object) -> None:
        made.append(driver)

    own: Any = {"init_command": "SET SESSION TRANSACTION READ ONLY"}
    _, db = create_middleware_and_session_proxy(AsyncSession)
    async with db.connect(single.engine.url, engine_args={"pool_size": 1, "connect_args": own}):
        event.listen(db.engine.sync_engine, "connect", note)
        await run(Site(FastAPI(), db, db.engine, single.judge), end, read_only=True)
        async with db() as unit:
            with pytest.raises(DBAPIError, match=REFUSED_BY_MARIADB):
                await unit.session.execute(text(INSERT))
    assert len(made) == 1
    assert await single.notes() == []
