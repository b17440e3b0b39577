"""The lifespan disposes the engine that the middleware made, however it ends."""

import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import pytest
from attrs import Factory, define
from fastapi import FastAPI
from sqlalchemy import AsyncAdaptedQueuePool, Engine, NullPool, Pool, event, literal, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_async_sqlalchemy import (
    ConfigurationError,
    EngineAlreadyBoundError,
    SessionNotInitialisedError,
    SessionProxy,
    create_middleware_and_session_proxy,
)
from tests.support.interruption import Exchange
from tests.support.request_end import LAST, START
from tests.support.serving import asgi_client, raw_get, run_lifespan, serve
from tests.support.site import checked_in, complaints

POOLED = {"poolclass": AsyncAdaptedQueuePool}
"""Older SQLAlchemy gives SQLite files a pool only where it is asked to."""


@define(eq=False)
class Life:
    """An application whose lifespan uses the database, and fails where it is told to."""

    url: str
    owner: str
    failing: str = ""
    pools: list[Pool] = Factory(list[Pool])

    def application(self) -> tuple[FastAPI, SessionProxy[AsyncSession]]:
        """Make the application, with an engine of the middleware's own or of the caller's."""
        middleware, db = create_middleware_and_session_proxy(AsyncSession)

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
            await use("startup")
            yield
            await use("shutdown")

        async def use(phase: str) -> None:
            async with db() as unit:
                assert await unit.session.scalar(select(1)) == 1
            self.pools.append(db.engine.pool)
            if self.failing == phase:
                message = f"no {phase}"
                raise OSError(message)

        app = FastAPI(lifespan=lifespan)
        if self.owner == "caller":
            app.add_middleware(middleware, custom_engine=create_async_engine(self.url, **POOLED))
        else:
            app.add_middleware(middleware, db_url=self.url, engine_args=POOLED)

        @app.get("/")
        async def route() -> int | None:
            return await db.session.scalar(select(literal(1)))

        return app, db

    def check(self) -> None:
        """See that the middleware's engine has no connection left, and that the caller's has kept one."""
        assert [checked_in(pool) for pool in self.pools] == [int(self.owner == "caller")] * len(self.pools)


owners = pytest.mark.parametrize("owner", ["middleware", "caller"])


@owners
@pytest.mark.parametrize("failing", ["startup", "shutdown"])
async def test_engine_after_a_lifespan_that_failed(database_url: str, owner: str, failing: str) -> None:
    """An engine of the middleware's own is disposed when startup or shutdown failed; a caller's never is."""
    life = Life(database_url, owner, failing)
    app, db = life.application()
    with pytest.raises(OSError, match=f"no {failing}"):
        async with run_lifespan(app):
            pass
    life.check()
    await db.engine.dispose()


@pytest.mark.parametrize(
    ("failing", "last"),
    [("", "shutdown.complete"), ("startup", "startup.failed"), ("shutdown", "shutdown.failed")],
)
async def test_engine_is_disposed_before_the_server_hears(database_url: str, failing: str, last: str) -> None:
    """When the server hears of the lifespan's end, and may stop its loop, the engine is disposed already."""
    life = Life(database_url, "middleware", failing)
    app, _ = life.application()
    heard: dict[str, list[int]] = {}

    async def eavesdrop(scope: Scope, receive: Receive, send: Send) -> None:
        async def note(message: Message) -> None:
            heard[message["type"].removeprefix("lifespan.")] = [checked_in(pool) for pool in life.pools]
            await send(message)

        await app(scope, receive, note)

    with pytest.raises(OSError, match=failing) if failing else nullcontext():
        async with run_lifespan(eavesdrop):
            pass
    assert heard[last] == [0] * len(life.pools)


@owners
@pytest.mark.parametrize("served", [True, False])
async def test_engine_after_two_lifespans(database_url: str, owner: str, *, served: bool) -> None:
    """One application can go through two lifespans, and each ends with the middleware's engine disposed."""
    life = Life(database_url, owner)
    app, db = life.application()
    for _ in range(2):
        if served:
            async with serve(app) as address, raw_get(address, "/") as response:
                assert await response.status() == 200
        else:
            async with asgi_client(app) as client:
                assert (await client.get("/")).json() == 1
        life.check()
    await db.engine.dispose()


