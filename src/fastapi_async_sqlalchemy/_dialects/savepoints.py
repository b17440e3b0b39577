"""Savepoints that stand for transactions: what COMMIT checks and undoes, database by database."""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn, Protocol, TypeAlias

from attrs import define, field

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

CommitFailure: TypeAlias = Literal["constraint", "conflict", "lost", "lost_after_commit"]
"""How a COMMIT fails: refused because of a constraint or a conflict, or with its connection lost."""

_ABORTED: Final = "25P02"
"""PostgreSQL's in_failed_sql_transaction."""


def _escaped(value: object) -> str:
    """Return a value for a literal between single quotes."""
    return str(value).replace("'", "''")


class Send(Protocol):
    """Send a statement on the real connection, and return its rows."""

    def __call__(self, statement: str, *, rows: bool = False) -> Any: ...


@define(eq=False, repr=False)
class Savepoints:
    """The behaviour of a database whose COMMIT checks nothing that its statements have not checked."""

    engine: Engine
    send: Send
    stays_open: bool = False
    """A COMMIT that is refused leaves its transaction open."""

    def begin(self) -> None:
        """Begin the transaction that is rolled back at the end."""
        self.send("BEGIN")

    def has_written(self) -> bool:
        """Whether the database knows of a write in the outer transaction, also by a function."""
        return False

    def restore_settings(self) -> None:
        """Repeat the settings of listeners to ``connect``, which a ROLLBACK has undone."""

    def open(self, name: str, *, read_only: bool, inside: bool) -> None:  # noqa: ARG002  # others need them
        """Begin a transaction; ``inside`` if another one is open that has set something."""
        self.send(f"SAVEPOINT {name}")

    def check(self) -> None:
        """Raise the error that COMMIT would raise; undo what lasts until COMMIT."""

    def resume(self, *, read_only: bool) -> None:
        """Go on with a transaction in which another one has ended."""

    def refuse_write(self) -> None:
        """Raise the error for a write in a read-only transaction, unless the database raises it itself."""

    def fail(self, failure: CommitFailure, constraint: str | None) -> NoReturn:
        """Raise the error of a COMMIT that is refused, with the name of a constraint if errors have it."""
        raise NotImplementedError


@define(eq=False, repr=False)
class _Postgresql(Savepoints):
    restore: str = ""

    def begin(self) -> None:
        self.restore = ""
        rows = self.send("SELECT name, setting FROM pg_settings WHERE source = 'session'", rows=True)
        for name, setting in rows:  # a listener to `connect` has made them
            self.restore += f" PERFORM set_config('{name}', '{_escaped(setting)}', false);"

    def has_written(self) -> bool:
        return bool(self.send("SELECT txid_current_if_assigned() IS NOT NULL", rows=True)[0][0])

    def restore_settings(self) -> None:
        if self.restore:
            self.send(f"DO $sandbox$ BEGIN {self.restore} END $sandbox$")

    def open(self, name: str, *, read_only: bool, inside: bool) -> None:
        self.send(f"SAVEPOINT {name}")
        if inside:
            self.send(f"DO $sandbox$ BEGIN {self._reset} END $sandbox$")
        if read_only:
            self.send("SET TRANSACTION READ ONLY")

    @property
    def _reset(self) -> str:
        return f"RESET ALL; RESET SESSION AUTHORIZATION; RESET ROLE;{self.restore}"

    def check(self) -> None:
        self.send(_CHECK.format(self._reset))

    def fail(self, failure: CommitFailure, constraint: str | None) -> NoReturn:
        code, message = _POSTGRESQL_FAILURES[failure]
        fields = f"ERRCODE = '{code}', MESSAGE = '{message}'"
        if constraint is not None:
            fields += f", CONSTRAINT = '{_escaped(constraint)}'"
        self.send(f"DO $sandbox$ BEGIN RAISE EXCEPTION USING {fields}; END $sandbox$")
        raise AssertionError(failure)


_CHECK: Final = """DO $sandbox$
DECLARE deferred text;
BEGIN
 SET CONSTRAINTS ALL IMMEDIATE;
 SELECT string_agg(format('%I.%I', n.nspname, c.conname), ', ') INTO deferred
 FROM pg_constraint c JOIN pg_namespace n ON n.oid = c.connamespace WHERE c.condeferred;
 IF deferred IS NOT NULL THEN EXECUTE 'SET CONSTRAINTS ' || deferred || ' DEFERRED'; END IF;
 {}
END $sandbox$"""
_POSTGRESQL_FAILURES: Final = MappingProxyType(
    {
        "constraint": (
            "23503",
            "insert or update violates a foreign key constraint (simulated by the sandbox)",
        ),
        "conflict": ("40001", "could not serialize access (simulated by the sandbox)"),
    }
)


@define(eq=False, repr=False)
class _Mysql(Savepoints):
    def begin(self) -> None:
        self.send("START TRANSACTION")

    def refuse_write(self) -> None:
        self.send(_SIGNAL.format("25006", 1792, "Cannot execute statement in a READ ONLY transaction"))

    def fail(self, failure: CommitFailure, constraint: str | None) -> NoReturn:
        state, code, message = _MYSQL_FAILURES[failure]
        if constraint is not None:
            message = _MYSQL_CONSTRAINT.format(_escaped(constraint))
        self.send(_SIGNAL.format(state, code, message))
        raise AssertionError(failure)


