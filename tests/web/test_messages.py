"""Mistakes that are easily made are told with the way out: who holds an engine, where a session is found."""

import asyncio
import copy
import inspect
import re
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI, Request, Response
from httpx2 import ASGITransport, AsyncClient
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint

import fastapi_async_sqlalchemy
from fastapi_async_sqlalchemy import (
    ConfigurationError,
    EngineAlreadyBoundError,
    MissingSessionError,
    SessionNotInitialisedError,
    SessionProxy,
    create_middleware_and_session_proxy,
)
from tests.support.site import MakeSite

URL = "postgresql+asyncpg://user:secret@somewhere/shop?password=secret"
Pair = tuple[Any, SessionProxy[AsyncSession]]


# Who holds an engine


async def by_middleware(pair: Pair) -> None:
    """Make an application's middleware."""
    pair[0](FastAPI(), db_url=URL)


async def by_connect(pair: Pair) -> None:
    """Enter a block and stay in it."""
    await pair[1].connect(URL).__aenter__()


async def by_bind(pair: Pair) -> None:
    """Bind an engine."""
    pair[1].bind(create_async_engine(URL))


HOLDERS: dict[str, tuple[Callable[[Pair], Any], str]] = {
    "the middleware of an application": (by_middleware, "`with TestClient(app) as client:`"),
    "`async with db.connect(...)`": (by_connect, "leave that block"),
    "`db.bind()`": (by_bind, "`db.unbind()`"),
}


@pytest.fixture(params=[True, False], ids=["debug", "plain"])
async def debug(request: pytest.FixtureRequest) -> AsyncIterator[bool]:
    """Whether asyncio is in its debug mode."""
    loop = asyncio.get_running_loop()
    before = loop.get_debug()
    loop.set_debug(request.param)
    yield request.param
    loop.set_debug(before)


@pytest.mark.parametrize("first", HOLDERS)
@pytest.mark.parametrize("second", HOLDERS)
async def test_who_holds_the_engine(first: str, second: str, *, debug: bool) -> None:
    """A second engine is refused with who holds the first, and how to end that; in debug mode also where."""
    pair = create_middleware_and_session_proxy(AsyncSession)
    hold, remedy = HOLDERS[first]
    await hold(pair)
    needless = second.startswith("`")
    other = (
        rf"leave {re.escape(second)} out, because it names the same database" if needless else "its own pair"
    )
    with pytest.raises(EngineAlreadyBoundError, match=other) as caught:
        await HOLDERS[second][0](pair)
    text = str(caught.value)
    assert text.startswith(
        f"AsyncSession (postgresql+asyncpg://somewhere/shop) already has an engine in use, bound by {first}"
    )
    assert remedy in text
    assert "secret" not in text
    where = re.search(r" at (\S+):(\d+): ", text)
    assert bool(where) == debug
    if where:
        lines, begin = inspect.getsourcelines(hold)
        assert where[1] == __file__
        assert begin <= int(where[2]) < begin + len(lines)


async def test_holder_changes_with_the_engine() -> None:
    """The error names who holds the engine now, not who did before."""
    pair = create_middleware_and_session_proxy(AsyncSession)
    await by_bind(pair)
    pair[1].unbind()
    async with pair[1].connect(URL):
        with pytest.raises(EngineAlreadyBoundError, match=r"bound by `async with db\.connect\(\.\.\.\)`"):
            await by_bind(pair)
    await by_bind(pair)


# Where the session is


async def test_session_in_a_middleware_outside(make_site: MakeSite, sqlite_url: str) -> None:
    """In a middleware that was added after the pair's own the error names the order of both."""

    async def look(request: Request, call_next: RequestResponseEndpoint) -> Response:
        _ = site.db.session
        return await call_next(request)

    site = await make_site(sqlite_url, outside=[Middleware(BaseHTTPMiddleware, dispatch=look)])
    with pytest.raises(
        MissingSessionError, match=r"must be inside the pair's middleware: add it before that"
    ):
        await site.get()


