"""Prices that are read through a cache, which never stores uncommitted values.

`make example NAME=caching` serves them with a cache in memory. With Redis, pass a RedisCache to
`create_app()`.
"""

import logging
from collections.abc import AsyncGenerator, Awaitable
from contextlib import asynccontextmanager
from functools import partial
from time import monotonic
from typing import Protocol, cast

from attrs import define, field
from fastapi import APIRouter, FastAPI, HTTPException
from pydantic import BaseModel, ConfigDict
from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.quickstart import serve
from fastapi_async_sqlalchemy import create_middleware_and_session_proxy

KEEP = 30.0
"""The maximum age of a cached value in seconds, even if an invalidation was lost."""

CacheMiddleware, db = create_middleware_and_session_proxy()
logger = logging.getLogger(__name__)


class Cache(Protocol):
    """A cache of versioned values; an older version never replaces a newer one."""

    async def get(self, key: str) -> str | None:
        """Return the cached value."""
        ...

    async def put(self, key: str, version: int, value: str) -> None:
        """Store a value, unless there is a newer one."""
        ...


@define
class MemoryCache:
    """A cache in one process."""

    _values: dict[str, tuple[int, str, float]] = field(factory=dict[str, tuple[int, str, float]])

    async def get(self, key: str) -> str | None:
        """Return the cached value."""
        _, value, until = self._values.get(key, (0, None, 0.0))
        return value if monotonic() < until else None

    async def put(self, key: str, version: int, value: str) -> None:
        """Store a value, unless there is a newer one."""
        known, _, until = self._values.get(key, (0, "", 0.0))
        if version >= known or monotonic() >= until:
            self._values[key] = (version, value, monotonic() + KEEP)


PUT = """
if tonumber(ARGV[1]) >= tonumber(redis.call('HGET', KEYS[1], 'version') or 0) then
    redis.call('HSET', KEYS[1], 'version', ARGV[1], 'value', ARGV[2])
    redis.call('PEXPIRE', KEYS[1], ARGV[3])
end
"""


@define
class RedisCache:
    """A cache for all processes; if it cannot be reached, prices come from the database."""

    _redis: Redis

    async def get(self, key: str) -> str | None:
        """Return the cached value."""
        try:
            return await cast("Awaitable[str | None]", self._redis.hget(key, "value"))
        except RedisError:
            logger.warning("the cache cannot be read", exc_info=True)
            return None

    async def put(self, key: str, version: int, value: str) -> None:
        """Store a value, unless there is a newer one; Redis runs the script atomically."""
        milliseconds = int(KEEP * 1000)
        await cast("Awaitable[object]", self._redis.eval(PUT, 1, key, f"{version}", value, f"{milliseconds}"))


class Base(DeclarativeBase):
    """The tables."""


class Product(Base):
    """A product; SQLAlchemy counts its versions."""

    __tablename__ = "product"

    id: Mapped[int] = mapped_column(primary_key=True)
    cents: Mapped[int]
    version: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012  # SQLAlchemy's own way


class Price(BaseModel):
    """A price as it is returned to clients and cached."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    cents: int


@define
class Prices:
    """The prices, read through a cache."""

    cache: Cache

    async def read(self, number: int) -> Price:
        """Return a price from the cache, or from the database if it is not cached."""
        cached = await self.cache.get(f"price:{number}")
        if cached is not None:
            return Price.model_validate_json(cached)
        product = await db.session.get(Product, number)
        if product is None:
            raise HTTPException(404)
        db.unit.on_commit(partial(self.remember, product))
        return Price.model_validate(product)

    async def write(self, number: int, cents: int) -> Price:
        """Change a price; readers see the old one until COMMIT."""
        product = await db.session.get(Product, number, with_for_update=True)
        if product is None:
            raise HTTPException(404)
        product.cents = cents
        db.unit.on_commit(partial(self.remember, product))
        return Price.model_validate(product)

    async def remember(self, product: Product) -> None:
        """Cache the committed price."""
        price = Price.model_validate(product)
        await self.cache.put(f"price:{product.id}", product.version, price.model_dump_json())


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    """Create the table with one product."""
    await db.create_all(Base.metadata)
    async with db.begin() as unit:
        if await unit.session.get(Product, 1) is None:
            unit.session.add(Product(id=1, cents=100))
    yield


def create_app(url: str, cache: Cache) -> FastAPI:
    """Create the application; its responses tell how long they have used the database."""
    prices, router = Prices(cache), APIRouter()
    router.add_api_route("/prices/{number}", prices.read)
    router.add_api_route("/prices/{number}", prices.write, methods=["PUT"])
    app = FastAPI(title="Prices", lifespan=lifespan)
    app.add_middleware(CacheMiddleware, db_url=url, commit_on_exit=True, server_timing=True)
    app.include_router(router)
    return app


GUIDE = """
Open  {url}/docs

Read a price twice: the second response has no header Server-Timing, because it did not use the database.
  curl -i {url}/prices/1
  curl -i {url}/prices/1
Change the price, then read the new one; it comes from the cache, which was filled after COMMIT.
  curl -i -X PUT '{url}/prices/1?cents=250'
  curl -i {url}/prices/1
"""


if __name__ == "__main__":
    serve(lambda url: create_app(url, MemoryCache()), GUIDE)