async def test_application_without_lifespan(database_url: str) -> None:
    """An application that refuses the lifespan can be served without one."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    seen: list[object] = []

    async def bare(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            raise NotImplementedError(scope["type"])
        seen.append(await db.session.scalar(select(1)))
        await send(START)
        await send(LAST)

    app = middleware(bare, db_url=database_url, engine_args=POOLED)
    with pytest.raises(NotImplementedError, match="lifespan"):
        async with run_lifespan(app):
            pass
    for _ in range(2):
        exchange = Exchange("/")
        await exchange.call(app)
        assert (exchange.status, exchange.body) == (200, b"last")
    assert seen == [1, 1]
    assert checked_in(db.engine.pool) == 1
    await db.engine.dispose()


# An engine that comes with the lifespan, or does not come


def connecting(
    url: str, how: str, *, engine_args: dict[str, Any] | None = None, **options: Any
) -> tuple[FastAPI, SessionProxy[AsyncSession], list[AsyncEngine]]:
    """Make an application whose lifespan connects the engine of its middleware."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    given: Any = engine_args or {}
    engines = list[AsyncEngine]()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        if how == "db.connect()":
            async with db.connect(url, engine_args=given):
                engines.append(db.engine)
                yield
        elif how == "db.bind()":
            engine = create_async_engine(url, **given)
            engines.append(engine)
            db.bind(engine)
            yield
            db.unbind()
            await engine.dispose()
        else:
            yield

    app = FastAPI(lifespan=lifespan)
    added: Any = middleware
    app.add_middleware(added, **options)

    @app.get("/")
    async def route() -> int | None:
        return await db.session.scalar(select(literal(1)))

    return app, db, engines


@pytest.mark.parametrize("how", ["db.connect()", "db.bind()"])
async def test_engine_from_the_lifespan(database_url: str, how: str) -> None:
    """A middleware takes the engine that its application's lifespan connects, in each lifespan anew."""
    app, _, engines = connecting(database_url, how)
    for _ in range(2):
        async with asgi_client(app) as client:
            assert (await client.get("/")).json() == 1
    first, second = engines
    assert first is not second


@pytest.mark.parametrize("served", [True, False])
async def test_no_engine_after_the_startup(caplog: pytest.LogCaptureFixture, *, served: bool) -> None:
    """An application that has started without an engine fails there, and says how to give one."""
    app, _, _ = connecting("", "not at all")
    remedy = r"no engine though the application has started: give the middleware db_url or custom_engine"
    if served:
        with pytest.raises(RuntimeError, match="failed to start"):
            async with serve(app):
                pass
        assert re.search(remedy, caplog.text)
    else:
        with pytest.raises(ConfigurationError, match=remedy):
            async with run_lifespan(app):
                pass


async def test_no_engine_at_the_first_request() -> None:
    """Where no lifespan runs, the first request that uses the database says that there is no engine."""
    app, _, _ = connecting("", "not at all")
    with pytest.raises(SessionNotInitialisedError, match="has no engine yet"):
        await Exchange("/").call(app)


