"""Fixtures: an empty database for each test, on every server, and a judge that looks at it from outside."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import pytest
from sqlalchemy import URL, make_url
from sqlalchemy.exc import OperationalError

from fastapi_async_sqlalchemy import db
from tests.databases import Judge, JudgeFor, find_mariadb, fresh_database
from tests.databases import postgresql_server as start_postgresql


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[URL]:
    """The PostgreSQL of this test run."""
    with start_postgresql() as server:
        yield server


@pytest.fixture(scope="session")
def mariadb_server() -> URL:
    """The MariaDB that answers; without one the tests are skipped, but not where CI is set."""
    try:
        return asyncio.run(find_mariadb())
    except OperationalError as error:
        reason = f"no MariaDB answers (name one by TEST_MARIADB_URL): {error.orig}"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def _default_pair() -> Iterator[None]:
    """The default pair is the process's own: each test finds it without an engine."""
    yield
    db.unbind()


@pytest.fixture
def databases() -> Iterator[ExitStack]:
    """The databases of one test: a fixture that asks for this one is closed before they are dropped."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def postgresql_url(postgresql_server: URL, databases: ExitStack) -> str:
    """An empty PostgreSQL database, by asyncpg."""
    return databases.enter_context(fresh_database(postgresql_server))


@pytest.fixture
def mariadb_url(mariadb_server: URL, databases: ExitStack) -> str:
    """An empty MariaDB database, by aiomysql unless TEST_MARIADB_URL names another driver."""
    return databases.enter_context(fresh_database(mariadb_server))


@pytest.fixture
def asyncmy_url(mariadb_url: str) -> str:
    """The database of `mariadb_url`, by asyncmy."""
    return make_url(mariadb_url).set(drivername="mysql+asyncmy").render_as_string(hide_password=False)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """An SQLite file that does not exist yet, by aiosqlite."""
    return f"sqlite+aiosqlite:///{tmp_path / 'test.db'}"


@pytest.fixture(params=["postgresql", "mariadb", "sqlite"])
def database_url(request: pytest.FixtureRequest) -> str:
    """An empty database on each of the three in turn."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
async def judge_for(databases: ExitStack) -> AsyncIterator[JudgeFor]:
    """A function that opens a judge of a database, to be awaited; all are closed when the test ends."""
    async with AsyncExitStack() as judges:

        async def open_judge(url: str) -> Judge:
            return await judges.enter_async_context(Judge(url))

        yield open_judge
