"""Fixtures of the tests of requests."""

import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from sqlalchemy import make_url

from tests.support.databases import JudgeFor, fresh_database
from tests.support.pairs import DRIVERS, InnerSession, OuterSession, Pair, open_side
from tests.support.site import Site
from tests.support.worker import open_worker


@pytest.fixture
async def bare_postgresql(postgresql_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """An application without any middleware, whose pair is bound to PostgreSQL."""
    async with open_worker(postgresql_url, judge_for) as bare:
        yield bare


@pytest.fixture
def new_url(request: pytest.FixtureRequest, databases: ExitStack, tmp_path: Path) -> Callable[[str], str]:
    """A function that makes an empty database for a driver, another one at each call."""
    files = (tmp_path / f"{number}.db" for number in itertools.count())

    def make(kind: str) -> str:
        if kind == "sqlite":
            return f"sqlite+aiosqlite:///{next(files)}"
        server = request.getfixturevalue("postgresql_server" if kind == "postgresql" else "mariadb_server")
        url = make_url(databases.enter_context(fresh_database(server)))
        return url.set(drivername=DRIVERS[kind]).render_as_string(hide_password=False)

    return make


@pytest.fixture
def urls(kinds: tuple[str, ...], new_url: Callable[[str], str]) -> list[str]:
    """An empty database for each of the drivers that the test is given."""
    return [new_url(kind) for kind in kinds]


@pytest.fixture
async def pair(urls: list[str], judge_for: JudgeFor) -> AsyncIterator[Pair]:
    """The two databases."""
    async with (
        open_side(InnerSession, urls[0], judge_for) as inner,
        open_side(OuterSession, urls[1], judge_for) as outer,
    ):
        yield Pair(inner, outer)
