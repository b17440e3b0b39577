"""Fixtures of the tests of units for tasks."""

from collections.abc import AsyncIterator, Iterator

import pytest
from stamina.instrumentation import get_on_retry_hooks, set_on_retry_hooks

from tests.support.bank import Retries, open_bank
from tests.support.databases import JudgeFor
from tests.support.site import Site


@pytest.fixture
async def bank(database_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """A bank on each of the three databases."""
    async with open_bank(database_url, judge_for) as bank:
        yield bank


@pytest.fixture
async def locking_bank(locking_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """A bank on each of the two databases that lock rows."""
    async with open_bank(locking_url, judge_for) as bank:
        yield bank


@pytest.fixture
async def postgresql_bank(postgresql_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """A bank on PostgreSQL."""
    async with open_bank(postgresql_url, judge_for) as bank:
        yield bank


@pytest.fixture
def retries() -> Iterator[Retries]:
    """What is retried in the test; stamina's own hooks are silent."""
    hooks = get_on_retry_hooks()
    retries = Retries()
    set_on_retry_hooks([retries])
    yield retries
    set_on_retry_hooks(hooks)