async def test_threshold_of_an_engine_from_the_lifespan(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A threshold is checked against the engine that comes later, and that is watched while it is used."""
    pool = {**POOLED, "pool_size": 1, "max_overflow": 0}
    watch: dict[str, Any] = {"pool_warn_threshold": 1.0, "pool_warn_interval": 1e-9}
    app, _, engines = connecting(sqlite_url, "db.bind()", engine_args=pool, **watch)
    for number in (1, 2):
        async with asgi_client(app) as client:
            await client.get("/")
        async with engines[-1].connect():
            assert len(complaints(caplog)) == number
        await engines[-1].dispose()
    app, db, _ = connecting(sqlite_url, "db.bind()", engine_args={"poolclass": NullPool}, **watch)
    with pytest.raises(ConfigurationError, match="pool_warn_threshold needs a pool with a limit"):
        async with run_lifespan(app):
            pass
    with pytest.raises(SessionNotInitialisedError, match="no engine"):
        _ = db.engine


# A stack that is built again


def rebuilt(app: FastAPI, how: str) -> None:
    """Build an application's stack again, as instrumentation does and templates do."""
    if how == "OpenTelemetry":
        app.middleware_stack = app.build_middleware_stack()
    else:
        app.middleware_stack = None
        app.add_middleware(CORSMiddleware, allow_origins=["*"])


@pytest.mark.parametrize("how", ["OpenTelemetry", "another middleware"])
@pytest.mark.parametrize("when", ["in the lifespan", "between requests"])
async def test_stack_that_is_built_again(sqlite_url: str, how: str, when: str) -> None:
    """The same URL from the same application is the same engine, disposed once by the lifespan that runs."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    disposed = list[Engine]()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        if when == "in the lifespan":
            rebuilt(app, how)
        event.listen(db.engine.sync_engine, "engine_disposed", disposed.append)
        yield

    app = FastAPI(lifespan=lifespan)
    app.add_middleware(middleware, db_url=sqlite_url, engine_args=POOLED)

    @app.get("/")
    async def route() -> int | None:
        return await db.session.scalar(select(literal(1)))

    async with asgi_client(app) as client:
        assert (await client.get("/")).json() == 1
        engine = db.engine
        if when == "between requests":
            rebuilt(app, how)
        assert (await client.get("/")).json() == 1
        assert db.engine is engine
    assert disposed == [engine.sync_engine]
    assert checked_in(engine.pool) == 0
    async with asgi_client(app) as client:
        assert (await client.get("/")).json() == 1


class Hiding:
    """A middleware that shows nobody which application it wraps."""

    def __init__(self, app: ASGIApp) -> None:
        self._wrapped = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on."""
        await self._wrapped(scope, receive, send)


def hide(app: ASGIApp) -> ASGIApp:
    """Wrap an application in a function."""
    return Hiding(app).__call__


@pytest.mark.parametrize("hiding", [Hiding, hide], ids=["class", "function"])
async def test_stack_with_a_middleware_that_hides_the_application(sqlite_url: str, hiding: Any) -> None:
    """The application is known although a middleware in between does not show it."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    app = FastAPI()
    app.add_middleware(hiding)
    app.add_middleware(middleware, db_url=sqlite_url)

    @app.get("/")
    async def route() -> int | None:
        return await db.session.scalar(select(literal(1)))

    async with asgi_client(app) as client:
        for _ in range(2):
            assert (await client.get("/")).json() == 1
            app.middleware_stack = app.build_middleware_stack()


@pytest.mark.parametrize("other", ["application", "URL", "arguments"])
async def test_stack_with_another_engine(sqlite_url: str, other: str) -> None:
    """Another application, or another URL or other arguments of the same one, is a second engine."""
    middleware, _ = create_middleware_and_session_proxy(AsyncSession)
    app = FastAPI()
    middleware(app, db_url=sqlite_url)
    given: dict[str, Any] = {
        "app": FastAPI() if other == "application" else app,
        "db_url": f"{sqlite_url}2" if other == "URL" else sqlite_url,
        "engine_args": {"echo": None} if other == "arguments" else {},
    }
    with pytest.raises(EngineAlreadyBoundError, match="bound by the middleware of an application"):
        middleware(**given)


# An engine that cannot be disposed


@pytest.mark.parametrize("failing", ["", "startup", "shutdown"])
async def test_dispose_that_fails(sqlite_url: str, caplog: pytest.LogCaptureFixture, failing: str) -> None:
    """An error of disposing the engine is logged, once a lifespan, and the server hears what it should."""
    life = Life(sqlite_url, "middleware", failing)
    app, db = life.application()
    heard, calls = list[str](), list[object]()

    async def eavesdrop(scope: Scope, receive: Receive, send: Send) -> None:
        async def note(message: Message) -> None:
            heard.append(message["type"].removeprefix("lifespan."))
            await send(message)

        await app(scope, receive, note)

    def hang_up(engine: Engine) -> None:
        calls.append(engine)
        message = "the database hung up"
        raise OSError(message)

    app.middleware_stack = app.build_middleware_stack()
    event.listen(db.engine.sync_engine, "engine_disposed", hang_up)
    for _ in range(2):
        with pytest.raises(OSError, match=f"no {failing}") if failing else nullcontext():
            async with run_lifespan(eavesdrop):
                pass
    ends = {"startup": ["startup.failed"], "shutdown": ["startup.complete", "shutdown.failed"]}
    assert heard == ends.get(failing, ["startup.complete", "shutdown.complete"]) * 2
    records = [record for record in caplog.records if record.name == "fastapi_async_sqlalchemy"]
    assert [record.levelname for record in records] == ["ERROR"] * 2
    assert all("hung up" in str(record.exc_info and record.exc_info[1]) for record in records)
    assert calls == [db.engine.sync_engine] * 2


# The watch of the pool


@pytest.mark.parametrize("started", [True, False])
async def test_each_application_watches_the_pool_for_itself(
    sqlite_url: str, caplog: pytest.LogCaptureFixture, *, started: bool
) -> None:
    """One application after the other warns once of one engine, and none does after its lifespan."""
    engine = create_async_engine(sqlite_url, **POOLED, pool_size=1, max_overflow=0)
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    for number in range(1, 4):
        app = FastAPI()
        app.add_middleware(middleware, custom_engine=engine, pool_warn_threshold=1.0)

        @app.get("/")
        async def route() -> int | None:
            return await db.session.scalar(select(literal(1)))

        if started:
            async with asgi_client(app) as client:
                await client.get("/")
            async with engine.connect():
                pass
        else:
            await Exchange("/").call(app)
        assert len(complaints(caplog)) == number
    await engine.dispose()


async def test_watch_of_an_engine_that_is_unbound(sqlite_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """An engine that was unbound is watched no longer, also after its pool was replaced."""
    engine = create_async_engine(sqlite_url, **POOLED, pool_size=1, max_overflow=0)
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    middleware(FastAPI(), custom_engine=engine, pool_warn_threshold=1.0, pool_warn_interval=1e-9)
    for dispose in (False, True):
        async with engine.connect():
            assert len(complaints(caplog)) == dispose + 1
        if dispose:
            break
        await engine.dispose()
    db.unbind()
    async with engine.connect():
        pass
    assert len(complaints(caplog)) == 2
    await engine.dispose()


# What is looked up when it is used


async def test_engine_maker_that_was_replaced(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What replaces `create_async_engine` after the import, as tracing does, makes the engines."""
    made = list[AsyncEngine]()

    def traced(*args: Any, **options: Any) -> AsyncEngine:
        made.append(create_async_engine(*args, **options))
        return made[-1]

    monkeypatch.setattr("sqlalchemy.ext.asyncio.create_async_engine", traced)
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    async with db.connect(sqlite_url):
        assert made == [db.engine]
    middleware(FastAPI(), db_url=sqlite_url)
    assert made[1:] == [db.engine]
