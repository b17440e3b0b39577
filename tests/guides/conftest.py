"""Fixtures of the guides."""

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.databases import JudgeFor
from tests.support.queues import Shop, Workers


@pytest.fixture(scope="session")
def queue_url(redis_url: str) -> Iterator[str]:
    """A database of the Redis for task queues, which the examples find in the environment."""
    before = os.environ.get("REDIS_URL")
    os.environ["REDIS_URL"] = f"{redis_url}/1"
    yield os.environ["REDIS_URL"]
    if before is None:
        del os.environ["REDIS_URL"]
    else:
        os.environ["REDIS_URL"] = before


@pytest.fixture
async def redis(queue_url: str) -> AsyncIterator[Any]:
    """A client of the Redis, which is empty."""
    from redis.asyncio import Redis  # noqa: PLC0415  # the lowest row has none

    client: Any = Redis.from_url(queue_url)  # pyright: ignore[reportUnknownMemberType]  # its types have gaps
    async with client:
        await client.client_unpause()  # what a test has paused that failed
        await client.flushdb()
        yield client


@pytest.fixture
async def shop(postgresql_url: str, judge_for: JudgeFor, queue_url: str) -> Shop:
    """The shop's tables, and no order yet."""
    return await Shop.open(postgresql_url, await judge_for(postgresql_url))


@pytest.fixture
def workers(postgresql_url: str, queue_url: str, tmp_path: Path) -> Workers:
    """Workers of the shop."""
    return Workers({"DATABASE_URL": postgresql_url, "REDIS_URL": queue_url}, tmp_path)
