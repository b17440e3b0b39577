"""Listeners to the engine's `connect` behave in a sandbox as they do where the application is deployed."""

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import FastAPI, Response
from sqlalchemy import AsyncAdaptedQueuePool, Engine, ForeignKey, event, insert, text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fastapi_async_sqlalchemy import SessionProxy, create_middleware_and_session_proxy
from fastapi_async_sqlalchemy.testing import SandboxedApp, SandboxError, sandbox
from tests.support.serving import asgi_client


class Base(DeclarativeBase):
    """The tables of these tests."""


class Parent(Base):
    """A row that others name."""

    __tablename__ = "parent"
    id: Mapped[int] = mapped_column(primary_key=True)


class Child(Base):
    """A row that names another one."""

    __tablename__ = "child"
    id: Mapped[int] = mapped_column(primary_key=True)
    parent: Mapped[int] = mapped_column(ForeignKey("parent.id"))


Listener = Callable[[Any, Any], None]
ORPHAN = insert(Child).values(id=1, parent=7)


def sends(*statements: str) -> Listener:
    """Return a listener that sends statements."""

    def send(connection: Any, _: object) -> None:
        cursor = connection.cursor()
        for statement in statements:
            cursor.execute(statement)
        cursor.close()

    return send


def twice(value: int) -> int:
    """Be a function of SQL."""
    return 2 * value


def backwards(a: str, b: str) -> int:
    """Be a collation."""
    return (a < b) - (a > b)


async def collate(driver: Any) -> None:
    """Add the collation to aiosqlite's connection, which has no public method for that."""
    await driver._execute(driver._conn.create_collation, "backwards", backwards)  # noqa: SLF001  # see above


def read_address(value: str) -> str:
    """Decode a PostgreSQL address."""
    return f"at {value}"


async def read_addresses(driver: Any) -> None:
    """Add a codec to asyncpg's connection."""
    await driver.set_type_codec("macaddr", schema="pg_catalog", encoder=str, decoder=read_address)


FOREIGN_KEYS = sends("PRAGMA foreign_keys = ON")


@asynccontextmanager
async def engine_of(url: str) -> AsyncGenerator[tuple[SessionProxy[AsyncSession], AsyncEngine]]:
    """Yield a proxy that is bound to an engine whose database has the tables."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    async with db.connect(url):
        await db.create_all(Base.metadata)
    engine = create_async_engine(url, poolclass=AsyncAdaptedQueuePool)  # before 2.0.38 none for SQLite
    db.bind(engine)
    try:
        yield db, engine
    finally:
        db.unbind()
        await engine.dispose()


async def read_in_units(db: SessionProxy[AsyncSession], count: int) -> None:
    """Read in so many units, each inside the one before."""
    if count:
        async with db() as unit:
            await unit.session.scalar(text("SELECT 1"))
            await read_in_units(db, count - 1)


async def value_of(db: SessionProxy[AsyncSession], query: str) -> object:
    """Return the value that a new unit reads."""
    async with db() as unit:
        value: object = await unit.session.scalar(text(query))
        return value


async def add_orphan(db: SessionProxy[AsyncSession]) -> None:
    """Write a row that names none."""
    async with db(commit_on_exit=True) as unit:
        await unit.session.execute(ORPHAN)


@pytest.mark.parametrize("when", ["before", "inside"])
@pytest.mark.parametrize("name", ["connect", "first_connect"])
async def test_foreign_keys(sqlite_url: str, when: str, name: str) -> None:
    """A foreign key is checked, whether the listener came before the sandbox or inside of it."""
    async with engine_of(sqlite_url) as (db, engine):
        if when == "before":
            event.listen(engine.sync_engine, name, FOREIGN_KEYS)
        async with sandbox(db):
            if when == "inside":
                event.listen(engine.sync_engine, name, FOREIGN_KEYS)
            with pytest.raises(IntegrityError):
                await add_orphan(db)
            async with db() as one, db() as two:
                for unit in (one, two):
                    assert await unit.session.scalar(text("PRAGMA foreign_keys")) == 1
                    await unit.rollback()


async def test_foreign_keys_in_a_lifespan(sqlite_url: str) -> None:
    """An application that adds the listener at its startup refuses an orphan in its test, too."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        event.listen(db.engine.sync_engine, "connect", FOREIGN_KEYS)
        await db.create_all(Base.metadata)
        yield

    async def add() -> None:
        await db.session.execute(ORPHAN)

    async def refuse(*_: object) -> Response:
        return Response(status_code=409)

    app = FastAPI(lifespan=lifespan)
    app.add_middleware(middleware, db_url=sqlite_url, commit_on_exit=True)
    app.add_api_route("/", add, methods=["POST"])
    app.add_exception_handler(IntegrityError, refuse)
    async with asgi_client(SandboxedApp(app, db)) as client:
        assert (await client.post("/")).status_code == 409


