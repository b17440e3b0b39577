"""Several use one engine of one pair: each ends its own use, and takes nothing from the others."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast

import pytest
from attrs import define
from fastapi import FastAPI
from httpx2 import ASGITransport, AsyncClient
from sqlalchemy import AsyncAdaptedQueuePool, Engine, event, insert, literal, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from fastapi_async_sqlalchemy import (
    ConfigurationError,
    EngineAlreadyBoundError,
    SessionNotInitialisedError,
    create_middleware_and_session_proxy,
)
from tests.support.databases import JudgeFor
from tests.support.serving import asgi_client, run_lifespan
from tests.support.site import Site, checked_in, complaints
from tests.support.tables import Note, engine_with_tables


@define(eq=False)
class Shop(Site):
    """A pair and an engine, for several applications."""

    middleware: Any

    def application(self, *, lifespan: Any = None, **options: Any) -> FastAPI:
        """Make an application that uses the engine; its route uses a session from two tasks at once."""
        app = FastAPI(lifespan=lifespan)
        app.add_middleware(self.middleware, **{"custom_engine": self.engine, **options})

        @app.get("/")
        async def route() -> None:
            await asyncio.gather(*(self.db.session.execute(select(literal(1))) for _ in range(3)))

        @app.post("/{text}")
        async def write(text: str) -> None:
            self.db.session.add(Note(text=text))

        return app

    async def scalar(self) -> object:
        """Return what a unit reads."""
        async with self.db() as unit:
            return await unit.session.scalar(select(literal(1)))

    def accepts_another(self) -> bool:
        """Whether another engine is taken; it is released at once."""
        try:
            self.db.bind(create_async_engine("sqlite+aiosqlite://"))
        except EngineAlreadyBoundError:
            return False
        self.db.unbind()
        return True


@pytest.fixture
async def shop(database_url: str, judge_for: JudgeFor) -> AsyncIterator[Shop]:
    """A pair and an engine on each of the three databases; at the end no connection may be out."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    async with engine_with_tables(database_url) as engine:
        shop = Shop(FastAPI(), db, engine, await judge_for(database_url), middleware)
        yield shop
        assert shop.checked_out() == 0


async def answer(app: FastAPI, path: str = "/", method: str = "GET") -> int:
    """Call an application without its lifespan, and return the status."""
    transport = ASGITransport(app, raise_app_exceptions=False)
    async with AsyncClient(transport=transport, base_url="http://testserver") as client:
        return (await client.request(method, path)).status_code


# Blocks and `db.bind()`


async def test_block_inside_the_lifespan(shop: Shop) -> None:
    """A lifespan may make its tables in `db.connect()` with the engine of the middleware."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        async with shop.db.connect(shop.engine), shop.db.begin() as unit:
            unit.session.add(Note(text="from the lifespan"))
        yield

    async with asgi_client(shop.application(lifespan=lifespan, commit_on_exit=True)) as client:
        assert (await client.post("/tea")).status_code == 200
        assert not shop.accepts_another()
    assert await shop.notes() == ["from the lifespan", "tea"]
    assert shop.accepts_another()


async def test_block_around_an_application(shop: Shop) -> None:
    """The end of an application inside `db.connect()` leaves the block its engine."""
    async with shop.db.connect(shop.engine):
        async with asgi_client(shop.application(commit_on_exit=True)) as client:
            assert (await client.post("/tea")).status_code == 200
        assert await shop.scalar() == 1
        assert not shop.accepts_another()
    with pytest.raises(SessionNotInitialisedError, match="has no engine yet"):
        await shop.scalar()


@pytest.mark.parametrize("first", ["inner", "outer"])
async def test_block_inside_a_block(shop: Shop, first: str) -> None:
    """Of two blocks either may end first; the one that is left has the engine, and its own default."""
    blocks = {
        "outer": shop.db.connect(shop.engine, commit_on_exit=True),
        "inner": shop.db.connect(shop.engine, commit_on_exit=False),
    }
    for block in blocks.values():
        await block.__aenter__()
    await blocks.pop(first).__aexit__(None, None, None)
    assert not shop.accepts_another()
    async with shop.db() as unit:
        unit.session.add(Note(text="tea"))
        await unit.session.flush()
    assert await shop.notes() == (["tea"] if first == "inner" else [])
    [last] = blocks.values()
    await last.__aexit__(None, None, None)
    assert shop.accepts_another()


async def test_bind_twice(shop: Shop) -> None:
    """Each `db.bind()` ends by an `unbind()` of its own."""
    for _ in range(2):
        shop.db.bind(shop.engine)
    shop.db.unbind()
    assert await shop.scalar() == 1
    assert not shop.accepts_another()
    shop.db.unbind()
    assert shop.accepts_another()


@pytest.mark.parametrize("first", ["application", "db.bind()"])
async def test_bind_and_an_application(shop: Shop, first: str) -> None:
    """`db.bind()` and an application with the same engine end in either order."""
    shop.db.bind(shop.engine)
    app = shop.application()
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(run_lifespan(app))
        if first == "application":
            await stack.aclose()
            assert await shop.scalar() == 1
        else:
            shop.db.unbind()
            shop.application()
            assert await answer(app, "/tea", "POST") == 200
        assert not shop.accepts_another()
    shop.db.unbind()
    assert shop.accepts_another()


async def test_owner_disposes(sqlite_url: str) -> None:
    """An engine of the middleware's own is disposed by its lifespan, and serves a block that is left."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    app, disposed = FastAPI(), list[Engine]()
    app.add_middleware(middleware, db_url=sqlite_url, engine_args={"poolclass": AsyncAdaptedQueuePool})
    async with AsyncExitStack() as stack:
        async with run_lifespan(app):
            engine = db.engine
            event.listen(engine.sync_engine, "engine_disposed", disposed.append)
            await stack.enter_async_context(db.connect(engine))
        async with db() as unit:
            assert await unit.session.scalar(select(literal(1))) == 1
        assert disposed == [engine.sync_engine]
    assert checked_in(engine.pool) == 1
    await engine.dispose()


