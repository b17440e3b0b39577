"""How the transactions of a unit begin: read-only, their isolation level, and what stays of it afterwards."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, cast

import pytest
from fastapi import FastAPI
from sqlalchemy import AsyncAdaptedQueuePool, delete, event, func, insert, make_url, select, text, update
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.util import await_only

from fastapi_async_sqlalchemy import (
    ConfigurationError,
    ReadOnlyError,
    SessionProxy,
    UnitOfWork,
    create_middleware_and_session_proxy,
)
from tests.support.databases import JudgeFor
from tests.support.site import MakeSite, Site, complaints
from tests.support.tables import Note, engine_with_tables
from tests.support.worker import open_worker

REFUSED = r"^1 changed objects of AsyncSession \(.+\) cannot be flushed in a read-only unit of work: write"
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


@pytest.fixture
async def single(database_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """A process without an application and with one connection, on each of the three databases."""
    async with open_single(database_url, judge_for) as single:
        yield single


@pytest.fixture
async def single_postgresql(postgresql_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """A process without an application and with one connection, on PostgreSQL."""
    async with open_single(postgresql_url, judge_for) as single:
        yield single


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


def statements_of(engine: AsyncEngine) -> list[str]:
    """Return a list that all statements of an engine will be added to."""
    sent: list[str] = []

    def note(connection: object, cursor: object, statement: str, *rest: object) -> None:
        sent.append(statement)

    event.listen(engine.sync_engine, "before_cursor_execute", note)
    return sent


# How a unit ends.

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


# Read-only.


@pytest.mark.parametrize("commit_on_exit", [True, False])
async def test_read_only_unit_reads(
    single: Site, caplog: pytest.LogCaptureFixture, *, commit_on_exit: bool
) -> None:
    """A read-only unit reads what is committed, with or without a COMMIT at its end, and nothing is said."""
    await write(single.db)
    async with single.db(commit_on_exit=commit_on_exit, read_only=True) as unit:
        assert await unit.session.scalar(select(Note.text)) == "written"
        note = await unit.session.get(Note, 1)
    assert note is not None
    assert note.text == "written"
    assert complaints(caplog) == []


Change = Callable[[AsyncSession, Note], Awaitable[None]]


async def new(session: AsyncSession, note: Note) -> None:
    """Add an object."""
    session.add(Note(text="new"))


async def changed(session: AsyncSession, note: Note) -> None:
    """Change an object."""
    note.text = "changed"


async def deleted(session: AsyncSession, note: Note) -> None:
    """Delete an object."""
    await session.delete(note)


Flush = Callable[[Unit], Awaitable[object]]
FLUSHES: dict[str, Flush] = {
    "session.flush": lambda unit: unit.session.flush(),
    "session.commit": lambda unit: unit.session.commit(),
    "unit.commit": lambda unit: unit.commit(),
    "autoflush": lambda unit: unit.session.scalar(select(Note.text)),
    "savepoint": lambda unit: unit.savepoint().start(),
}


@pytest.mark.parametrize("flush", FLUSHES.values(), ids=FLUSHES)
@pytest.mark.parametrize("change", [new, changed, deleted])
async def test_changed_object_is_refused_before_any_sql(
    single: Site, change: Change, flush: Flush, caplog: pytest.LogCaptureFixture
) -> None:
    """A flush of a new, changed or deleted object raises, whatever asked for it, and sends nothing."""
    await write(single.db)
    sent = statements_of(single.engine)
    async with single.db(read_only=True) as unit:
        note = await unit.session.get_one(Note, 1)
        await change(unit.session, note)
        sent.clear()
        with pytest.raises(ReadOnlyError, match=REFUSED):
            await flush(unit)
        assert sent == []
    assert await single.notes() == ["written"]
    assert complaints(caplog) == []


async def test_new_object_takes_no_connection(single: Site) -> None:
    """A flush that is refused before the first statement has not even checked a connection out."""
    checkouts: list[object] = []
    event.listen(single.engine.sync_engine, "checkout", lambda *arguments: checkouts.append(arguments))
    async with single.db(read_only=True) as unit:
        unit.session.add(Note(text="new"))
        with pytest.raises(ReadOnlyError, match=REFUSED):
            await unit.session.flush()
        assert checkouts == []


async def test_changed_object_is_refused_at_the_end(single: Site) -> None:
    """The commit at the block's end raises as a flush inside it would."""

    async def leave() -> None:
        async with single.db(commit_on_exit=True, read_only=True) as unit:
            unit.session.add(Note(text="new"))

    with pytest.raises(ReadOnlyError, match=REFUSED):
        await leave()
    await write(single.db)
    assert await single.notes() == ["written"]


