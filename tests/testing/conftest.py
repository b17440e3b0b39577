"""Fixtures of the tests of the sandbox: a process without an application, by each driver."""

from collections.abc import AsyncIterator

import pytest

from fastapi_async_sqlalchemy.testing import Sandbox, sandbox
from tests.support.databases import JudgeFor
from tests.support.site import Site
from tests.support.worker import open_worker


@pytest.fixture
async def sandboxed(driver_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """A process without an application, by each driver in turn, whose database is as before in the end."""
    async with open_worker(driver_url, judge_for) as worker:
        await worker.judge.execute("INSERT INTO note (text) VALUES ('before')")
        yield worker
        assert await worker.notes() == ["before"]


@pytest.fixture
async def box(sandboxed: Site) -> AsyncIterator[Sandbox]:
    """The sandbox of that process."""
    async with sandbox(sandboxed.db, timeout=2) as box:
        yield box