async def test_session_of_another_pair(make_site: MakeSite, sqlite_url: str) -> None:
    """In a request of an application that has another pair's middleware the error names that cause."""
    site = await make_site(sqlite_url)
    _, other = create_middleware_and_session_proxy(AsyncSession)
    other.bind(site.engine)

    @site.app.get("/")
    async def route() -> None:
        _ = other.session

    with pytest.raises(MissingSessionError, match=r"has this pair's middleware and not another pair's"):
        await site.get()


@pytest.mark.parametrize("connected", [False, True])
async def test_session_as_a_dependency(*, connected: bool) -> None:
    """`Depends(db.session)` looks the session up too early, and the error names `db.dependency`."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    if connected:
        await by_bind((None, db))
    kind = MissingSessionError if connected else SessionNotInitialisedError
    untyped: Any = db
    with pytest.raises(kind, match=r"(?i)a route takes the session by `Depends\(db\.dependency\)`"):
        Depends(untyped.session)


async def test_client_that_does_not_run_the_lifespan() -> None:
    """An application whose lifespan never ends holds its engine, and the error names such clients."""
    pair = create_middleware_and_session_proxy(AsyncSession)

    async def call() -> None:
        app = FastAPI()
        app.add_middleware(pair[0], db_url=URL)
        async with AsyncClient(transport=ASGITransport(app), base_url="http://site") as client:
            assert (await client.get("/nosuch")).status_code == 404

    await call()
    with pytest.raises(EngineAlreadyBoundError, match="such as TestClient without `with` and AsyncClient"):
        await call()


@pytest.mark.parametrize("how", ["a default", "annotated", "of the route"])
def test_proxy_as_a_dependency(how: str) -> None:
    """`Depends(db)` is refused where the route is added, and the error names `db.dependency`."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    app = FastAPI()

    async def by_default(session: AsyncSession = Depends(db)) -> None:  # noqa: B008  # FastAPI's older way
        """Take the session as a default."""

    async def annotated(session: Annotated[AsyncSession, Depends(db)]) -> None:
        """Take the session by its annotation."""

    async def route() -> None:
        """Take nothing."""

    endpoint: Any = {"a default": by_default, "annotated": annotated, "of the route": route}[how]
    dependencies = [Depends(db)] if how == "of the route" else []
    with pytest.raises(ConfigurationError, match=r"write Depends\(db\.dependency\)"):
        app.add_api_route("/", endpoint, dependencies=dependencies)
    app.get("/")(route)
    assert app.openapi()["paths"]


def test_signatures_that_can_be_read() -> None:
    """The class of a proxy, and its methods, have their signatures for whoever asks."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    assert "propagation" in inspect.signature(type(db).__call__).parameters
    assert "url" in inspect.signature(db.connect).parameters
    assert inspect.signature(SessionProxy).parameters
    with pytest.raises(ValueError, match=r"Depends\(db\.dependency\)"):  # as inspect documents it
        inspect.signature(db)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("commit", "db.unit.commit"),
        ("rollback", "db.unit.rollback"),
        ("on_commit", "db.unit.on_commit"),
        ("execute", "db.session.execute"),
        ("add", "db.session.add"),
        ("info", "db.unit.info"),
    ],
)
def test_what_a_session_or_a_unit_has(name: str, way: str) -> None:
    """A name of a unit or a session that is looked for on the proxy is told with the way to it."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    proxy: Any = db
    with pytest.raises(
        AttributeError, match=rf"^'SessionProxy' object has no attribute '{name}': write {way}$"
    ):
        getattr(proxy, name)
    assert not hasattr(proxy, name)


def test_what_nothing_has() -> None:
    """Any other name is an error as of any object, and a proxy can be copied as before."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    proxy: Any = db
    with pytest.raises(AttributeError, match=r"^'SessionProxy' object has no attribute 'nosuch'$"):
        _ = proxy.nosuch
    with pytest.raises(AttributeError, match=r"^'SessionProxy' object has no attribute '__len__'$"):
        _ = proxy.__len__
    copied = copy.deepcopy(db)
    copied.bind(create_async_engine(URL))
    assert db.engine is copied.engine


def test_name_of_release_0_8() -> None:
    """`DBSessionMeta` is the class of every proxy."""
    assert fastapi_async_sqlalchemy.DBSessionMeta is SessionProxy