async def test_refused_objects_are_counted(single: Site) -> None:
    """The error says how many objects were changed in any way."""
    await write(single.db)
    await write(single.db, "second")
    async with single.db(read_only=True) as unit:
        first, second = (await unit.session.scalars(select(Note).order_by(Note.id))).all()
        first.text = "changed"
        await unit.session.delete(second)
        unit.session.add_all([Note(text="new"), Note(text="newer")])
        with pytest.raises(ReadOnlyError, match=r"^4 changed objects of "):
            await unit.session.flush()


async def test_expunged_object_is_refused_no_more(single: Site) -> None:
    """The remedy in the error works: after `expunge()` the unit goes on."""
    async with single.db(read_only=True) as unit:
        note = Note(text="new")
        unit.session.add(note)
        with pytest.raises(ReadOnlyError, match=r"or expunge\(\) what is not meant to be stored"):
            await unit.session.flush()
        unit.session.expunge(note)
        assert await unit.session.scalar(select(Note.text)) is None
        await unit.commit()


async def test_same_value_is_no_change(single: Site) -> None:
    """An attribute that is set to the value it has makes no change, so that nothing is refused."""
    await write(single.db)
    async with single.db(commit_on_exit=True, read_only=True) as unit:
        note = await unit.session.get_one(Note, 1)
        note.text = "written"
        assert note in unit.session.dirty
        await unit.session.flush()
        await unit.commit()
    assert await single.notes() == ["written"]


Write = Callable[[AsyncSession], Awaitable[object]]


async def through_the_connection(session: AsyncSession) -> None:
    """Write by the session's own connection."""
    await (await session.connection()).execute(insert(Note).values(text="new"))


async def inside_a_savepoint(session: AsyncSession) -> None:
    """Write inside a savepoint that begins the transaction."""
    async with session.begin_nested():
        await write_by_text(session)


async def after_commit(session: AsyncSession) -> None:
    """Write in the second transaction."""
    await session.scalar(select(Note.text))
    await session.commit()
    await write_by_text(session)


async def after_rollback(session: AsyncSession) -> None:
    """Write in the transaction after one that was rolled back."""
    await session.scalar(select(Note.text))
    await session.rollback()
    await write_by_text(session)


async def in_a_block_of_the_session(session: AsyncSession) -> None:
    """Write in a transaction begun by hand."""
    async with session.begin():
        await write_by_text(session)


WRITES: dict[str, Write] = {
    "text": write_by_text,
    "insert": lambda session: session.execute(insert(Note).values(text="new")),
    "bulk": lambda session: session.execute(insert(Note), [{"text": "new"}, {"text": "newer"}]),
    "update": lambda session: session.execute(update(Note).values(text="changed")),
    "delete": lambda session: session.execute(delete(Note)),
    "connection": through_the_connection,
    "savepoint": inside_a_savepoint,
    "after commit": after_commit,
    "after rollback": after_rollback,
    "session.begin": in_a_block_of_the_session,
}


@pytest.mark.parametrize("act", WRITES.values(), ids=WRITES)
async def test_sql_by_hand_is_refused_by_the_database(
    single: Site, act: Write, caplog: pytest.LogCaptureFixture
) -> None:
    """SQL that writes reaches the database, which refuses it; afterwards the same connection writes."""
    await write(single.db)
    async with single.db(read_only=True) as unit:
        with pytest.raises(DBAPIError, match=REFUSED_BY_DATABASE):
            await act(unit.session)
    await write(single.db, "afterwards")
    assert await single.notes() == ["afterwards", "written"]
    assert complaints(caplog) == []