@pytest.mark.parametrize("when", ["before", "inside"])
async def test_several_pragmas(sqlite_url: str, when: str) -> None:
    """Those that SQLite refuses in a transaction are set, and the others as well."""
    listener = sends(
        "PRAGMA journal_mode=WAL", "PRAGMA synchronous = NORMAL", "PRAGMA busy_timeout(1234)", "SELECT 1"
    )
    async with engine_of(sqlite_url) as (db, engine):
        if when == "before":
            event.listen(engine.sync_engine, "connect", listener)
        async with sandbox(db):
            if when == "inside":
                event.listen(engine.sync_engine, "connect", listener)
            await add_orphan(db)
            async with db(), db():
                assert await value_of(db, "PRAGMA journal_mode") == "wal"
                assert await value_of(db, "PRAGMA synchronous") == 1
                assert await value_of(db, "PRAGMA busy_timeout") == 1234
        event.remove(engine.sync_engine, "connect", listener)
        assert await value_of(db, "SELECT count(*) FROM child") == 0


async def test_next_sandbox_has_only_its_listeners(sqlite_url: str) -> None:
    """A connection that was set up in a sandbox is not used after it; the file keeps its journal mode."""
    async with engine_of(sqlite_url) as (db, engine):
        listener = sends("PRAGMA journal_mode=WAL", "PRAGMA foreign_keys = ON")
        async with sandbox(db):
            event.listen(engine.sync_engine, "connect", listener)
            assert await value_of(db, "PRAGMA foreign_keys") == 1
            event.remove(engine.sync_engine, "connect", listener)
        async with sandbox(db):
            assert await value_of(db, "PRAGMA foreign_keys") == 0
            assert await value_of(db, "PRAGMA journal_mode") == "wal"
        assert await value_of(db, "PRAGMA foreign_keys") == 0


async def test_engine_that_was_in_use(sqlite_url: str) -> None:
    """A listener that is added inside reaches the real connection, also if it was open before."""
    async with engine_of(sqlite_url) as (db, engine):
        assert await value_of(db, "PRAGMA foreign_keys") == 0
        for _ in range(2):
            async with sandbox(db):
                event.listen(engine.sync_engine, "connect", FOREIGN_KEYS)
                with pytest.raises(IntegrityError):
                    await add_orphan(db)
                event.remove(engine.sync_engine, "connect", FOREIGN_KEYS)
            assert await value_of(db, "PRAGMA foreign_keys") == 0


async def test_listener_stays_with_its_engine(sqlite_url: str) -> None:
    """A listener that was added inside is the engine's after the sandbox, as where it is deployed."""
    async with engine_of(sqlite_url) as (db, engine):
        async with sandbox(db):
            event.listen(engine.sync_engine, "connect", FOREIGN_KEYS)
        assert await value_of(db, "PRAGMA foreign_keys") == 1
        event.remove(engine.sync_engine, "connect", FOREIGN_KEYS)


