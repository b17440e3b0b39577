"""Fixtures: an empty database for each test, a judge that looks at it from outside, and sites and workers."""

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, make_url
from sqlalchemy.exc import OperationalError
from starlette.middleware import Middleware

from fastapi_async_sqlalchemy import db
from tests.support.databases import Judge, JudgeFor, find_mariadb, fresh_database
from tests.support.databases import postgresql_server as start_postgresql
from tests.support.mariadb import own_mariadb
from tests.support.redis import RedisMissingError, own_redis
from tests.support.site import MakeSite, Site, open_site
from tests.support.stage import Stage
from tests.support.worker import open_worker

_DATABASES = {
    "database_url": ["postgresql", "mariadb", "sqlite"],
    "deferring_url": ["postgresql", "sqlite"],
    "locking_url": ["postgresql", "mariadb"],
}
_BY_PSYCOPG = {
    *("session.test_cancellation", "session.test_concurrency", "session.test_pool_timeout"),
    *("session.test_streams", "tasks.test_retried_conflicts", "unit.test_hooks_outcome", "unit.test_unit"),
    *("unit.test_transaction_settings", "unit.test_discarded"),
}
"""The suites in which a driver shows most: on PostgreSQL they run by psycopg, too."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give each test its databases, where it does not choose them itself."""
    chosen = {str(mark.args[0]) for mark in metafunc.definition.iter_markers("parametrize")}
    chosen |= {name for mark in metafunc.definition.iter_markers("parametrize") for name in mark.args[0]}
    for name, databases in _DATABASES.items():
        if name in metafunc.fixturenames and name not in chosen:
            suite = metafunc.definition.nodeid.partition(".py")[0].removeprefix("tests/").replace("/", ".")
            more = ["psycopg"] if suite in _BY_PSYCOPG else []
            metafunc.parametrize(name, [*databases, *more], indirect=True)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow tests: each process has its share of them at the head of its part."""
    slow = [item for item in items if item.get_closest_marker("slow")]
    others = [item for item in items if not item.get_closest_marker("slow")]
    parts = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ordered: list[pytest.Item] = []
    for part in range(parts):
        ordered += slow[part::parts]
        rest = max(0, len(items) * (part + 1) // parts - len(ordered))
        ordered += others[:rest]
        del others[:rest]
    items[:] = ordered


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """Have the garbage collector pass by what there is already, and lasts: many tests call it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[URL]:
    """The PostgreSQL of this test run."""
    with start_postgresql() as server:
        yield server


@pytest.fixture(scope="session")
def psycopg_server(postgresql_server: URL) -> URL:
    """The PostgreSQL of this test run, by psycopg."""
    return postgresql_server.set(drivername="postgresql+psycopg")


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[URL]:
    """The MariaDB that TEST_MARIADB_URL names, one of this run where that is "own", or the one that answers.

    Without any of them the tests are skipped, but not where CI is set.
    """
    if os.environ.get("TEST_MARIADB_URL") == "own":
        with own_mariadb() as url:
            yield url
        return
    try:
        yield asyncio.run(find_mariadb())
    except OperationalError as error:
        reason = f"no MariaDB answers (name one by TEST_MARIADB_URL): {error.orig}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """The Redis of this test run: tests share it, so that each uses its own keys.

    Without the program the tests are skipped, but not where CI is set.
    """
    with ExitStack() as stack:
        try:
            url = stack.enter_context(own_redis())
        except RedisMissingError as error:
            if os.environ.get("CI"):
                pytest.fail(str(error))
            pytest.skip(str(error))
        yield url


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
def psycopg_url(psycopg_server: URL, databases: ExitStack) -> str:
    """An empty PostgreSQL database, by psycopg."""
    return databases.enter_context(fresh_database(psycopg_server))


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


@pytest.fixture
def database_url(request: pytest.FixtureRequest) -> str:
    """An empty database on each of the three in turn."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture(params=["postgresql", "psycopg", "mariadb", "asyncmy", "sqlite"])
def driver_url(request: pytest.FixtureRequest) -> str:
    """An empty database by each driver in turn."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
async def judge_for(databases: ExitStack) -> AsyncIterator[JudgeFor]:
    """A function that opens a judge of a database, to be awaited; all are closed when the test ends."""
    async with AsyncExitStack() as judges:

        async def open_judge(url: str) -> Judge:
            return await judges.enter_async_context(Judge(url))

        yield open_judge


@pytest.fixture
async def make_site(judge_for: JudgeFor) -> AsyncIterator[MakeSite]:
    """A function that makes a site, to be awaited; when the test ends no connection may be out."""
    async with AsyncExitStack() as sites:

        async def make(
            url: str, *, outside: Iterable[Middleware] = (), inside: Iterable[Middleware] = (), **options: Any
        ) -> Site:
            return await sites.enter_async_context(open_site(url, judge_for, outside, inside, **options))

        yield make


@pytest.fixture
def deferring_url(request: pytest.FixtureRequest) -> str:
    """An empty database on each of the two whose COMMIT can fail: MariaDB checks at every statement."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture(params=["mariadb", "sqlite"])
def forgiving_url(request: pytest.FixtureRequest) -> str:
    """An empty database on each of the two whose transactions go on after a statement has failed."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def locking_url(request: pytest.FixtureRequest) -> str:
    """An empty database on each of the two that lock rows, so that a statement can wait for another one's."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture(params=["mariadb", "asyncmy"])
def url_by_driver(request: pytest.FixtureRequest) -> str:
    """An empty database on MariaDB, by each of its drivers."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
async def worker(database_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """A process without an application, on each of the three databases."""
    async with open_worker(database_url, judge_for) as worker:
        yield worker


@pytest.fixture
async def deferring_worker(deferring_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """A process without an application, on each of the two databases whose COMMIT can fail."""
    async with open_worker(deferring_url, judge_for) as worker:
        yield worker


@pytest.fixture
async def postgresql_worker(postgresql_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """A process without an application, on PostgreSQL."""
    async with open_worker(postgresql_url, judge_for) as worker:
        yield worker


@pytest.fixture
async def sqlite_worker(sqlite_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """A process without an application, on SQLite."""
    async with open_worker(sqlite_url, judge_for) as worker:
        yield worker


@pytest.fixture
async def locking_worker(locking_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """A process without an application, on each of the two databases that let two units write at once."""
    async with open_worker(locking_url, judge_for) as worker:
        yield worker


@pytest.fixture(params=["worker", "request"])
async def stage(
    request: pytest.FixtureRequest, database_url: str, judge_for: JudgeFor, make_site: MakeSite
) -> AsyncIterator[Stage]:
    """A worker and a request in turn, on each of the three databases."""
    if request.param == "request":
        site = await make_site(database_url, commit_on_exit=True, exclude_paths=["/outside"])
        yield Stage(site, in_request=True)
        return
    async with open_worker(database_url, judge_for) as worker:
        yield Stage(worker, in_request=False)
