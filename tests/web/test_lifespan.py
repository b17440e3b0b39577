"""The lifespan disposes the engine that the middleware made, however it ends."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, nullcontext

import pytest
from attrs import Factory, define
from fastapi import FastAPI
from sqlalchemy import AsyncAdaptedQueuePool, Pool, literal, select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from starlette.types import Message, Receive, Scope, Send

from fastapi_async_sqlalchemy import SessionProxy, create_middleware_and_session_proxy
from tests.support.interruption import Exchange
from tests.support.request_end import LAST, START
from tests.support.serving import asgi_client, raw_get, run_lifespan, serve
from tests.support.site import checked_in

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
