"""Fixtures of the tests of units."""

from collections.abc import AsyncIterator

import pytest

from tests.support.databases import JudgeFor
from tests.support.hooks import Log
from tests.support.settings import open_single
from tests.support.site import Site


@pytest.fixture
def log() -> Log:
    """An empty log."""
    return Log()


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
