"""The fixtures of the plugin for pytest, in test runs of their own."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from tests.support.databases import Judge
from tests.support.tables import engine_with_tables

CONFTEST = """
import os
import pytest
from fastapi import FastAPI
from fastapi_async_sqlalchemy import SQLAlchemyMiddleware, db
from sqlalchemy import text

async def write(name: str) -> None:
    await db.session.execute(text("INSERT INTO note (text) VALUES (:name)"), {"name": name})

async def read() -> list[str]:
    return list(await db.session.scalars(text("SELECT text FROM note ORDER BY text")))

def create_app() -> FastAPI:
    app = FastAPI()
    app.add_middleware(SQLAlchemyMiddleware, db_url=os.environ["URL"], commit_on_exit=True)
    app.add_api_route("/notes/{name}", write, methods=["POST"])
    app.add_api_route("/notes", read)
    return app

@pytest.fixture
def sandbox_app():
    return create_app()
"""
BY_CLIENT = """
import pytest

@pytest.mark.parametrize("number", range(2))
def test_note(sandbox_client, client_sandbox, number):
    assert sandbox_client.get("/notes").json() == []
    assert sandbox_client.post("/notes/one").status_code == 200
    assert sandbox_client.get("/notes").json() == ["one"]
    assert client_sandbox.commits == 1
"""
BY_COROUTINE = """
import os
import pytest
from fastapi_async_sqlalchemy import db
from conftest import read, write

pytestmark = MARK

@pytest.mark.parametrize("number", range(2))
async def test_note(sandbox, number):
    async with db.connect(os.environ["URL"]):
        async with db(commit_on_exit=True):
            await write("one")
        async with db():
            assert await read() == ["one"]
        assert sandbox.commits == 1
"""


def run(folder: Path, url: str, test: str, *options: str, conftest: str = CONFTEST) -> str:
    """Run pytest on one test file; return what it has printed."""
    (folder / "conftest.py").write_text(dedent(conftest), "utf-8")
    (folder / "test_inner.py").write_text(dedent(test), "utf-8")
    (folder / "pytest.ini").write_text("[pytest]\n", "utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *options]
    ended = subprocess.run(  # noqa: S603  # the test's own program
        command, cwd=folder, env={**os.environ, "URL": url}, capture_output=True, text=True, check=False
    )
    return ended.stdout + ended.stderr


async def _make_tables(url: str) -> None:
    async with engine_with_tables(url):
        pass


async def _notes(url: str) -> list[tuple[object, ...]]:
    async with Judge(url) as judge:
        return await judge.rows("SELECT text FROM note")


@pytest.mark.slow
@pytest.mark.usefixtures("test_client")
def test_client_in_a_sandbox(database_url: str, tmp_path: Path) -> None:
    """`sandbox_client` calls the application in its own loop; each test finds the same empty world."""
    asyncio.run(_make_tables(database_url))
    printed = run(tmp_path, database_url, BY_CLIENT)
    assert "2 passed" in printed, printed
    assert asyncio.run(_notes(database_url)) == []


ANYIO = "[pytest.mark.anyio, pytest.mark.parametrize('anyio_backend', ['asyncio'])]"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mark", "options"),
    [
        ("pytest.mark.asyncio", ["-p", "no:anyio"]),
        ("[]", ["-p", "no:anyio", "--asyncio-mode=auto"]),
        ("pytest.mark.asyncio(loop_scope='session')", ["-p", "no:anyio"]),
        ("[]", ["-p", "no:anyio", "--asyncio-mode=auto", "-o", "asyncio_default_test_loop_scope=module"]),
        (ANYIO, ["-p", "no:asyncio"]),
        (ANYIO, []),
    ],
)
def test_sandbox_around_a_coroutine(
    mark: str, options: list[str], postgresql_url: str, tmp_path: Path
) -> None:
    """`sandbox` opens in the event loop of the test, whichever plugin runs it."""
    asyncio.run(_make_tables(postgresql_url))
    printed = run(tmp_path, postgresql_url, BY_COROUTINE.replace("MARK", mark), *options)
    assert "2 passed" in printed, printed


BY_WORKERS = """
import os
import pytest
from conftest import create_app

