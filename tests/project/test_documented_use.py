"""What users of the package of this name have been writing goes on working: its documented programs, run."""

import asyncio
import copy
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from sqlalchemy import AsyncAdaptedQueuePool, column, insert, make_url, table, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import fastapi_async_sqlalchemy
from fastapi_async_sqlalchemy import (
    MissingSessionError,
    SessionNotInitialisedError,
    SessionProxy,
    SQLAlchemyMiddleware,
    create_middleware_and_session_proxy,
    db,
)
from tests.support.databases import JudgeFor
from tests.support.serving import asgi_client

files = table("ms_files", column("id"))
EXEC = "ignore:[^a-z]*You probably want to use .session.exec:DeprecationWarning"
pytestmark = pytest.mark.filterwarnings(EXEC)  # SQLModel's, about what the documented programs call


class Base(DeclarativeBase):
    """The metadata of the mapped file."""


class File(Base):
    """A file, mapped."""

    __tablename__ = "ms_files"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


@pytest.fixture(autouse=True)
def _unbound_pair() -> None:
    """The default pair has no engine before a test."""
    with pytest.raises(SessionNotInitialisedError, match="the default database has no engine yet"):
        _ = db.engine


@pytest.fixture
def _echo() -> Iterator[None]:
    """Take off the handler that SQLAlchemy's `echo` puts on its logger for the rest of the process."""
    logger = logging.getLogger("sqlalchemy")
    handlers = logger.handlers[:]
    yield
    logger.handlers[:] = handlers


async def make_files(url: str, judge_for: JudgeFor, *numbers: int) -> None:
    """Make the table of files with these in it."""
    judge = await judge_for(url)
    await judge.execute("CREATE TABLE ms_files (id INTEGER PRIMARY KEY)")
    for number in numbers:
        await judge.execute("INSERT INTO ms_files VALUES (:id)", id=number)


async def fetch_files() -> list[int]:
    """Read the files in a unit of its own, wherever it is called."""
    async with db():
        result = await db.session.execute(files.select())
        return list(result.scalars())


def files_app(started: list[list[int]]) -> FastAPI:
    """Make an application that reads the files in a route, in a unit of its own, and at startup."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        started.append(await fetch_files())
        yield
        started.append(await fetch_files())

    app = FastAPI(lifespan=lifespan)

    @app.get("/")
    async def in_a_route() -> list[int]:
        result = await db.session.execute(files.select())
        return [row.id for row in result.fetchall()]

    @app.get("/db_context")
    async def in_a_unit_of_its_own() -> list[int]:
        return await fetch_files()

    return app


@pytest.mark.usefixtures("_echo")
async def test_default_pair_on_postgresql(
    postgresql_url: str, judge_for: JudgeFor, caplog: pytest.LogCaptureFixture
) -> None:
    """The documented example: a URL and engine arguments; `db` in a route, in a block, and at startup."""
    await make_files(postgresql_url, judge_for, 1, 2)
    started: list[list[int]] = []
    app = files_app(started)
    app.add_middleware(
        SQLAlchemyMiddleware,
        db_url=postgresql_url,
        engine_args={"echo": True, "pool_pre_ping": True, "pool_size": 5, "max_overflow": 10},
    )
    async with asgi_client(app) as client:
        assert (await client.get("/")).json() == [1, 2]
        assert (await client.get("/db_context")).json() == [1, 2]
        pool: Any = db.engine.pool
        assert (pool.size(), pool._max_overflow, pool._pre_ping) == (5, 10, True)  # noqa: SLF001  # no public name
        assert pool.checkedout() == 0
    assert started == [[1, 2], [1, 2]]
    assert any("ms_files" in record.getMessage() for record in caplog.records)


async def test_default_pair_on_every_database(database_url: str, judge_for: JudgeFor) -> None:
    """The same program, with nothing but the URL."""
    await make_files(database_url, judge_for, 1, 2)
    started: list[list[int]] = []
    app = files_app(started)
    app.add_middleware(SQLAlchemyMiddleware, db_url=database_url)
    async with asgi_client(app) as client:
        assert (await client.get("/")).json() == [1, 2]
        assert (await client.get("/db_context")).json() == [1, 2]
    assert started == [[1, 2], [1, 2]]


async def test_url_object(sqlite_url: str, judge_for: JudgeFor) -> None:
    """The URL may be one of SQLAlchemy's own."""
    await make_files(sqlite_url, judge_for, 3)
    app = files_app([])
    app.add_middleware(SQLAlchemyMiddleware, db_url=make_url(sqlite_url))
    async with asgi_client(app) as client:
        assert (await client.get("/")).json() == [3]


