"""A unit's isolation level, and `deferrable`, hold for each of its transactions and for no later unit."""

from typing import Any, cast

import pytest
from sqlalchemy import event, make_url, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.util import await_only

from fastapi_async_sqlalchemy import ConfigurationError, UnitOfWork, create_middleware_and_session_proxy
from tests.support.databases import JudgeFor
from tests.support.settings import (
    DEFAULT_LEVEL,
    LEVELS,
    NO_SERVER,
    OTHER_LEVEL,
    REFUSED_BY_DATABASE,
    End,
    bound_to,
    each_end,
    level_of,
    open_single,
    run,
    write,
    write_by_text,
)
from tests.support.site import Site
from tests.support.tables import Note, engine_with_tables
from tests.support.worker import open_worker

Unit = UnitOfWork[AsyncSession]


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


async def test_restoring_the_level_commits_nothing(mariadb_url: str, judge_for: JudgeFor) -> None:
    """What a listener leaves open on the connection is rolled back, though MariaDB's level ends by COMMIT."""

    def write(driver: Any, *_: object) -> None:
        driver.cursor().execute("INSERT INTO note (text) VALUES ('left open')")

    async with open_single(mariadb_url, judge_for) as single:
        event.listen(single.engine.sync_engine.pool, "reset", write)
        async with single.db(isolation_level="SERIALIZABLE") as unit:
            assert await level_of(unit.session) == "SERIALIZABLE"
        event.remove(single.engine.sync_engine.pool, "reset", write)
        assert await single.notes() == []


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


SERIALIZABLE_ENGINES: list[dict[str, Any]] = [
    {"isolation_level": "SERIALIZABLE"},
    {"execution_options": {"isolation_level": "SERIALIZABLE"}},
    {"execution_options": {"isolation_level": "SERIALIZABLE", "postgresql_readonly": True}},
]
WITHOUT_EFFECT: list[dict[str, Any]] = [
    {},
    {"read_only": True},
    {"isolation_level": "SERIALIZABLE"},
    {"read_only": False, "isolation_level": "SERIALIZABLE"},
    {"read_only": True, "isolation_level": "REPEATABLE READ"},
]
NO_EFFECT = r"^PostgreSQL gives deferrable .*: give read_only=True and isolation_level='SERIALIZABLE' as well"


@pytest.mark.parametrize("settings", WITHOUT_EFFECT, ids=repr)
async def test_deferrable_without_effect_is_refused(settings: dict[str, Any]) -> None:
    """A unit that PostgreSQL would not defer is refused when it is asked for, or when a block cannot join."""
    db = bound_to(NO_SERVER["postgresql"])
    for block in (db, db.begin, db.per_task):
        with pytest.raises(ConfigurationError, match=NO_EFFECT):
            block(deferrable=True, **settings)

    @db.transactional(deferrable=True, **settings)
    async def work() -> None:
        pytest.fail("it ran")

    with pytest.raises(ConfigurationError, match=NO_EFFECT):
        await work()
    with pytest.raises(ConfigurationError, match=NO_EFFECT):
        await db(propagation="required", deferrable=True, **settings).__aenter__()


@pytest.mark.parametrize("engine_args", SERIALIZABLE_ENGINES, ids=repr)
async def test_deferrable_by_the_engine_and_the_pair(postgresql_url: str, engine_args: Any) -> None:
    """The level may be the engine's, and read-only the pair's or the engine's: together they defer."""
    reads = "postgresql_readonly" in engine_args.get("execution_options", {})
    _, db = create_middleware_and_session_proxy(AsyncSession, read_only=not reads)
    async with db.connect(postgresql_url, engine_args=engine_args), db(deferrable=True) as unit:
        for name in ("transaction_deferrable", "transaction_read_only"):
            assert await unit.session.scalar(text(f"SHOW {name}")) == "on"
        assert await level_of(unit.session) == "SERIALIZABLE"
        async with db(propagation="required", deferrable=True) as joined:
            assert joined is unit


async def test_deferrable_joins_a_unit_that_defers(single_postgresql: Site) -> None:
    """A joined block takes the level and read-only from its unit."""
    db = single_postgresql.db
    settings: dict[str, Any] = {"read_only": True, "isolation_level": "SERIALIZABLE"}
    async with (
        db(deferrable=True, **settings) as unit,
        db(propagation="required", deferrable=True) as joined,
    ):
        assert joined is unit