@pytest.fixture(scope="session")
def sandbox_template():
    return os.environ["URL"]

@pytest.fixture
def sandbox_app(sandbox_url):
    name = sandbox_url.partition("?")[0].rpartition("/")[2]  # the folder may name an outer worker
    assert name.count(os.environ["PYTEST_XDIST_WORKER"]) == 1
    os.environ["URL"], before = sandbox_url, os.environ["URL"]
    yield create_app()
    os.environ["URL"] = before

@pytest.mark.parametrize("number", range(4))
def test_note(sandbox_client, number):
    assert sandbox_client.post("/notes/one").status_code == 200
    assert sandbox_client.get("/notes").json() == ["one"]
"""


@pytest.mark.slow
@pytest.mark.usefixtures("test_client")
def test_workers_have_a_database_each(undoing_ddl_url: str, tmp_path: Path) -> None:
    """Each process of pytest-xdist gets a copy, which is gone in the end."""
    asyncio.run(_make_tables(undoing_ddl_url))
    folder = tmp_path / "inner"
    folder.mkdir()
    printed = run(folder, undoing_ddl_url, BY_WORKERS, "-p", "xdist", "-n", "2")
    assert "4 passed" in printed, printed
    if undoing_ddl_url.startswith("sqlite"):
        assert [path.name for path in tmp_path.iterdir() if "gw" in path.name] == []
    else:
        assert asyncio.run(_copies(undoing_ddl_url)) == []
    assert asyncio.run(_notes(undoing_ddl_url)) == []


async def _copies(url: str) -> list[tuple[object, ...]]:
    async with Judge(url) as judge:
        return await judge.rows("SELECT datname FROM pg_database WHERE datname LIKE '%gw_'")


UNASKED = """
def test_names(request):
    assert [name for name in request.fixturenames if "sandbox" in name] == []

def test_client(sandbox_client):
    pass

def test_url(sandbox_url):
    pass
"""


@pytest.mark.slow
@pytest.mark.usefixtures("test_client")
def test_nothing_is_used_unasked(tmp_path: Path) -> None:
    """A test that asks for no fixture gets none; what the user has to define is told."""
    printed = run(tmp_path, "sqlite+aiosqlite://", UNASKED, conftest="")
    assert "define a fixture `sandbox_app` that returns your application" in printed
    assert "define a fixture `sandbox_template` of the session's scope" in printed
    assert "1 passed, 2 errors" in printed, printed


WITHOUT_LOOP = """
def test_plain(sandbox):
    pass

async def test_coroutine(sandbox):
    pass
"""


@pytest.mark.slow
def test_sandbox_without_an_event_loop(tmp_path: Path) -> None:
    """A test that runs in no event loop learns what to install, and what a plain function uses."""
    printed = run(tmp_path, "sqlite+aiosqlite://", WITHOUT_LOOP, "-p", "no:asyncio")
    remedy = "install pytest-asyncio 0.24 or later, or mark the test with `@pytest.mark.anyio`"
    assert printed.count(remedy) >= 2, printed  # pytest repeats it in its summary where CI is set
    assert "A `def` test uses `sandbox_client` and its `client_sandbox`" in printed
    assert "2 errors" in printed, printed


MISSING = """
import pytest

@pytest.fixture
def sandbox_databases(nosuch):
    return ()

@pytest.mark.asyncio
async def test_missing(sandbox):
    pass
"""


@pytest.mark.slow
def test_missing_fixture_of_the_users(tmp_path: Path) -> None:
    """A fixture that is missing elsewhere is named as pytest names it."""
    printed = run(tmp_path, "sqlite+aiosqlite://", MISSING)
    assert "fixture 'nosuch' not found" in printed, printed