async def test_custom_engine(database_url: str, judge_for: JudgeFor) -> None:
    """The caller's own engine serves `db`, and is the caller's to dispose."""
    await make_files(database_url, judge_for, 1)
    engine = create_async_engine(database_url, poolclass=AsyncAdaptedQueuePool, pool_size=2)
    app = files_app([])
    app.add_middleware(SQLAlchemyMiddleware, custom_engine=engine)
    async with asgi_client(app) as client:
        assert db.engine is engine
        assert (await client.get("/")).json() == [1]
    pool: Any = engine.pool
    assert pool.checkedin() == 1
    await engine.dispose()


async def test_outside_of_any_application(sqlite_url: str, judge_for: JudgeFor) -> None:
    """A script has no request: `db.session` is to be had inside `async with db():` alone."""
    await make_files(sqlite_url, judge_for, 1)
    async with db.connect(sqlite_url):
        assert await fetch_files() == [1]
        with pytest.raises(MissingSessionError, match=r"open `async with db\(\):` around the work"):
            _ = db.session


async def test_commit_on_exit(database_url: str, judge_for: JudgeFor) -> None:
    """`commit_on_exit=True` commits what the route wrote; the arguments keep their order."""
    await make_files(database_url, judge_for)
    judge = await judge_for(database_url)
    app = FastAPI()

    @app.post("/")
    async def write() -> None:
        db.session.add(File(id=7))

    @app.get("/")
    async def write_in_a_block() -> None:
        async with db(commit_on_exit=True):
            await db.session.execute(insert(File).values(id=8))

    serving = SQLAlchemyMiddleware(app, database_url, None, {"echo_pool": None}, None, True)  # noqa: FBT003
    async with asgi_client(serving) as client:
        assert (await client.post("/")).status_code == 200
        assert (await client.get("/")).status_code == 200
    assert await judge.rows("SELECT id FROM ms_files ORDER BY id") == [(7,), (8,)]


async def test_commit_by_hand(database_url: str, judge_for: JudgeFor) -> None:
    """Without `commit_on_exit` the route commits by itself."""
    await make_files(database_url, judge_for)
    judge = await judge_for(database_url)
    app = FastAPI()

    @app.get("/")
    async def write() -> int:
        file = File(id=7)
        db.session.add(file)
        await db.session.commit()
        return file.id

    app.add_middleware(SQLAlchemyMiddleware, db_url=database_url)
    async with asgi_client(app) as client:
        assert (await client.get("/")).json() == 7
    assert await judge.rows("SELECT id FROM ms_files") == [(7,)]


async def test_sessions_for_each_task(database_url: str, judge_for: JudgeFor) -> None:
    """`multi_sessions` with its limits, `db.gather`, `db.connection` and `db.pool_status`."""
    await make_files(database_url, judge_for)
    judge = await judge_for(database_url)

    async def write(number: int) -> int:
        await db.session.execute(insert(File).values(id=number))
        return number

    async with db.connect(database_url, engine_args={"poolclass": AsyncAdaptedQueuePool}):
        async with db(multi_sessions=True, commit_on_exit=True, max_concurrent=2, pool_timeout=5):
            assert await asyncio.gather(*map(write, (1, 2, 3))) == [1, 2, 3]
            assert await db.gather(*map(write, (4, 5)), max_concurrent=1) == [4, 5]
        async with db.connection(timeout=5) as session:
            assert sorted((await session.execute(files.select())).scalars()) == [1, 2, 3, 4, 5]
            assert db.pool_status()["checked_out"] == 1
    assert await judge.rows("SELECT count(*) FROM ms_files") == [(5,)]


class Mine(AsyncSession):
    """A session class of the user's own."""


@pytest.mark.parametrize("expire_on_commit", [True, False])
async def test_session_args(sqlite_url: str, judge_for: JudgeFor, *, expire_on_commit: bool) -> None:
    """`session_args` reach the session: its class and its options."""
    await make_files(sqlite_url, judge_for)
    app = FastAPI()

    @app.get("/")
    async def look() -> list[object]:
        session = db.session
        return [type(session).__name__, session.sync_session.expire_on_commit, session.sync_session.autoflush]

    app.add_middleware(
        SQLAlchemyMiddleware,
        db_url=sqlite_url,
        session_args={"class_": Mine, "expire_on_commit": expire_on_commit, "autoflush": False},
    )
    async with asgi_client(app) as client:
        assert (await client.get("/")).json() == ["Mine", expire_on_commit, False]


FirstMiddleware, first_db = create_middleware_and_session_proxy()
SecondMiddleware, second_db = create_middleware_and_session_proxy()
router = APIRouter()