async def test_sql_by_hand_is_refused_in_two_phases(mariadb_url: str, judge_for: JudgeFor) -> None:
    """A read-only unit that was asked for two-phase commit does not write: it is refused, here or there."""
    async with open_single(mariadb_url, judge_for) as single:

        async def insert_note() -> None:
            async with single.db({"twophase": True}, commit_on_exit=True, read_only=True) as unit:
                await write_by_text(unit.session)

        with pytest.raises((ConfigurationError, DBAPIError), match=r"(?i)read.?only"):
            await insert_note()
        assert await single.notes() == []


# Read-only on MariaDB, by each of its drivers: CREATE, DROP and TRUNCATE end a transaction there.


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


@each_end
async def test_same_connection_writes_afterwards(
    single: Site, end: End, caplog: pytest.LogCaptureFixture
) -> None:
    """However a read-only unit ends, the next unit writes by the very same connection."""
    await run(single, end, read_only=True)
    await write(single.db)
    assert await single.notes() == ["written"]
    assert complaints(caplog) == []


async def test_units_in_turn(single: Site) -> None:
    """Read-only and ordinary units take turns on one connection, and each has what it asked for."""
    for number in range(3):
        await write(single.db, str(number))
        async with single.db(read_only=True) as unit:
            assert len((await unit.session.scalars(select(Note))).all()) == number + 1
            with pytest.raises(DBAPIError, match=REFUSED_BY_DATABASE):
                await write_by_text(unit.session)
    assert await single.notes() == ["0", "1", "2"]


async def test_read_only_false_writes(single: Site) -> None:
    """`read_only=False` is an ordinary unit."""
    async with single.db(commit_on_exit=True, read_only=False) as unit:
        unit.session.add(Note(text="written"))
    assert await single.notes() == ["written"]


async def test_commit_of_a_read_only_unit_is_harmless(single: Site) -> None:
    """An explicit commit succeeds and runs the hooks as committed; with no statement before, too."""
    told: list[str] = []
    async with single.db(read_only=True) as unit:
        for name in ("empty", "read"):
            unit.on_commit(partial(told.append, f"{name} committed"))
            unit.on_rollback(partial(told.append, f"{name} rolled back"))
            if name == "read":
                await unit.session.scalar(select(Note.text))
            await unit.commit()
            assert single.checked_out() == 0
    assert told == ["empty committed", "read committed"]


@pytest.mark.parametrize(("end", "outcome"), [(well, "committed"), (by_error, "rolled back")])
async def test_hooks_of_a_read_only_unit(single: Site, end: End, outcome: str) -> None:
    """A read-only unit that commits at its end runs the hooks of its outcome."""
    told: list[str] = []

    async def with_hooks(site: Site, unit: Unit) -> None:
        unit.on_commit(lambda: told.append("committed"))
        unit.on_rollback(lambda: told.append("rolled back"))
        await end(site, unit)

    async def work() -> None:
        async with single.db(commit_on_exit=True, read_only=True) as unit:
            await unit.session.scalar(select(Note.text))
            await with_hooks(single, unit)

    await asyncio.wait([task := asyncio.create_task(work())])
    assert isinstance(task.exception(), BoomError if end is by_error else type(None))
    assert told == [outcome]


# Isolation levels.


each_level = pytest.mark.parametrize(
    ("database_url", "level"),
    [(database, level) for database, levels in LEVELS.items() for level in levels],
    indirect=["database_url"],
)


@each_level
async def test_isolation_level_holds_for_every_transaction(single: Site, level: Any) -> None:
    """Each transaction of the unit has the level that was asked for, and the next unit the default again."""
    async with single.db(isolation_level=level) as unit:
        assert await level_of(unit.session) == level
        await unit.commit()
        assert await level_of(unit.session) == level
        await unit.rollback()
        async with unit.savepoint():
            assert await level_of(unit.session) == level
    async with single.db() as unit:
        assert await level_of(unit.session) == DEFAULT_LEVEL[single.engine.dialect.name]


@each_level
async def test_isolation_level_of_a_unit_that_writes(single: Site, level: Any) -> None:
    """A unit with a level writes and commits as any other."""
    async with single.db(commit_on_exit=True, isolation_level=level) as unit:
        unit.session.add(Note(text="written"))
    assert await single.notes() == ["written"]