# Two applications


async def test_two_applications(shop: Shop) -> None:
    """The shutdown of one application takes no setting and no engine from the other."""
    public, admin = (shop.application(concurrent_use=wait) for wait in ("wait", None))
    async with run_lifespan(public):
        async with run_lifespan(admin):
            assert (await answer(public), await answer(admin)) == (200, 200)
        assert await answer(public) == 200
        assert not shop.accepts_another()
    assert shop.accepts_another()


async def test_two_applications_with_an_engine_from_elsewhere(shop: Shop) -> None:
    """Applications without an engine keep their settings, too."""
    public, admin = (shop.application(custom_engine=None, concurrent_use="wait") for _ in range(2))
    async with shop.db.connect(shop.engine), run_lifespan(public):
        async with run_lifespan(admin):
            assert await answer(public) == 200
        assert await answer(public) == 200


async def test_the_first_of_two_applications_ends(
    sqlite_url: str, judge_for: JudgeFor, caplog: pytest.LogCaptureFixture
) -> None:
    """The watch of the pool goes over to the application that is left, and ends with it."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    async with engine_with_tables(sqlite_url, pool_size=1, max_overflow=0) as engine:
        shop = Shop(FastAPI(), db, engine, await judge_for(sqlite_url), middleware)
        watch = {"pool_warn_threshold": 1.0, "pool_warn_interval": 1e-9}
        public, admin = shop.application(**watch), shop.application(**watch)
        async with AsyncExitStack() as first, run_lifespan(admin):
            await first.enter_async_context(run_lifespan(public))
            async with engine.connect():
                assert len(complaints(caplog)) == 1
            await first.aclose()
            async with engine.connect():
                assert len(complaints(caplog)) == 2
        async with engine.connect():
            assert len(complaints(caplog)) == 2


async def test_request_across_the_other_shutdown(shop: Shop) -> None:
    """A statement on a request's own connection is seen to fail, after another application's shutdown too."""
    ready, go, ran = asyncio.Event(), asyncio.Event(), list[str]()
    public, admin = (shop.application(commit_on_exit=True) for _ in range(2))

    @public.get("/import")
    async def write() -> str:
        shop.db.unit.on_commit(lambda: ran.append("on_commit"))
        shop.db.unit.on_rollback(lambda: ran.append("on_rollback"))
        connection = await shop.db.session.connection()
        await connection.execute(insert(Note).values(text="tea"))
        ready.set()
        await go.wait()
        try:
            await connection.execute(insert(Note).values(text="tea"))
        except IntegrityError:
            return "saved"
        return "twice"

    async with asgi_client(public, raise_app_exceptions=False) as client:
        async with run_lifespan(admin):
            request = asyncio.create_task(client.get("/import"))
            await ready.wait()
        go.set()
        status = (await request).status_code
    committed = shop.engine.dialect.name != "postgresql"  # its transactions end with their first error
    assert status == (200 if committed else 500)
    assert ran == ["on_commit" if committed else "on_rollback"]
    assert await shop.notes() == ["tea"] * committed


# An application that rebuilds its middleware stack


def by_instrumentation(app: FastAPI) -> None:
    """Build the stack, as instrumentation does."""
    app.middleware_stack = app.build_middleware_stack()


def by_another_middleware(app: FastAPI) -> None:
    """Add a middleware to an application that has started."""
    app.middleware_stack = None
    app.add_middleware(CORSMiddleware, allow_origins=["*"])


@pytest.mark.parametrize("rebuild", [by_instrumentation, by_another_middleware])
async def test_stack_beside_another_application(shop: Shop, rebuild: Callable[[FastAPI], None]) -> None:
    """A rebuilt stack is the same use: the application's shutdown ends it, and nothing of the other one."""
    public, admin = (shop.application(concurrent_use="wait") for _ in range(2))
    by_instrumentation(admin)
    async with run_lifespan(public):
        async with run_lifespan(admin):
            rebuild(admin)
            assert await answer(admin) == 200
            rebuild(public)
            assert await answer(public) == 200
        assert await answer(public) == 200
        assert not shop.accepts_another()
    assert shop.accepts_another()


