"""Connections that are opened before they are needed."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from sqlalchemy.pool import QueuePool

from .._arguments.checks import optional_count
from ..exceptions import ConfigurationError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine


def warm_up_of(value: object) -> int:
    """Validate how many connections to open at the start; 0 if that was not requested."""
    return optional_count("pool_warm_up", value) or 0


def require_room(engine: AsyncEngine, count: int) -> None:
    """Raise ``ConfigurationError`` if the pool would not keep so many connections."""
    pool, name = engine.sync_engine.pool, "pool_warm_up"
    if not count:
        return
    if not isinstance(pool, QueuePool):
        message = (
            f"{name} needs a pool that keeps several connections: leave it out for {type(pool).__name__}."
        )
        raise ConfigurationError(message)
    if 0 < pool.size() < count:  # a size of 0 is no limit
        wanted = f"at most the pool_size of {pool.size()}"
        raise ConfigurationError(name, wanted, count)


async def warm_up(engine: AsyncEngine, count: int) -> None:
    """Open connections and leave them in the pool; the first one alone, as SQLAlchemy then asks for facts."""
    if not count:
        return
    require_room(engine, count)  # the engine may have been bound after the count was given
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(engine.connect())
        opening = (stack.enter_async_context(engine.connect()) for _ in range(count - 1))
        for one in await asyncio.gather(*opening, return_exceptions=True):
            if isinstance(one, BaseException):
                raise one