@each_end
async def test_isolation_level_is_restored(single: Site, end: End) -> None:
    """However a unit with a level ends, the same connection has the default for the next one."""
    dialect = single.engine.dialect.name
    await run(single, end, isolation_level=OTHER_LEVEL[dialect])
    async with single.db() as unit:
        assert await level_of(unit.session) == DEFAULT_LEVEL[dialect]


@pytest.mark.parametrize(
    ("level", "seen"), [("READ COMMITTED", ["before", "after"]), ("REPEATABLE READ", ["before"])]
)
async def test_isolation_level_is_set_before_the_transaction(
    locking_url: str, judge_for: JudgeFor, level: Any, seen: list[str]
) -> None:
    """The database keeps to the level from the first statement on: what others commit is seen, or is not."""
    async with open_single(locking_url, judge_for) as single:
        await write(single.db, "before")
        async with single.db(isolation_level=level) as unit:
            assert await unit.session.scalar(select(Note.text)) == "before"
            await single.judge.execute("INSERT INTO note (text) VALUES ('after')")
            assert (await unit.session.scalars(select(Note.text).order_by(Note.id))).all() == seen


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


async def test_read_only_with_an_isolation_level(single: Site) -> None:
    """Both settings hold together, and neither stays."""
    dialect = single.engine.dialect.name
    settings: dict[str, Any] = {"read_only": True, "isolation_level": OTHER_LEVEL[dialect]}
    async with single.db(**settings) as unit:
        assert await level_of(unit.session) == OTHER_LEVEL[dialect]
        with pytest.raises(DBAPIError, match=REFUSED_BY_DATABASE):
            await write_by_text(unit.session)
    async with single.db(commit_on_exit=True) as unit:
        assert await level_of(unit.session) == DEFAULT_LEVEL[dialect]
        unit.session.add(Note(text="written"))
    assert await single.notes() == ["written"]


async def test_level_of_the_engine_is_restored(database_url: str) -> None:
    """An engine with a level of its own gets that one back, not the database's default."""
    dialect = make_url(database_url).get_backend_name()
    own, other = OTHER_LEVEL[dialect], DEFAULT_LEVEL[dialect]
    _, db = create_middleware_and_session_proxy(AsyncSession)
    async with engine_with_tables(database_url, pool_size=1, max_overflow=0, isolation_level=own) as engine:
        db.bind(engine)
        async with db(isolation_level=cast("Any", other)) as unit:
            assert await level_of(unit.session) == other
        async with db() as unit:
            assert await level_of(unit.session) == own


async def test_connection_that_breaks_after_commit_costs_nothing(
    mariadb_url: str, judge_for: JudgeFor
) -> None:
    """Where restoring the level fails, COMMIT did not, its hooks run, and the pool has its place back."""
    ran: list[str] = []
    async with open_worker(mariadb_url, judge_for) as single:

        def cut(_: object) -> None:
            await_only(single.judge.execute(f"KILL {connection}"))

        async with single.db(isolation_level="SERIALIZABLE", commit_on_exit=True) as unit:
            connection = await unit.session.scalar(text("SELECT CONNECTION_ID()"))
            unit.session.add(Note(text="written"))
            unit.on_commit(lambda: ran.append("commit"))
            unit.on_rollback(lambda: ran.append("rollback"))
            event.listen(unit.session.sync_session, "after_commit", cut)
        assert ran == ["commit"]
        assert single.checked_out() == 0
        async with single.db() as unit:
            assert await unit.session.scalar(text("SELECT CONNECTION_ID()")) != connection
            assert await level_of(unit.session) == DEFAULT_LEVEL["mysql"]
        assert await single.notes() == ["written"]


# Deferrable, PostgreSQL's alone.


async def test_deferrable(single_postgresql: Site) -> None:
    """A deferrable unit is so in each of its transactions, and the next unit is not."""
    names = ("transaction_deferrable", "transaction_read_only", "transaction_isolation")

    async def shown(unit: Unit) -> list[object]:
        return [await unit.session.scalar(text(f"SHOW {name}")) for name in names]

    db = single_postgresql.db
    async with db(read_only=True, isolation_level="SERIALIZABLE", deferrable=True) as unit:
        assert await shown(unit) == ["on", "on", "serializable"]
        await unit.commit()
        assert await shown(unit) == ["on", "on", "serializable"]
    async with db() as unit:
        assert await shown(unit) == ["off", "off", "read committed"]


