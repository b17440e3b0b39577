"""Engines that are created here, which spare a driver's round trips that do nothing."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

from .._arguments.engines import create_engine

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sqlalchemy.engine import Engine
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.ext.asyncio import AsyncEngine

_ASKS_NOTHING: Final = frozenset({"aiomysql", "asyncmy"})
"""Drivers that send a ROLLBACK whether or not a transaction is open."""
_ENDED: Final = "fastapi_async_sqlalchemy.ended"
"""When a connection sent its last statement before its transaction ended, by the driver's own clock."""


def make_engine(name: str, url: object, engine_args: Mapping[str, Any] | None) -> AsyncEngine:
    """Create an engine; raise ``ConfigurationError`` for every mistake in its arguments."""
    engine = create_engine(name, url, engine_args)
    if engine.dialect.driver in _ASKS_NOTHING:
        _end_once(engine.sync_engine)
    return engine


def _end_once(engine: Engine) -> None:
    """Make an engine send no ROLLBACK after a transaction has ended: SQLAlchemy's pool sends a second one."""
    dialect: Any = engine.dialect  # our own
    dialect.do_rollback = partial(_roll_back, dialect.do_rollback)
    dialect.do_commit = partial(_commit, dialect.do_commit)


def _roll_back(roll_back: Callable[[DBAPIConnection], None], connection: Any) -> None:
    if not is_settled(connection):
        roll_back(connection)
        note_end(connection)


def _commit(commit: Callable[[DBAPIConnection], None], connection: Any) -> None:
    commit(connection)
    note_end(connection)


def is_settled(connection: Any) -> bool:
    """Whether nothing was sent since the end of a transaction, and the server said that none is open.

    An answer that is an error does not say so, but then the driver's clock has moved on.
    """
    info, driver = connection.record_info, connection.driver_connection
    nothing_sent = info is not None and info.get(_ENDED) == driver.last_usage
    return nothing_sent and not driver.get_transaction_status()


def note_end(connection: Any) -> None:
    """Record that nothing was sent since the end of a transaction."""
    if connection.record_info is not None:  # a detached connection has none
        connection.record_info[_ENDED] = connection.driver_connection.last_usage


def is_settable(connection: Any) -> bool:
    """Whether a connection is outside of a transaction, and begins one by its next statement."""
    driver = connection.driver_connection
    return not (driver.get_transaction_status() or driver.get_autocommit())