@router.get("/first-db-files")
async def files_of_the_first() -> list[int]:
    """Read from the first database."""
    return list((await first_db.session.execute(files.select())).scalars())


@router.get("/second-db-files")
async def files_of_the_second() -> list[int]:
    """Read from the second database."""
    return list((await second_db.session.execute(files.select())).scalars())


@pytest.fixture
async def _pairs() -> AsyncIterator[None]:
    """The pairs of the module above are unbound after each test."""
    yield
    first_db.unbind()
    second_db.unbind()


@pytest.fixture(params=["mariadb", "asyncmy"])
def mysql_url(request: pytest.FixtureRequest) -> str:
    """An empty MariaDB database, by each of its drivers."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.mark.usefixtures("_pairs")
async def test_two_databases(postgresql_url: str, mysql_url: str, judge_for: JudgeFor) -> None:
    """Two pairs serve one application: PostgreSQL by asyncpg, MariaDB by aiomysql and by asyncmy."""
    await make_files(postgresql_url, judge_for, 1)
    await make_files(mysql_url, judge_for, 2)
    app = FastAPI()
    app.include_router(router)
    engine_args = {"pool_size": 5, "max_overflow": 10}
    app.add_middleware(FirstMiddleware, db_url=postgresql_url, engine_args=engine_args)
    app.add_middleware(SecondMiddleware, db_url=mysql_url, engine_args=engine_args)
    async with asgi_client(app) as client:
        assert (await client.get("/first-db-files")).json() == [1]
        assert (await client.get("/second-db-files")).json() == [2]
        assert first_db.engine.driver == "asyncpg"
        assert second_db.engine.driver == make_url(mysql_url).get_driver_name()


async def test_copied_with_what_holds_it(sqlite_url: str, judge_for: JudgeFor) -> None:
    """A deep copy of what holds the proxy, as `dataclasses.asdict()` makes one, has the proxy itself."""
    await make_files(sqlite_url, judge_for, 1)
    held = copy.deepcopy({"db": db})
    assert held["db"] is db
    async with db.connect(sqlite_url):
        assert await fetch_files() == [1]


def test_every_documented_name_is_there() -> None:
    """The names that programs import are importable, from the package and from its middleware module."""
    from fastapi_async_sqlalchemy import exceptions, middleware  # noqa: PLC0415  # the import is the subject

    assert middleware.SQLAlchemyMiddleware is SQLAlchemyMiddleware
    assert middleware.db is db
    assert exceptions.MissingSessionError is MissingSessionError
    assert exceptions.SessionNotInitialisedError is fastapi_async_sqlalchemy.SessionNotInitialisedError
    assert fastapi_async_sqlalchemy.__version__ == version("fastapi-async-sqlalchemy")


# SQLModel, where it is installed.


async def test_default_session_is_sqlmodel_s(sqlite_url: str, judge_for: JudgeFor) -> None:
    """Where SQLModel is installed, the default pair's session has `exec`."""
    sqlmodel = pytest.importorskip("sqlmodel")
    await make_files(sqlite_url, judge_for, 1, 2)
    async with db.connect(sqlite_url), db():
        session: Any = db.session
        result = await session.exec(sqlmodel.select(File.id))
        assert result.all() == [1, 2]


async def test_typed_pair_of_sqlmodel(database_url: str, judge_for: JudgeFor) -> None:
    """A pair takes SQLModel's session class by name, and its proxy is typed by it."""
    sqlmodel = pytest.importorskip("sqlmodel")
    sqlmodel_session = pytest.importorskip("sqlmodel.ext.asyncio.session").AsyncSession
    await make_files(database_url, judge_for, 1, 2)
    pair: tuple[Any, SessionProxy[Any]] = create_middleware_and_session_proxy(sqlmodel_session)
    middleware, typed_db = pair
    app = FastAPI()

    @app.get("/")
    async def read() -> list[int]:
        assert isinstance(typed_db.session, sqlmodel_session)
        return list(await typed_db.session.exec(sqlmodel.select(File.id)))

    app.add_middleware(middleware, db_url=database_url)
    async with asgi_client(app) as client:
        assert (await client.get("/")).json() == [1, 2]


async def test_session_class_of_sqlalchemy_stays_so(sqlite_url: str) -> None:
    """A pair that was given SQLAlchemy's session class uses it, SQLModel or not."""
    _, plain = create_middleware_and_session_proxy(AsyncSession)
    async with plain.connect(sqlite_url), plain() as unit:
        assert type(unit.session) is AsyncSession
        assert await unit.session.scalar(text("SELECT 1")) == 1
