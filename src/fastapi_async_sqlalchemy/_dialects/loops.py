"""Event loops and processes: the owner of a pooled connection, and its replacement for another loop."""

from __future__ import annotations

import asyncio
from contextlib import suppress
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


def has_queue(engine: Engine) -> bool:
    """Whether an engine's connections wait in a queue, which serves one event loop at a time.

    asyncio's queue belongs to the loop in which somebody first had to wait for it, whatever the driver.
    """
    return isinstance(engine.pool, QueuePool)


def renew_queue(engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
    """Give a pool a queue for another event loop, with the connections that serve that one, too.

    A connection that serves another loop alone must go before the pool tests it (``pool_pre_ping``).
    """
    for record in _requeue(engine.pool):
        if engine.dialect.driver in _LOOP_BOUND and record.dbapi_connection is not None:
            own = _loop_of(record)
            if own is not None and own is not loop:
                _end_in(own, record)
                record.dbapi_connection = None  # type: ignore[misc]  # SQLAlchemy's recipe; it connects again


def leave_to_parent(engine: Engine, forked: float) -> list[DBAPIConnection]:
    """Empty the pool of connections that are older than this process; return them, not touched."""
    kept: list[DBAPIConnection] = []
    for record in _requeue(engine.pool):
        opened: float = getattr(record, "starttime")  # noqa: B009  # not of the entry's public interface
        if record.dbapi_connection is not None and opened < forked:
            kept.append(record.dbapi_connection)
            record.dbapi_connection = None  # type: ignore[misc]  # as above
    return kept


def _requeue(pool: Pool) -> list[ConnectionPoolEntry]:
    """Give a pool a new queue with its idle connections, and return these."""
    records: list[ConnectionPoolEntry] = []
    if isinstance(pool, QueuePool):
        old: Any = pool._pool  # private of QueuePool: its idle connections have no public name
        new = type(old)(old.maxsize, old.use_lifo)
        while old.qsize():
            records.append(old.get(block=False))
            new.put_nowait(records[-1])
        pool._pool = new
    return records


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
    if loop is None:
        # a connection may be older than the first look at its engine
        record.info[_LOOP] = loop = _loop_of(record) or running
        if loop is running:
            return
    _end_in(loop, record)
    record.dbapi_connection = checked_out.dbapi_connection = None  # type: ignore[misc]  # the recipe
    message = "the connection belongs to another event loop"
    raise DisconnectionError(message)


def _loop_of(record: ConnectionPoolEntry) -> asyncio.AbstractEventLoop | None:
    """Return the loop in which a connection was opened, which each of these drivers keeps privately."""
    loop: asyncio.AbstractEventLoop | None = getattr(record.driver_connection, "_loop", None)
    return loop


def _end_in(loop: asyncio.AbstractEventLoop, record: ConnectionPoolEntry) -> None:
    """Have the loop that a connection belongs to close it, as soon as it runs; one that has ended cannot."""
    driver: Any = record.driver_connection
    with suppress(RuntimeError):  # it has just been closed
        if not loop.is_closed():
            loop.call_soon_threadsafe(getattr(driver, "terminate", driver.close))
