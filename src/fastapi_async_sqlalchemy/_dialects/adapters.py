"""Logical connections as SQLAlchemy's dialects, and this package, know those of each driver."""

from __future__ import annotations

import asyncio
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.util import greenlet_spawn

from . import liveness, loops
from .logical import Logical, LogicalConnection

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine


def prepares_statements(adapter: Any) -> bool:
    """Whether psycopg prepares statements that are sent often; if so, have it stop.

    An error inside a savepoint leaves it with statements that PostgreSQL does not know.
    """
    driver = adapter.driver_connection
    prepares = getattr(driver, "prepare_threshold", None) is not None
    if prepares:
        driver.prepare_threshold = None
    return prepares


class _Asyncpg(LogicalConnection):
    """What SQLAlchemy's dialect for asyncpg sets and asks for."""

    deferrable: bool = False
    isolation_level: str | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "_execute_mutex":  # the real one is taken when the statement reaches it
            return asyncio.Lock()
        return super().__getattr__(name)

    @property
    def driver_connection(self) -> _AsyncpgDriver:
        return _AsyncpgDriver(self)

    _connection = driver_connection

    @property
    def readonly(self) -> bool:
        return self._logical.read_only

    @readonly.setter
    def readonly(self, value: bool) -> None:
        self._logical.read_only = value

    @property
    def autocommit(self) -> bool:
        return self._logical.autocommits

    @autocommit.setter
    def autocommit(self, value: bool) -> None:
        self._logical.autocommits = value

    def set_isolation_level(self, level: str) -> None:
        self.rollback()
        self.isolation_level, self._logical.autocommits = level, level == "autocommit"


class _AsyncpgDriver:
    """What this package asks of asyncpg's own connection."""

    def __init__(self, connection: LogicalConnection) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection._logical.server.real.driver_connection, name)

    def is_in_transaction(self) -> bool:
        logical = self._connection._logical
        return logical.server.is_open(logical)

    def is_closed(self) -> bool:
        return self._connection._logical.lost

    async def execute(self, statement: str) -> None:
        await greenlet_spawn(self._connection.execute, statement)


class _Psycopg(LogicalConnection):
    """What SQLAlchemy's dialect for psycopg sets and asks for."""

    deferrable: bool | None = None

    @property
    def driver_connection(self) -> _PsycopgDriver:
        return _PsycopgDriver(self._logical)

    _connection = driver_connection

    @property
    def closed(self) -> bool:
        return self._logical.lost

    broken = closed

    @property
    def read_only(self) -> bool:
        return self._logical.read_only

    def set_read_only(self, value: bool | None) -> None:  # noqa: FBT001  # psycopg's
        self._logical.read_only = bool(value)

    def set_deferrable(self, value: bool | None) -> None:  # noqa: FBT001  # psycopg's
        self.deferrable = value

    def set_isolation_level(self, value: object) -> None:
        """Do nothing: the sandbox has one level."""

    @property
    def autocommit(self) -> bool:
        return self._logical.autocommits

    @autocommit.setter
    def autocommit(self, value: bool) -> None:
        self._logical.autocommits = value

    def set_autocommit(self, value: bool) -> None:  # noqa: FBT001  # psycopg's
        self._logical.autocommits = value

    def tpc_begin(self, _: object) -> None:
        """Do nothing: the transaction begins with its first statement."""

    def tpc_prepare(self) -> None:
        self._logical.server.check()

    def tpc_commit(self, _: object = None) -> None:
        self.commit()

    def tpc_rollback(self, _: object = None) -> None:
        self.rollback()


class _PsycopgDriver:
    """What this package asks of psycopg's own connection, and of libpq's below it."""

    def __init__(self, logical: Logical) -> None:
        self._logical = logical

    def __getattr__(self, name: str) -> Any:
        return getattr(self._logical.server.real.driver_connection, name)

    @property
    def closed(self) -> bool:
        return self._logical.lost

    @property
    def autocommit(self) -> bool:
        return self._logical.autocommits

    @property
    def pgconn(self) -> _PsycopgDriver:
        return self

    @property
    def transaction_status(self) -> bool:
        return self._logical.server.is_open(self._logical)


class _Mysql(LogicalConnection):
    """What SQLAlchemy's dialects for MariaDB set and ask for."""

    def autocommit(self, value: bool) -> None:  # noqa: FBT001  # MariaDB's drivers'
        self._logical.autocommits = value

    def get_autocommit(self) -> bool:
        return self._logical.autocommits


class _Sqlite(LogicalConnection):
    """What SQLAlchemy's dialect for SQLite sets and asks for."""

    @property
    def isolation_level(self) -> str | None:
        return None if self._logical.autocommits else ""

    @isolation_level.setter
    def isolation_level(self, value: str | None) -> None:
        self._logical.autocommits = value is None


_KINDS: Final = MappingProxyType[str, type[LogicalConnection]](
    {
        "asyncpg": _Asyncpg,
        "psycopg": _Psycopg,
        "aiomysql": _Mysql,
        "asyncmy": _Mysql,
        "aiosqlite": _Sqlite,
    }
)


def looks_at_driver(listener: object) -> bool:
    """Whether a listener to a pool's events looks at the connection itself, which others may use."""
    return getattr(listener, "__module__", None) in {liveness.__name__, loops.__name__}


def knows(engine: Engine) -> bool:
    """Whether there are logical connections for an engine's driver."""
    return engine.dialect.driver in _KINDS


def logical_connection(engine: Engine, logical: Logical) -> LogicalConnection:
    """Return a logical connection for SQLAlchemy's dialect of an engine."""
    return _KINDS[engine.dialect.driver](logical)
