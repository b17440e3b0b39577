"""Fixtures of the guides."""

import os
from collections.abc import Iterator

import pytest


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