@pytest.mark.parametrize("dialect", ["mysql", "sqlite"])
def test_deferrable_is_refused_elsewhere(dialect: str) -> None:
    """A database that cannot defer refuses when the unit is asked for; `deferrable=False` is no wish."""
    db = bound_to(NO_SERVER[dialect])
    with pytest.raises(ConfigurationError, match=rf"^deferrable is PostgreSQL's alone: .* {dialect}"):
        db(read_only=True, isolation_level="SERIALIZABLE", deferrable=True)
    db(deferrable=False)


# What is refused at once.


WRONG: dict[str, object] = {
    "a word": "yes",
    "one": 1,
    "a float": 3.0,
    "a list": ["SERIALIZABLE"],
    "a mapping": {},
    "bytes": b"",
}
WRONG_LEVELS: dict[str, object] = WRONG | {
    "no transaction": "AUTOCOMMIT",
    "small letters": "serializable",
    "a flag": True,
    "nothing": "",
}
WRONG_SETTINGS: list[tuple[str, object, str]] = [
    *(("isolation_level", WRONG_LEVELS[name], name) for name in WRONG_LEVELS),
    *(("read_only", WRONG[name], name) for name in WRONG),
    *(("deferrable", WRONG[name], name) for name in WRONG),
]
ADVICE = {"isolation_level": "must be one of READ UNCOMMITTED, READ COMMITTED, REPEATABLE READ, SERIALIZABLE"}
wrong = pytest.mark.parametrize(
    ("name", "value"),
    [pytest.param(name, value, id=f"{name}: {case}") for name, value, case in WRONG_SETTINGS],
)


@wrong
@pytest.mark.parametrize("dialect", NO_SERVER)
def test_wrong_setting_is_refused(dialect: str, name: str, value: Any) -> None:
    """A value that is none raises where it is given, by the parameter's name, on every database."""
    db = bound_to(NO_SERVER[dialect])
    wanted = ADVICE.get(name, "must be True or False")
    with pytest.raises(ConfigurationError, match=f"^{name} {wanted}, not "):
        db(**{name: value})