async def test_listener_of_all_engines(sqlite_url: str) -> None:
    """A listener to the class of engines runs outside of the transaction, and once."""
    listener = sends("PRAGMA synchronous = OFF", "PRAGMA foreign_keys = ON")
    event.listen(Engine, "connect", listener)
    try:
        async with engine_of(sqlite_url) as (db, _), sandbox(db):
            await value_of(db, "SELECT 1")
            async with db() as one, db() as two:
                for unit in (one, two):
                    assert await unit.session.scalar(text("PRAGMA synchronous")) == 0
                    await unit.rollback()
    finally:
        event.remove(Engine, "connect", listener)


async def test_disposed_engine_keeps_its_listeners(sqlite_url: str) -> None:
    """The pool that replaces a disposed one inside the sandbox has the listeners, too."""
    async with engine_of(sqlite_url) as (db, engine), sandbox(db):
        event.listen(engine.sync_engine, "connect", FOREIGN_KEYS)
        await engine.dispose()
        event.listen(engine.sync_engine, "connect", sends("PRAGMA synchronous = OFF"))
        assert await value_of(db, "PRAGMA synchronous") == 0
        with pytest.raises(IntegrityError):
            await add_orphan(db)


async def test_info_of_a_listener(sqlite_url: str) -> None:
    """What a listener leaves in the record of a connection each logical connection has."""
    seen: list[object] = []

    def mark(_: object, record: Any) -> None:
        record.info["mark"] = "mine"

    def look(_: object, record: Any, __: object) -> None:
        seen.append(record.info["mark"])

    async with engine_of(sqlite_url) as (db, engine), sandbox(db):
        event.listen(engine.sync_engine, "connect", mark)
        event.listen(engine.sync_engine, "checkout", look)
        async with db() as one, db() as two:
            for unit in (one, two):
                await unit.session.scalar(text("SELECT 1"))
                await unit.rollback()
    assert seen == ["mine", "mine"]


@pytest.mark.parametrize("when", ["before", "inside"])
async def test_functions_and_collations(sqlite_url: str, when: str) -> None:
    """A listener registers a function and a collation of SQLite's."""

    def register(connection: Any, _: object) -> None:
        connection.create_function("twice", 1, twice)
        connection.run_async(collate)

    async with engine_of(sqlite_url) as (db, engine):
        if when == "before":
            event.listen(engine.sync_engine, "connect", register)
        async with sandbox(db):
            if when == "inside":
                event.listen(engine.sync_engine, "connect", register)
            assert await value_of(db, "SELECT twice(21)") == 42
            ordered = "SELECT a FROM (SELECT 'a' AS a UNION SELECT 'b') ORDER BY a COLLATE backwards"
            assert await value_of(db, ordered) == "b"


async def test_late_listener_that_sends_is_refused(sqlite_url: str) -> None:
    """Once something was written a listener cannot send statements, and says so; a function it can add."""

    def register(connection: Any, _: object) -> None:
        connection.create_function("twice", 1, twice)

    async with engine_of(sqlite_url) as (db, engine), sandbox(db):
        async with db(commit_on_exit=True) as unit:
            await unit.session.execute(insert(Parent).values(id=1))
            event.listen(engine.sync_engine, "connect", register)
            async with db() as inner:
                assert await inner.session.scalar(text("SELECT twice(21)")) == 42
            event.listen(engine.sync_engine, "connect", FOREIGN_KEYS)
            outer = await unit.session.scalar(text("SELECT count(*) FROM parent"))
            assert outer == 1
        with pytest.raises(SandboxError, match="before the first write"):
            await read_in_units(db, 3)  # one of them needs a new connection
        assert await value_of(db, "SELECT count(*) FROM parent") == 1


