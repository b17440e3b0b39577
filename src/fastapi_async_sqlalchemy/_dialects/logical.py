"""Logical connections for a test sandbox: each transaction is a savepoint of the one real connection's.

A logical connection takes the place of a driver's adapter below SQLAlchemy, so that a session, an engine and
the caller's own SQL begin and end their transactions as they do in production.
"""

from __future__ import annotations

import asyncio
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Protocol

from attrs import Factory, define
from sqlalchemy.util import greenlet_spawn

from . import liveness, loops
from .meaning import Meaning, meaning_of
from .statements import verb_of, writes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from weakref import ref

    from sqlalchemy.engine import Engine
    from sqlalchemy.orm import Session

_SETTINGS: Final = "set_config"


class Server(Protocol):
    """The side of the real connection."""

    @property
    def real(self) -> Any:
        """The driver's adapter."""

    @property
    def dialect(self) -> str:
        """The name of the database's dialect."""
        ...

    def is_open(self, transaction: Logical) -> bool:
        """Whether a transaction has begun."""
        ...

    def enter(self, transaction: Logical) -> None:
        """Begin a transaction, unless it has begun; wait for one's turn."""

    def check(self) -> None:
        """Raise the error that COMMIT would raise."""

    def end(self, transaction: Logical, *, commit: bool) -> None:
        """End a transaction, if one has begun."""

    def lose(self, transaction: Logical) -> None:
        """End a transaction whose connection is discarded."""

    def before(self, transaction: Logical, statement: str) -> None:
        """Record a statement that is about to be sent, or refuse it."""


@define(eq=False, repr=False)
class Logical:
    """The state of one logical connection, and of the transaction that is open on it."""

    server: Server
    autocommits: bool
    read_only: bool = False
    """Its transactions refuse to write."""
    lost: bool = False
    """The connection is to look as if the network had broken."""
    task: asyncio.Task[Any] | None = None
    """The task that began the transaction."""
    session: ref[Session] | None = None
    """The session that began it, if one did."""
    explicit: bool = False
    """In autocommit, BEGIN was sent: the transaction goes on until its end is sent."""
    wrote: bool = False
    savepoints: dict[str, bool] = Factory(dict[str, bool])
    """The application's open savepoints, and whether another transaction was committed inside each."""
    holds: bool = False
    """Another transaction was committed inside it, after it had written."""
    settings: list[tuple[str, tuple[Any, ...]]] = Factory(list["tuple[str, tuple[Any, ...]]"])
    """The statements that have set something for the transaction, with their parameters."""

    def begun(self, task: asyncio.Task[Any] | None, session: ref[Session] | None) -> None:
        """Start anew for the next transaction."""
        self.task, self.session = task, session
        self.wrote = self.holds = self.explicit = False
        self.savepoints, self.settings = {}, []

    def hold(self) -> None:
        """Record that another transaction was committed inside this one, which must not undo it."""
        self.holds = self.wrote or bool(self.savepoints)
        self.savepoints = dict.fromkeys(self.savepoints, True)

    def follow_savepoint(self, statement: str, verb: str) -> bool:
        """Follow a savepoint of the application; return whether a rollback to it would undo a COMMIT."""
        name = statement.rsplit(maxsplit=1)[-1]
        if verb == "SAVEPOINT":
            self.savepoints.pop(name, None)
            self.savepoints[name] = False
        elif name in self.savepoints:
            names = list(self.savepoints)
            inside = names[names.index(name) :]
            if verb == "ROLLBACK":
                return any(self.savepoints[one] for one in inside)
            for one in inside:
                del self.savepoints[one]
        return False

    def run(self, send: Callable[..., Any], statement: str, *parameters: Any) -> Any:
        """Do what a statement means inside a sandbox."""
        server = self.server
        meaning = meaning_of(server.dialect, statement)
        if meaning is Meaning.COMMIT or meaning is Meaning.ROLLBACK:
            return server.end(self, commit=meaning is Meaning.COMMIT)
        if meaning is Meaning.NOTHING:
            return None
        if meaning is Meaning.READ_ONLY or meaning is Meaning.READ_WRITE:
            self.read_only = meaning is Meaning.READ_ONLY
            return None
        if meaning is Meaning.PREPARE:
            return server.check()
        server.enter(self)
        if meaning is Meaning.BEGIN:
            self.explicit = True
            return None
        return self._send(send, statement, parameters)

    def _send(self, send: Callable[..., Any], statement: str, parameters: tuple[Any, ...]) -> Any:
        server, verb = self.server, verb_of(statement)
        server.before(self, statement)
        self.wrote = self.wrote or writes(statement, verb)
        try:
            result = send(statement, *parameters)
        except Exception:
            if self.autocommits and not self.explicit:
                server.end(self, commit=False)
            raise
        if verb == "SET" or _SETTINGS in statement:
            self.settings.append((statement, parameters))
        if self.autocommits and not self.explicit:
            server.end(self, commit=True)
        return result


class LogicalCursor:
    """A cursor of the real connection that begins its logical connection's transaction."""

    def __init__(self, logical: Logical, real: Any) -> None:
        vars(self).update(_logical=logical, _cursor=real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cursor, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._cursor, name, value)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._cursor)

    def execute(self, operation: str, *parameters: Any) -> Any:
        """Run a statement."""
        return self._logical.run(self._cursor.execute, operation, *parameters)

    def executemany(self, operation: str, parameters: Any) -> Any:
        """Run a statement for each of several sets of parameters."""
        return self._logical.run(self._cursor.executemany, operation, parameters)


class LogicalConnection:
    """A connection as SQLAlchemy sees it; what it does not have, the driver's adapter has."""

    def __init__(self, logical: Logical) -> None:
        self._logical = logical

    def __getattr__(self, name: str) -> Any:
        return getattr(self._logical.server.real, name)

    def cursor(self, *args: Any, **kwargs: Any) -> LogicalCursor:
        """Return a cursor; nothing is sent."""
        return LogicalCursor(self._logical, self._logical.server.real.cursor(*args, **kwargs))

    def execute(self, operation: str, *parameters: Any) -> LogicalCursor:
        """Run a statement in a new cursor."""
        cursor = self.cursor()
        cursor.execute(operation, *parameters)
        return cursor

    def commit(self) -> None:
        """Release the savepoint, once COMMIT would succeed."""
        self._logical.server.end(self._logical, commit=True)

    def rollback(self) -> None:
        """Undo what came after the savepoint."""
        self._logical.server.end(self._logical, commit=False)

    def close(self) -> None:
        """Discard the connection, and what is open on it."""
        self._logical.server.lose(self._logical)

    terminate = close

    def ping(self, *_: object) -> None:
        """Do nothing: the connection is as alive as the real one."""


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