@wrong
def test_wrong_setting_of_a_function_is_refused(name: str, value: Any) -> None:
    """The decorator raises as `db(...)` does, before there is an engine."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    wanted = ADVICE.get(name, "must be True or False")
    with pytest.raises(ConfigurationError, match=f"^{name} {wanted}, not "):
        db.transactional(**{name: value})


LACKING = [("sqlite", "READ COMMITTED"), ("sqlite", "REPEATABLE READ"), ("postgresql", "READ UNCOMMITTED")]


@pytest.mark.parametrize(("dialect", "level"), LACKING)
def test_level_that_the_database_lacks_is_refused(dialect: str, level: Any) -> None:
    """A level that a database has not is refused when the unit is asked for, with those that may be given."""
    db = bound_to(NO_SERVER[dialect])
    message = rf"^{dialect} has no isolation_level '{level}': use one of "
    with pytest.raises(ConfigurationError, match=message) as error:
        db(isolation_level=level)
    for remedy in LEVELS[dialect]:
        assert remedy in str(error.value)
    assert "AUTOCOMMIT" not in str(error.value)


@pytest.mark.parametrize("given_by", ["isolation_level", "execution_options"])
@pytest.mark.parametrize("outer", ["AUTOCOMMIT", "another"])
async def test_level_of_a_unit_wins_over_its_engine(database_url: str, given_by: str, outer: str) -> None:
    """A unit has its level, and a transaction, whatever its engine has, however that was given."""
    dialect = make_url(database_url).get_backend_name()
    levels: dict[str, Any] = {
        "postgresql": "REPEATABLE READ",
        "mysql": "READ COMMITTED",
        "sqlite": "READ UNCOMMITTED",
    }
    level = outer if outer == "AUTOCOMMIT" else levels[dialect]
    options: Any = {"isolation_level": level}
    if given_by == "execution_options":
        options = {"execution_options": options}
    async with engine_with_tables(database_url) as engine:
        await engine.dispose()
    _, db = create_middleware_and_session_proxy(AsyncSession)
    async with db.connect(database_url, engine_args=options):
        for _ in range(2):  # the second one on the same connection
            async with db(isolation_level="SERIALIZABLE") as unit:
                assert await level_of(unit.session) == "SERIALIZABLE"
                await write_by_text(unit.session)
                await unit.rollback()
            async with db() as unit:
                assert await unit.session.scalar(select(Note.text)) is None
                if outer != "AUTOCOMMIT":
                    assert await level_of(unit.session) == level


@pytest.mark.parametrize("given_by", ["isolation_level", "execution_options"])
@pytest.mark.parametrize("settings", [{"read_only": True}, {"deferrable": True}])
def test_autocommit_has_no_transaction_to_be_read_only(given_by: str, settings: dict[str, Any]) -> None:
    """On AUTOCOMMIT PostgreSQL would let a read-only unit write: it is refused, with both remedies."""
    options: Any = {"isolation_level": "AUTOCOMMIT"}
    if given_by == "execution_options":
        options = {"execution_options": options}
    _, db = create_middleware_and_session_proxy(AsyncSession)
    db.bind(create_async_engine(NO_SERVER["postgresql"], **options))
    with pytest.raises(ConfigurationError, match="in AUTOCOMMIT: give isolation_level as well, or an engine"):
        db(**settings)
    db(**settings, isolation_level="SERIALIZABLE")


async def test_refused_unit_leaves_the_proxy_whole(single: Site) -> None:
    """After a refusal the same proxy opens a unit with right settings."""
    dialect = single.engine.dialect.name
    wrong_level: Any = "AUTOCOMMIT"
    right: Any = OTHER_LEVEL[dialect]
    with pytest.raises(ConfigurationError, match=r"^isolation_level must be one of"):
        single.db(isolation_level=wrong_level)
    async with single.db(isolation_level=right) as unit:
        assert await level_of(unit.session) == right


# With session arguments.


async def test_settings_with_session_args(single: Site) -> None:
    """Session arguments of the unit and its settings hold together."""
    async with single.db({"info": {"who": "me"}, "autoflush": False}, read_only=True) as unit:
        assert unit.session.info == {"who": "me"}
        with pytest.raises(DBAPIError, match=REFUSED_BY_DATABASE):
            await write_by_text(unit.session)
        await unit.rollback()
        unit.session.add(Note(text="new"))
        assert await unit.session.scalar(select(Note.text)) is None
        with pytest.raises(ReadOnlyError, match=REFUSED):
            await unit.session.flush()


@pytest.mark.parametrize("given_to", ["database", "unit"])
async def test_settings_reach_bound_engines(single: Site, database_url: str, given_to: str) -> None:
    """An engine of `binds` has the settings too, and its connection is as before when the unit has ended."""
    dialect = single.engine.dialect.name
    settings: dict[str, Any] = {"read_only": True, "isolation_level": OTHER_LEVEL[dialect]}
    async with engine_with_tables(database_url, pool_size=1, max_overflow=0) as other:
        bound: Any = {"binds": {Note: other}}
        if given_to == "database":
            single.db.unbind()
            single.db.bind(single.engine, session_args=bound)
        unit_args = bound if given_to == "unit" else None
        async with single.db(unit_args, **settings) as unit:
            assert await level_of(unit.session, mapper=Note) == OTHER_LEVEL[dialect]
            with pytest.raises(DBAPIError, match=REFUSED_BY_DATABASE):
                await write_by_text(unit.session, mapper=Note)
            assert single.checked_out() == 0
        async with single.db(unit_args, commit_on_exit=True) as unit:
            assert await level_of(unit.session, mapper=Note) == DEFAULT_LEVEL[dialect]
            unit.session.add(Note(text="written"))
        assert await single.notes() == ["written"]


async def test_bound_engine_that_lacks_the_level_is_refused(single_postgresql: Site) -> None:
    """Settings must suit every engine that the unit may use."""
    binds: Any = {Note: create_async_engine(NO_SERVER["sqlite"])}
    with pytest.raises(ConfigurationError, match=r"^sqlite has no isolation_level 'REPEATABLE READ'"):
        single_postgresql.db({"binds": binds}, isolation_level="REPEATABLE READ")


SETTINGS: list[dict[str, Any]] = [
    {"read_only": True},
    {"isolation_level": "SERIALIZABLE"},
    {"read_only": True, "isolation_level": "SERIALIZABLE"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=", ".join)
async def test_bound_connection_is_refused(single: Site, settings: dict[str, Any]) -> None:
    """A connection of `binds` is its owner's: a unit with settings refuses it, an ordinary one takes it."""
    async with single.engine.connect() as connection:
        bound: Any = {"binds": {Note: connection}}
        with pytest.raises(ConfigurationError, match=r"^session_args\['binds'\] holds a connection.*engine"):
            single.db(bound, **settings)
        async with single.db(bound) as unit:
            assert await unit.session.scalar(select(Note.text)) is None


