"""Settings of a unit's transactions: wrong ones are refused, right ones reach every engine and function."""

from typing import Any

import pytest
from sqlalchemy import AsyncAdaptedQueuePool, make_url, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from fastapi_async_sqlalchemy import ConfigurationError, ReadOnlyError, create_middleware_and_session_proxy
from tests.support.settings import (
    DEFAULT_LEVEL,
    LEVELS,
    NO_SERVER,
    OTHER_LEVEL,
    REFUSED,
    REFUSED_BY_DATABASE,
    bound_to,
    level_of,
    write,
    write_by_text,
)
from tests.support.site import MakeSite, Site
from tests.support.tables import Note, engine_with_tables

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
@pytest.mark.parametrize("settings", [{"read_only": True}, {"read_only": True, "deferrable": True}])
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
