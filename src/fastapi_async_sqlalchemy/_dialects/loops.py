"""Event loops and processes: the owner of a pooled connection, and its replacement for another loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import event
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import QueuePool

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.pool import ConnectionPoolEntry, Pool, PoolProxiedConnection

_LOOP_BOUND: Final = frozenset({"asyncpg", "aiomysql", "asyncmy"})
"""Drivers whose connections serve only the event loop in which they were opened."""
_LOOP: Final = "fastapi_async_sqlalchemy.loop"


def is_loop_bound(engine: Engine) -> bool:
    """Whether an engine keeps connections that serve only one event loop."""
    return engine.dialect.driver in _LOOP_BOUND and isinstance(engine.pool, QueuePool)


def serve_any_loop(engine: Engine) -> None:
    """Make an engine's pool replace a connection that another event loop has opened."""
    if engine.dialect.driver in _LOOP_BOUND:
        event.listen(engine, "checkout", _replace_foreign)


def forget_connections(engine: Engine) -> Pool:
    """Give an engine an empty pool; return the old one, whose connections are not touched."""
    old = engine.pool
    engine.dispose(close=False)
    return old


def _replace_foreign(
    _: DBAPIConnection, record: ConnectionPoolEntry, checked_out: PoolProxiedConnection
) -> None:
    """Skip a connection of another loop, by SQLAlchemy's recipe for connections of another process."""
    running = asyncio.get_running_loop()
    loop = record.info.get(_LOOP)
    if loop is running:
        return
    driver: Any = record.driver_connection
    if loop is None:
        # private in each of these drivers; a connection may be older than the first listener on its engine
        record.info[_LOOP] = loop = getattr(driver, "_loop", None) or running
        if loop is running:
            return
    if loop.is_running():  # in another thread, which closes it
        loop.call_soon_threadsafe(getattr(driver, "terminate", driver.close))
    record.dbapi_connection = checked_out.dbapi_connection = None  # type: ignore[misc]  # the recipe
    message = "the connection belongs to another event loop"
    raise DisconnectionError(message)