# In a request, and around a function.


async def test_unit_with_settings_inside_a_request(make_site: MakeSite, database_url: str) -> None:
    """Inside a request a unit has its own settings; the request's own unit keeps the default, and writes."""
    site = await make_site(database_url, commit_on_exit=True)
    dialect = site.engine.dialect.name
    settings: dict[str, Any] = {"read_only": True, "isolation_level": OTHER_LEVEL[dialect]}

    @site.app.get("/")
    async def route() -> list[str]:
        seen = [await level_of(site.db.session)]
        async with site.db(**settings) as unit:
            seen.append(await level_of(site.db.session))
            unit.session.add(Note(text="refused"))
            with pytest.raises(ReadOnlyError, match=REFUSED):
                await unit.session.flush()
            unit.session.expunge_all()
            with pytest.raises(DBAPIError, match=REFUSED_BY_DATABASE):
                await write_by_text(unit.session)
        site.db.session.add(Note(text="written"))
        return [*seen, await level_of(site.db.session)]

    response = await site.get()
    default = DEFAULT_LEVEL[dialect]
    assert response.json() == [default, OTHER_LEVEL[dialect], default]
    assert await site.notes() == ["written"]


async def test_function_with_settings(single: Site) -> None:
    """A decorated function runs in a unit with the settings, and leaves the connection as it was."""
    dialect = single.engine.dialect.name
    level: Any = OTHER_LEVEL[dialect]

    @single.db.transactional(read_only=True, isolation_level=level)
    async def work() -> str:
        with pytest.raises(ReadOnlyError, match=REFUSED):
            await write_object()
        async with single.db.unit.savepoint():
            found = await level_of(single.db.session)
        with pytest.raises(DBAPIError, match=REFUSED_BY_DATABASE):
            async with single.db.unit.savepoint():
                await write_by_text(single.db.session)
        return found

    async def write_object() -> None:
        note = Note(text="new")
        single.db.session.add(note)
        try:
            await single.db.session.flush()
        finally:
            single.db.session.expunge(note)

    for number in range(2):
        assert await work() == level
        await write(single.db, str(number))
    assert await single.notes() == ["0", "1"]


async def test_function_is_decorated_before_there_is_an_engine(database_url: str) -> None:
    """A function that was decorated at import has its settings on whichever engine is bound when it runs."""
    _, db = create_middleware_and_session_proxy(AsyncSession)

    @db.transactional(read_only=True, isolation_level="SERIALIZABLE")
    async def work() -> str:
        level = await level_of(db.session)
        db.session.add(Note(text="new"))
        with pytest.raises(ReadOnlyError, match=REFUSED):
            await db.session.flush()
        db.session.expunge_all()
        return level

    pooled: Any = {"poolclass": AsyncAdaptedQueuePool, "pool_size": 1}
    async with engine_with_tables(database_url):
        for _ in range(2):
            async with db.connect(database_url, engine_args=pooled):
                assert await work() == "SERIALIZABLE"
                assert db.pool_status().checked_out == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"deferrable": True}, r"^deferrable is PostgreSQL's alone"),
        ({"isolation_level": "READ COMMITTED"}, r"^sqlite has no isolation_level 'READ COMMITTED'"),
    ],
    ids=["deferrable", "isolation_level"],
)
async def test_function_whose_database_lacks_a_setting(settings: dict[str, Any], message: str) -> None:
    """What only the engine can tell is refused when the function is called, before it runs."""
    db = bound_to(NO_SERVER["sqlite"])
    ran: list[str] = []

    @db.transactional(**settings)
    async def work() -> None:
        ran.append("ran")

    with pytest.raises(ConfigurationError, match=message):
        await work()
    assert ran == []
