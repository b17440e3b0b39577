"""`pool_warm_up`: connections are open before the application says that it has started."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import AsyncAdaptedQueuePool, NullPool, literal, select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from starlette.applications import Starlette
from starlette.middleware import Middleware

from fastapi_async_sqlalchemy import (
    ConfigurationError,
    EngineArgs,
    SessionNotInitialisedError,
    create_middleware_and_session_proxy,
)
from tests.support.serving import asgi_client
from tests.support.settings import NO_SERVER
from tests.support.site import MakeSite, checked_in
from tests.support.trips import counting

QUEUE = EngineArgs(poolclass=AsyncAdaptedQueuePool)
UNREACHABLE = {
    "postgresql": NO_SERVER["postgresql"],
    "mysql": NO_SERVER["mysql"],
    "sqlite": "sqlite+aiosqlite:////no such folder/at all.db",
}


async def test_connections_are_open(database_url: str) -> None:
    """On entry of ``db.connect()`` so many connections lie in the pool."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    engine_args: Any = {"poolclass": AsyncAdaptedQueuePool, "pool_size": 3, "max_overflow": 0}
    async with db.connect(database_url, engine_args=engine_args, pool_warm_up=3):
        assert (db.pool_status().checked_in, db.pool_status().checked_out) == (3, 0)
        async with db() as unit:
            assert await unit.session.scalar(select(literal(1))) == 1
        assert db.pool_status().checked_in == 3


async def test_application_starts_with_them(database_url: str, make_site: MakeSite) -> None:
    """They are open once the application has started, with an engine of the caller's, too."""
    site = await make_site(database_url, pool_warm_up=2)
    await site.engine.dispose()
    async with site.client():
        assert checked_in(site.engine.pool) == 2


async def test_engine_that_the_lifespan_connects(sqlite_url: str) -> None:
    """The middleware may get its engine in the application's lifespan."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    ours: Any = Middleware(middleware, pool_warm_up=2)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        async with db.connect(sqlite_url, engine_args=QUEUE):
            yield

    async with asgi_client(Starlette(middleware=[ours], lifespan=lifespan)):
        assert db.pool_status().checked_in == 2


async def test_first_unit_asks_for_no_facts(postgresql_url: str) -> None:
    """The first unit of a warm pool begins, prepares, reads and rolls back."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    async with counting(postgresql_url) as trips, db.connect(trips.url, pool_warm_up=1):
        trips.taken()
        async with db() as unit:
            await unit.session.scalar(select(literal(1)))
        assert trips.taken() == 4


@pytest.mark.parametrize("dialect", UNREACHABLE)
async def test_error_is_the_start_s(dialect: str) -> None:
    """A server that does not answer fails the start, and nothing stays connected."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    url = UNREACHABLE[dialect]
    with pytest.raises(Exception, match=r"(?i)connect|unable to open"):
        await db.connect(url, engine_args=QUEUE, pool_warm_up=2).__aenter__()
    with pytest.raises(SessionNotInitialisedError):
        _ = db.engine
    ours: Any = Middleware(middleware, db_url=url, engine_args=QUEUE, pool_warm_up=2)
    with pytest.raises(Exception, match=r"(?i)connect|unable to open"):
        await asgi_client(Starlette(middleware=[ours])).__aenter__()


async def app(*_: object) -> None:
    """Be an application that nobody calls."""
    raise NotImplementedError


@pytest.mark.parametrize("value", [0, -1, True, "2", 1.5])
def test_wrong_value(value: Any) -> None:
    """It is a whole number of at least 1."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    wrong = pytest.raises(ConfigurationError, match="pool_warm_up must be a whole number of at least 1, not")
    with wrong:
        db.connect(NO_SERVER["postgresql"], pool_warm_up=value)
    with wrong:
        middleware(app, NO_SERVER["postgresql"], pool_warm_up=value)


def test_more_than_the_pool_keeps() -> None:
    """A pool closes what exceeds its size, so that it is no use to open more."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    small, none = {"pool_size": 2}, {"poolclass": NullPool}
    with pytest.raises(ConfigurationError, match="pool_warm_up must be at most the pool_size of 2, not 3"):
        db.connect(create_async_engine(NO_SERVER["postgresql"], **small), pool_warm_up=3)
    with pytest.raises(ConfigurationError, match="keeps several connections: leave it out for NullPool"):
        middleware(app, NO_SERVER["postgresql"], engine_args=none, pool_warm_up=1)
