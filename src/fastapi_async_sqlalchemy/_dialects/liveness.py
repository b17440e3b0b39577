"""Pooled connections that the server has closed, found without asking it."""

from __future__ import annotations

import select
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.exc import DisconnectionError

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection


def replace_dead(engine: Engine) -> None:
    """Make an engine's pool replace a connection that its driver knows to be dead.

    ``pool_pre_ping`` also finds one that the driver does not know of, by a round trip each time.
    """
    driver = engine.dialect.driver
    if driver == "asyncpg":
        event.listen(engine, "checkout", _refuse_asyncpg)
    elif driver == "psycopg":
        event.listen(engine, "checkout", _refuse_psycopg)
    elif driver == "aiomysql":
        event.listen(engine, "checkout", _refuse_aiomysql)
    elif driver == "asyncmy":
        event.listen(engine, "checkout", _refuse_asyncmy)


def _refuse_asyncpg(_: DBAPIConnection, record: ConnectionPoolEntry, __: PoolProxiedConnection) -> None:
    driver: Any = record.driver_connection
    if driver.is_closed():
        raise _closed()


def _refuse_asyncmy(_: DBAPIConnection, record: ConnectionPoolEntry, __: PoolProxiedConnection) -> None:
    driver: Any = record.driver_connection
    if driver._stream_broken:
        raise _closed()


def _refuse_aiomysql(_: DBAPIConnection, record: ConnectionPoolEntry, __: PoolProxiedConnection) -> None:
    """Look at the socket: the stream may hold the server's last words, and then does not tell of its end."""
    driver: Any = record.driver_connection
    writer = driver._writer
    if writer is None or writer.is_closing() or _readable(writer.get_extra_info("socket").fileno()):
        raise _closed()


def _refuse_psycopg(_: DBAPIConnection, record: ConnectionPoolEntry, __: PoolProxiedConnection) -> None:
    """Look at the socket, and have the driver read what is there: it may be a notification."""
    driver: Any = record.driver_connection
    while not driver.closed and _readable(driver.fileno()):
        try:
            driver.pgconn.consume_input()
        except Exception as error:  # any error of psycopg's, which is not imported here
            raise _closed() from error
    if driver.closed:
        raise _closed()


def _closed() -> DisconnectionError:
    """Return the error by which SQLAlchemy's pool opens another connection."""
    return DisconnectionError("the server has closed the connection")


def _readable(descriptor: int) -> bool:
    """Whether a socket has something to read although nothing was asked."""
    if not hasattr(select, "poll"):  # Windows
        return bool(select.select([descriptor], [], [], 0)[0])
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))