async def test_stack_while_the_engine_is_bound_elsewhere(sqlite_url: str) -> None:
    """A rebuilt stack keeps the engine of its URL although `db.bind()` uses it, too."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    app = FastAPI()
    app.add_middleware(middleware, db_url=sqlite_url)

    @app.get("/")
    async def route() -> int | None:
        return await db.session.scalar(select(literal(1)))

    async with asgi_client(app) as client:
        assert (await client.get("/")).json() == 1
        db.bind(db.engine)
        db.unbind()
        db.bind(db.engine)
        by_instrumentation(app)
        assert (await client.get("/")).json() == 1
    db.unbind()


async def test_mounted_application(shop: Shop) -> None:
    """A mounted application has no lifespan: its use ends with that of the application around it."""
    site = shop.application(commit_on_exit=True)
    for name in ("first", "second"):
        site.mount(f"/{name}", shop.application(concurrent_use="wait" if name == "first" else None))
    async with asgi_client(site) as client:
        assert (await client.get("/first/")).status_code == 200
        assert (await client.get("/second/")).status_code == 200
        assert (await client.get("/")).status_code == 200
        assert not shop.accepts_another()
    assert shop.accepts_another()


async def test_application_without_lifespan_is_not_released(shop: Shop) -> None:
    """What ends after an application that is served without a lifespan leaves it the engine."""
    app = shop.application(concurrent_use="wait")
    assert await answer(app) == 200
    async with shop.db.connect(shop.engine):
        assert await shop.scalar() == 1
    assert await answer(app) == 200
    assert not shop.accepts_another()
    shop.db.unbind()
    assert shop.accepts_another()


async def test_application_that_refuses_the_lifespan(shop: Shop) -> None:
    """An application that is served although it refused the lifespan keeps its settings and its engine."""
    app = shop.application(concurrent_use="wait")
    router = app.router

    async def bare(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            raise NotImplementedError(scope["type"])
        await router(scope, receive, send)

    app.router = cast("Any", bare)
    with pytest.raises(NotImplementedError, match="lifespan"):
        async with run_lifespan(app):
            pass
    assert await answer(app) == 200
    assert not shop.accepts_another()


# Contradictions

ASKED: dict[str, tuple[object, object]] = {
    "session_args": ({"autoflush": False}, {"autoflush": True}),
    "begin": ("on_first_write", "on_first_use"),
    "concurrent_use": ("wait", "refuse"),
}


@pytest.mark.parametrize("setting", ASKED)
async def test_setting_that_contradicts(postgresql_url: str, setting: str) -> None:
    """A second application gives the same settings of all sessions or none; others are refused at once."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    engine: AsyncEngine = create_async_engine(postgresql_url)
    mine, other = ASKED[setting]
    remedy = f"{setting} must be what the middleware of an application has for the same engine: give the same"

    def application(given: object) -> FastAPI:
        app = FastAPI()
        added: Any = middleware
        app.add_middleware(added, custom_engine=engine, **{setting: given})
        return app

    async with run_lifespan(application(mine)):
        for agreeing in (application(mine), application(None)):
            async with run_lifespan(agreeing):
                pass
        with pytest.raises(ConfigurationError, match=remedy):
            async with run_lifespan(application(other)):
                pass
        async with db() as unit:
            assert await unit.session.scalar(select(literal(1))) == 1
            assert unit.session.autoflush is (setting != "session_args")
    async with run_lifespan(application(other)):
        pass
    await engine.dispose()
