"""The example of a cache: it never serves what was not committed, nor what was before for good."""

import asyncio
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

pytest.importorskip("redis", reason="requirements/guides.in is not in the lowest row")

from httpx2 import AsyncClient
from redis.asyncio import Redis

from examples import caching
from examples.caching import Base, Cache, MemoryCache, Prices, Product, RedisCache, create_app, db
from fastapi_async_sqlalchemy.testing import SandboxedApp
from tests.support.databases import JudgeFor
from tests.support.serving import asgi_client

pytestmark = pytest.mark.filterwarnings(  # SQLModel, of its own execute()
    "ignore:(?s).*session.exec:DeprecationWarning"
)


@pytest.fixture
async def shop_url(postgresql_url: str) -> str:
    """A database with a product."""
    async with db.connect(postgresql_url):
        await db.create_all(Base.metadata)
        async with db.begin() as unit:
            unit.session.add(Product(id=1, cents=100))
    return postgresql_url


@asynccontextmanager
async def emptied(url: str) -> AsyncGenerator[RedisCache]:
    """Connect to the Redis of the test run, and empty it."""
    async with Redis.from_url(  # pyright: ignore[reportUnknownMemberType]  # its options have no types
        url, decode_responses=True
    ) as redis:
        await redis.flushdb()  # pyright: ignore[reportUnknownMemberType]  # as above
        yield RedisCache(redis)


@pytest.fixture(params=["memory", "redis"])
async def cache(request: pytest.FixtureRequest) -> AsyncIterator[Cache]:
    """Each cache in turn, empty."""
    if request.param == "memory":
        yield MemoryCache()
        return
    async with emptied(request.getfixturevalue("redis_url")) as cache:
        yield cache


async def price(client: AsyncClient) -> object:
    """Ask for the price."""
    return (await client.get("/prices/1")).json()["cents"]


async def test_price_is_read_from_the_cache(shop_url: str, cache: Cache, judge_for: JudgeFor) -> None:
    """A second reader asks only the cache, and a writer replaces what is there."""
    judge = await judge_for(shop_url)
    async with asgi_client(create_app(shop_url, cache)) as client:
        assert await price(client) == 100
        await judge.execute("UPDATE product SET cents = 1")  # behind the application's back
        assert await price(client) == 100
        assert (await client.put("/prices/1", params={"cents": 200})).status_code == 200
        assert await price(client) == 200
        assert (await client.get("/prices/2")).status_code == 404


async def test_failed_commit_is_not_cached(shop_url: str, cache: Cache) -> None:
    """Where COMMIT fails the cache has the price that the database has."""
    served = SandboxedApp(create_app(shop_url, cache), db)
    async with asgi_client(served, raise_app_exceptions=False) as client:
        assert await price(client) == 100
        served.box.fail_commit()
        assert (await client.put("/prices/1", params={"cents": 200})).status_code == 500
        assert await price(client) == 100


async def test_late_reader_does_not_bring_the_old_price_back(shop_url: str, cache: Cache) -> None:
    """A reader that has read before a COMMIT, and fills the cache after it, leaves the new price there."""
    prices = Prices(cache)
    has_read, has_written = asyncio.Event(), asyncio.Event()

    async def read() -> None:
        async with db():
            assert (await prices.read(1)).cents == 100
            has_read.set()
            await has_written.wait()

    async with db.connect(shop_url), asyncio.TaskGroup() as tasks:
        tasks.create_task(read())
        await has_read.wait()
        async with db.begin():
            await prices.write(1, 200)
        has_written.set()
    assert (await cache.get("price:1") or "").endswith('"cents":200}')


async def test_expired_price_is_read_again(
    shop_url: str, cache: Cache, judge_for: JudgeFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has been kept long enough is asked of the database."""
    monkeypatch.setattr(caching, "KEEP", 0.0)
    judge = await judge_for(shop_url)
    async with asgi_client(create_app(shop_url, cache)) as client:
        assert await price(client) == 100
        await judge.execute("UPDATE product SET cents = 1")
        assert await price(client) == 1


@pytest.mark.parametrize(("shared", "seen"), [(False, 100), (True, 200)], ids=["memory", "redis"])
async def test_other_process(shop_url: str, redis_url: str, *, shared: bool, seen: int) -> None:
    """Another process has the old price from its own cache, and the new one from Redis."""
    async with emptied(redis_url) as of_all:
        make: Callable[[], Cache] = (lambda: of_all) if shared else MemoryCache
        here, there = make(), make()
        for one in (here, there):
            async with asgi_client(create_app(shop_url, one)) as client:
                assert await price(client) == 100
        async with asgi_client(create_app(shop_url, here)) as client:
            await client.put("/prices/1", params={"cents": 200})
        async with asgi_client(create_app(shop_url, there)) as client:
            assert await price(client) == seen


async def test_cache_that_cannot_be_reached(shop_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Without Redis the database answers, a write is committed, and the log says both."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    async with Redis(port=port) as redis, asgi_client(create_app(shop_url, RedisCache(redis))) as client:
        assert (await client.put("/prices/1", params={"cents": 200})).status_code == 200
        assert await price(client) == 200
    assert {record.levelname for record in caplog.records} == {"WARNING", "ERROR"}