_SIGNAL: Final = "SIGNAL SQLSTATE '{}' SET MYSQL_ERRNO = {}, MESSAGE_TEXT = '{}'"
_MYSQL_CONSTRAINT: Final = "fails (simulated by the sandbox, CONSTRAINT `{}` FOREIGN KEY)"
"""The error's text has room for 128 characters, and a name may have 64."""
_MYSQL_FAILURES: Final = MappingProxyType(
    {
        "constraint": ("23000", 1452, "a foreign key constraint fails (simulated by the sandbox)"),
        "conflict": ("40001", 1213, "Deadlock found (simulated by the sandbox)"),
    }
)


@define(eq=False, repr=False)
class _Sqlite(Savepoints):
    stays_open: bool = True
    _query_only: bool = False
    _always: bool = False
    """A listener to ``connect`` has made the connection read-only."""
    _before: frozenset[tuple[Any, ...]] = field(default=frozenset[tuple[Any, ...]]())
    """The rows that violated a foreign key before the sandbox was opened."""

    def begin(self) -> None:
        self._always = self._query_only = bool(self.send("PRAGMA query_only", rows=True)[0][0])
        self.send("BEGIN")
        self._before = self._violations()

    def open(self, name: str, *, read_only: bool, inside: bool) -> None:  # noqa: ARG002  # PostgreSQL's
        self._set_query_only(value=False)  # of a transaction around this one
        self.send(f"SAVEPOINT {name}")
        self._set_query_only(value=read_only)

    def resume(self, *, read_only: bool) -> None:
        self._set_query_only(value=read_only)

    def _set_query_only(self, *, value: bool) -> None:
        if not self._always and value != self._query_only:
            self.send(f"PRAGMA query_only = {int(value)}")
            self._query_only = value

    def check(self) -> None:
        """Check deferred foreign keys, which SQLite checks only at a real COMMIT."""
        if self._violations() - self._before:
            self._raise(
                "IntegrityError", "FOREIGN KEY constraint failed", 787, "SQLITE_CONSTRAINT_FOREIGNKEY"
            )
        self.send("PRAGMA defer_foreign_keys = OFF")

    def _violations(self) -> frozenset[tuple[Any, ...]]:
        if not self.send("PRAGMA foreign_keys", rows=True)[0][0]:
            return frozenset()
        return frozenset(tuple(row) for row in self.send("PRAGMA foreign_key_check", rows=True))

    def _is_check(self, constraint: str) -> bool:
        """Whether a table has a CHECK of that name: SQLite's errors name no other constraint."""
        check = re.compile(rf"CONSTRAINT\s+[\"`\[]?{re.escape(constraint)}[\"`\]]?\s+CHECK\b", re.IGNORECASE)
        tables = self.send("SELECT sql FROM sqlite_master WHERE type = 'table'", rows=True)
        return any(check.search(sql) for (sql,) in tables)

    def _raise(self, kind: str, message: str, code: int, name: str) -> NoReturn:
        error = getattr(self.engine.dialect.dbapi, kind)(message)
        error.sqlite_errorcode, error.sqlite_errorname = code, name
        raise error

    def fail(self, failure: CommitFailure, constraint: str | None) -> NoReturn:
        if failure == "conflict":
            self._raise("OperationalError", "database is locked", 5, "SQLITE_BUSY")
        if constraint is not None and self._is_check(constraint):
            self._raise(
                "IntegrityError", f"CHECK constraint failed: {constraint}", 275, "SQLITE_CONSTRAINT_CHECK"
            )
        self._raise("IntegrityError", "FOREIGN KEY constraint failed", 787, "SQLITE_CONSTRAINT_FOREIGNKEY")


_KINDS: Final = MappingProxyType[str, type[Savepoints]](
    {
        "postgresql": _Postgresql,
        "mysql": _Mysql,
        "mariadb": _Mysql,
        "sqlite": _Sqlite,
    }
)


def savepoints_of(engine: Engine, send: Send) -> Savepoints:
    """Return the behaviour of an engine's database."""
    return _KINDS[engine.dialect.name](engine, send)


def has_given_up(error: Exception) -> bool:
    """Whether a statement was refused because the transaction had failed before: COMMIT would undo it."""
    return getattr(error, "sqlstate", None) == _ABORTED


_LOST: Final = MappingProxyType[str, tuple[str, tuple[object, ...]]](
    {
        "asyncpg": ("Error", ("connection was closed in the middle of operation",)),
        "psycopg": ("OperationalError", ("the connection is lost",)),
        "aiomysql": ("OperationalError", (2013, "Lost connection to MySQL server during query")),
        "asyncmy": ("OperationalError", (2013, "Lost connection to MySQL server during query")),
        "aiosqlite": ("OperationalError", ("no active connection",)),
    }
)


def connection_lost(engine: Engine) -> Exception:
    """Return the driver's error for a connection that has broken."""
    kind, arguments = _LOST[engine.dialect.driver]
    error: Exception = getattr(engine.dialect.dbapi, kind)(*arguments)
    return error
