"""Fixtures of the integration tests."""

from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from starlette.middleware import Middleware

from tests.databases import JudgeFor
from tests.integration.site import MakeSite, Site, open_site
from tests.integration.worker import open_worker


@pytest.fixture
async def make_site(judge_for: JudgeFor) -> AsyncIterator[MakeSite]:
    """A function that makes a site, to be awaited; when the test ends no connection may be out."""
    async with AsyncExitStack() as sites:

        async def make(
            url: str, *, outside: Iterable[Middleware] = (), inside: Iterable[Middleware] = (), **options: Any
        ) -> Site:
            return await sites.enter_async_context(open_site(url, judge_for, outside, inside, **options))

        yield make


@pytest.fixture(params=["postgresql", "sqlite"])
def deferring_url(request: pytest.FixtureRequest) -> str:
    """An empty database on each of the two whose COMMIT can fail: MariaDB checks at every statement."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture(params=["mariadb", "sqlite"])
def forgiving_url(request: pytest.FixtureRequest) -> str:
    """An empty database on each of the two whose transactions go on after a statement has failed."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture(params=["postgresql", "mariadb"])
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