@pytest.mark.parametrize("pragma", ["foreign_keys = ON", "main.foreign_keys(1)", "synchronous=off"])
async def test_pragma_of_a_unit_takes_effect(sqlite_url: str, pragma: str) -> None:
    """A PRAGMA at the beginning of a unit is outside of a transaction, in production and in the sandbox."""
    name = pragma.replace("main.", "").partition("=")[0].partition("(")[0].strip()

    async def use(db: SessionProxy[AsyncSession]) -> object:
        async with db() as unit:
            await unit.session.execute(text(f"PRAGMA {pragma}"))
            return await unit.session.scalar(text(f"PRAGMA {name}"))

    async with engine_of(sqlite_url) as (db, _):
        async with sandbox(db):
            inside = await use(db)
            await use(db)  # it is set already
            await add_orphan(db) if name != "foreign_keys" else None
            assert await use(db) == inside
        assert await use(db) == inside == (0 if name == "synchronous" else 1)


async def test_pragma_inside_a_transaction_is_as_deployed(sqlite_url: str) -> None:
    """After an INSERT the driver has begun: SQLite ignores or refuses the PRAGMA in both places."""

    async def use(db: SessionProxy[AsyncSession]) -> object:
        async with db() as unit:
            await unit.session.execute(insert(Parent).values(id=1))
            await unit.session.execute(text("PRAGMA foreign_keys = ON"))
            with pytest.raises(OperationalError, match="inside a transaction"):
                await unit.session.execute(text("PRAGMA synchronous = OFF"))
            return await unit.session.scalar(text("PRAGMA foreign_keys"))

    async with engine_of(sqlite_url) as (db, _):
        async with sandbox(db):
            assert await use(db) == 0
        assert await use(db) == 0


async def test_pragma_after_writes_is_refused(sqlite_url: str) -> None:
    """In production the PRAGMA of a second unit takes effect, and the sandbox says that here it cannot."""
    async with engine_of(sqlite_url) as (db, _), sandbox(db):
        await add_orphan(db)
        async with db() as unit:
            with pytest.raises(SandboxError, match="PRAGMA foreign_keys = ON"):
                await unit.session.execute(text("PRAGMA foreign_keys = ON"))
        assert await value_of(db, "SELECT count(*) FROM child") == 1


SETTINGS = {"postgresql": ("SET TimeZone TO 'Asia/Tokyo'", "SHOW timezone", "Asia/Tokyo")}
MARIADB = ("SET time_zone = '+09:00'", "SELECT @@time_zone", "+09:00")


@pytest.mark.parametrize("when", ["before", "inside"])
async def test_settings_of_a_server(server_driver_url: str, when: str) -> None:
    """A setting of the connection outlasts transactions, as where it is deployed."""
    setting, query, expected = SETTINGS.get(server_driver_url.partition("+")[0], MARIADB)

    def set_up(connection: Any, _: object) -> None:
        if setting is not MARIADB[0]:  # SQLAlchemy's recipe for PostgreSQL
            connection.autocommit = True
        sends(setting)(connection, None)
        if setting is not MARIADB[0]:
            connection.autocommit = False

    async with engine_of(server_driver_url) as (db, engine):
        if when == "before":
            event.listen(engine.sync_engine, "connect", set_up)
        async with sandbox(db):
            if when == "inside":
                event.listen(engine.sync_engine, "connect", set_up)
                await value_of(db, query)
                event.listen(engine.sync_engine, "connect", lambda *_: None)  # must not undo the first
            async with db(commit_on_exit=True) as one, db() as two:
                await one.session.execute(insert(Parent).values(id=1))
                await one.commit()
                assert await two.session.scalar(text(query)) == expected
            assert await value_of(db, query) == expected


@pytest.mark.parametrize("when", ["before", "inside"])
async def test_codec_of_asyncpg(postgresql_url: str, when: str) -> None:
    """A listener registers a codec at asyncpg's own connection."""

    def register(connection: Any, _: object) -> None:
        connection.run_async(read_addresses)

    async with engine_of(postgresql_url) as (db, engine):
        if when == "before":
            event.listen(engine.sync_engine, "connect", register)
        async with sandbox(db):
            if when == "inside":
                event.listen(engine.sync_engine, "connect", register)
            assert await value_of(db, "SELECT macaddr '08:00:2b:01:02:03'") == "at 08:00:2b:01:02:03"
