"""Fixtures for pytest: a sandbox around a test, and a client of the application inside one.

pytest finds them by itself. A fixture of the same name in a `conftest.py` replaces one of them, as
`sandbox_app` must be.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from types import ModuleType
from typing import TYPE_CHECKING, Final, Literal, cast

import pytest

from .._dialects.copies import copied
from ..middleware import db
from . import SandboxedApp
from . import sandbox as open_sandbox

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
    from starlette.testclient import TestClient
    from starlette.types import ASGIApp

    from .._proxy import SessionProxy
    from . import Sandbox

__all__: list[str] = []

_NO_APP: Final = (
    "define a fixture `sandbox_app` that returns your application, for example in conftest.py: "
    "`@pytest.fixture` above `def sandbox_app(): return create_app(url)`"
)
_NO_TEMPLATE: Final = (
    "define a fixture `sandbox_template` of the session's scope that returns the URL of a database with its "
    "tables: each process of pytest-xdist gets a copy of it as `sandbox_url`"
)
_NO_LOOP: Final = (
    "the fixture `sandbox` opens in the event loop of a coroutine test: install pytest-asyncio 0.24 or later,"
    " or mark the test with `@pytest.mark.anyio`. A `def` test uses `sandbox_client` and its `client_sandbox`"
)
_BY_ANYIO: Final = "sandbox by anyio"
_BY_ASYNCIO: Final = "sandbox by asyncio, loop of: "
_SCOPES: Final[tuple[Literal["function", "class", "module", "package", "session"], ...]] = (
    *("function", "class", "module", "package", "session"),
)


@pytest.fixture
def sandbox_databases() -> tuple[SessionProxy[AsyncSession] | AsyncEngine, ...]:
    """The databases of the sandbox: the default pair's, unless a fixture of the same name says otherwise."""
    return (db,)


@pytest.fixture
def sandbox_app() -> ASGIApp:
    """The application under test; has to be defined by the user."""
    pytest.fail(_NO_APP, pytrace=False)


@pytest.fixture
def sandbox_client(
    sandbox_app: ASGIApp, sandbox_databases: tuple[SessionProxy[AsyncSession] | AsyncEngine, ...]
) -> Iterator[TestClient]:
    """Starlette's TestClient of the application, from its startup on inside a sandbox."""
    from starlette.testclient import TestClient  # noqa: PLC0415  # it needs an HTTP client

    with TestClient(SandboxedApp(sandbox_app, *sandbox_databases)) as client:
        yield client


@pytest.fixture
def client_sandbox(sandbox_client: TestClient) -> Sandbox:
    """The sandbox of `sandbox_client`."""
    return cast("SandboxedApp", sandbox_client.app).box


@pytest.fixture(scope="session")
def sandbox_template() -> str:
    """The URL of a database with its tables, which each process of pytest-xdist copies; the user's own."""
    pytest.fail(_NO_TEMPLATE, pytrace=False)


@pytest.fixture(scope="session")
def sandbox_url(sandbox_template: str) -> Iterator[str]:
    """The URL of this process's database: `sandbox_template`, or a copy of it in a worker of pytest-xdist."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None:
        yield sandbox_template
        return
    with asyncio.Runner() as runner:
        copy = copied(sandbox_template, worker)
        yield runner.run(copy.__aenter__())
        runner.run(copy.__aexit__(None, None, None))


@pytest.fixture(name="sandbox")
def sandbox_of_test(request: pytest.FixtureRequest) -> Sandbox:
    """The sandbox around a test that is a coroutine function, in the event loop of that test."""
    if "anyio_backend" in request.fixturenames:
        return cast("Sandbox", request.getfixturevalue(_BY_ANYIO))
    marker = request.node.get_closest_marker("asyncio")
    scope = (marker and marker.kwargs.get("loop_scope")) or _ini(request, "asyncio_default_test_loop_scope")
    name = f"{_BY_ASYNCIO}{scope}"
    try:
        return cast("Sandbox", request.getfixturevalue(name))
    except pytest.FixtureLookupError as error:
        if error.argname != name:
            raise
    pytest.fail(_NO_LOOP, pytrace=False)


def _ini(request: pytest.FixtureRequest, name: str) -> str:
    try:
        return str(request.config.getini(name) or "function")
    except ValueError:  # pytest-asyncio is older than that setting
        return "function"


def pytest_configure(config: pytest.Config) -> None:
    """Add a fixture of `sandbox` for each kind of event loop that a test may run in."""
    fixtures = ModuleType(f"{__name__}.loops")
    vars(fixtures)["anyio"] = pytest.fixture(name=_BY_ANYIO)(_opening())
    if config.pluginmanager.hasplugin("asyncio"):
        import pytest_asyncio  # noqa: PLC0415  # only if it is installed

        with suppress(TypeError):  # before 0.24 it had no `loop_scope`: then the fixture is missing
            for scope in _SCOPES:
                name = f"{_BY_ASYNCIO}{scope}"
                vars(fixtures)[scope] = pytest_asyncio.fixture(name=name, loop_scope=scope)(_opening())
    config.pluginmanager.register(fixtures)


def _opening() -> Callable[..., AsyncIterator[Sandbox]]:
    """Return a new function that opens a sandbox: pytest-asyncio writes the loop's scope into it."""

    async def opening(
        sandbox_databases: tuple[SessionProxy[AsyncSession] | AsyncEngine, ...],
    ) -> AsyncIterator[Sandbox]:
        async with open_sandbox(*sandbox_databases) as box:
            yield box

    return opening
