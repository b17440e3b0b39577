"""Logical connections for a test sandbox: each transaction is a savepoint of the one real connection's.

A logical connection takes the place of a driver's adapter below SQLAlchemy, so that a session, an engine and
the caller's own SQL begin and end their transactions as they do in production.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

from attrs import Factory, define

from ..exceptions import SandboxError
from .meaning import Meaning, meaning_of
from .pragmas import BEGINS, needs_no_transaction
from .statements import verb_of, writes

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator
    from weakref import ref

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

    def set_up(self, transaction: Logical, send: Callable[..., Any], statement: str) -> Any:
        """Send a statement that has no effect inside a transaction, or refuse it."""


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
    refuses: str = ""
    """Why no statement can be sent, while listeners to ``connect`` run."""
    explicit: bool = False
    """In autocommit, BEGIN was sent: the transaction goes on until its end is sent."""
    wrote: bool = False
    begun_by_driver: bool = False
    """SQLite's driver would have sent BEGIN: it does so before some statements alone."""
    savepoints: dict[str, bool] = Factory(dict[str, bool])
    """The application's open savepoints, and whether another transaction was committed inside each."""
    holds: bool = False
    """Another transaction was committed inside it, after it had written."""
    settings: list[tuple[str, tuple[Any, ...]]] = Factory(list["tuple[str, tuple[Any, ...]]"])
    """The statements that have set something for the transaction, with their parameters."""

    def begun(self, task: asyncio.Task[Any] | None, session: ref[Session] | None) -> None:
        """Start anew for the next transaction."""
        self.task, self.session = task, session
        self.wrote = self.holds = self.explicit = self.begun_by_driver = False
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
        if self.refuses:
            raise SandboxError(self.refuses)
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

    def _sets_up(self, statement: str) -> bool:
        """Whether a PRAGMA needs that no transaction is open, and in production none would be."""
        open_there = self.explicit or self.begun_by_driver or bool(self.savepoints)
        return not open_there and needs_no_transaction(statement)

    def _send(self, send: Callable[..., Any], statement: str, parameters: tuple[Any, ...]) -> Any:
        server, verb = self.server, verb_of(statement)
        server.before(self, statement)
        self.wrote = self.wrote or writes(statement, verb)
        self.begun_by_driver = self.begun_by_driver or verb in BEGINS
        try:
            if server.dialect == "sqlite" and verb == "PRAGMA" and self._sets_up(statement):
                result = server.set_up(self, send, statement)
            else:
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
