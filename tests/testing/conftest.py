"""Fixtures of the tests of the sandbox: a process without an application, by each driver."""

from collections.abc import AsyncIterator
from importlib import import_module
from typing import TYPE_CHECKING

import pytest

from fastapi_async_sqlalchemy.testing import Sandbox, sandbox
from tests.support.databases import JudgeFor
from tests.support.site import Site
from tests.support.worker import open_worker

if TYPE_CHECKING:
    from fastapi.testclient import TestClient


@pytest.fixture
def test_client() -> "type[TestClient]":
    """The class TestClient; an old Starlette's needs the httpx of its time."""
    try:
        kind: type[TestClient] = import_module("fastapi.testclient").TestClient
    except RuntimeError as error:
        pytest.skip(str(error).partition("\n")[0])
    return kind


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


@pytest.fixture(params=["postgresql", "psycopg", "sqlite"])
def deferring_driver_url(request: pytest.FixtureRequest) -> str:
    """An empty database by each driver of the two whose COMMIT can fail."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture(params=["postgresql", "psycopg"])
def postgresql_driver_url(request: pytest.FixtureRequest) -> str:
    """An empty PostgreSQL database by each driver."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture(params=["postgresql", "psycopg", "mariadb", "asyncmy"])
def server_driver_url(request: pytest.FixtureRequest) -> str:
    """An empty database of a server, by each driver."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture(params=["postgresql", "sqlite"])
def undoing_ddl_url(request: pytest.FixtureRequest) -> str:
    """An empty database on each of the two that roll DDL back."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url
