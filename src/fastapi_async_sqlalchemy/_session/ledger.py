"""The record of one transaction, as far as its end depends on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from attrs import Factory, define
from sqlalchemy.exc import InterfaceError

from .._dialects.statements import decides, has_writing_part

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, ExceptionContext
    from sqlalchemy.orm import InstanceState, SessionTransaction


@define(eq=False, repr=False)
class SavepointEntry:
    """A SAVEPOINT that was sent, and the state of the ledger before it."""

    name: str
    written: int
    failure: BaseException | None
    owner: SessionTransaction | None = None
    """The session's block that sent it; None for one in the caller's own SQL."""


@define(eq=False, repr=False)
class Ledger:
    """The record of one transaction; the next one begins with a new ledger."""

    written: int = 0
    """The number of statements other than reads."""
    failure: BaseException | None = None
    """A statement's error that no savepoint has undone."""
    written_on: tuple[Connection, ...] = ()
    """The connections of those statements."""
    committed_on: tuple[Connection, ...] = ()
    """Those of them that were committed before COMMIT failed on another one."""
    failed_on: tuple[Connection, ...] = ()
    """The connections of such errors: a session may use several engines."""
    begun: bool = False
    """User code began the transaction explicitly, and ends it."""
    begun_on: Connection | None = None
    """The connection on which SQLite was in the transaction before its last statement other than a SELECT."""
    lost: bool = False
    """The database has rolled the transaction back without being asked."""
    unknown: bool = False
    """The connection broke, or the task was cancelled, while COMMIT was under way."""
    savepoints: list[SavepointEntry] = Factory(list[SavepointEntry])
    originals: WeakKeyDictionary[InstanceState[Any], dict[str, Any]] = Factory(
        WeakKeyDictionary["InstanceState[Any]", "dict[str, Any]"]
    )
    """The values of attributes before the transaction changed them, by object."""

    def note_statement(self, statement: str, verb: str, connection: Connection) -> None:
        """Record a statement that is about to be sent and may leave something to commit."""
        if verb == "SAVEPOINT":
            name = statement.rsplit(maxsplit=1)[-1]
            self.savepoints.append(SavepointEntry(name, self.written, self.failure))
        elif verb == "RELEASE":
            self._end_savepoint(statement)
        elif verb == "ROLLBACK":  # ROLLBACK TO SAVEPOINT: later statements no longer count
            entry = self._end_savepoint(statement)
            if entry is not None:
                self.savepoints.append(entry)  # it may be rolled back to again
                self.written, self.failure = entry.written, entry.failure
        elif verb != "WITH" or has_writing_part(statement):
            self.written += 1
            if connection not in self.written_on:
                self.written_on += (connection,)

    def _end_savepoint(self, statement: str) -> SavepointEntry | None:
        """Remove the last savepoint with the name at a statement's end, and those inside it."""
        name = statement.rsplit(maxsplit=1)[-1]
        for at in range(len(self.savepoints) - 1, -1, -1):
            entry = self.savepoints[at]
            if entry.name == name:
                del self.savepoints[at:]
                return entry
        return None

    def name_owner(self, transaction: SessionTransaction) -> None:
        """Record which of the session's blocks has sent the last SAVEPOINT."""
        if self.savepoints:
            self.savepoints[-1].owner = transaction

    def end_block(self, transaction: SessionTransaction) -> None:
        """Forget the savepoints of a session's block that has ended, and those inside it."""
        owned = next((at for at, one in enumerate(self.savepoints) if one.owner is transaction), None)
        if owned is not None:
            del self.savepoints[owned:]

    def note_error(
        self, context: ExceptionContext, statement: str | None, *, committing: bool, xid: str
    ) -> bool:
        """Record an error; return whether it leaves the outcome of COMMIT unknown.

        ``statement`` is None if COMMIT, ROLLBACK or the like failed. ``xid`` is the name of a transaction
        that takes part in a two-phase commit.
        """
        # an error that is not the database's own does not reveal the outcome of a COMMIT
        cut = context.is_disconnect or context.sqlalchemy_exception is None
        # a driver refuses COMMIT while another task uses the connection, and would refuse ROLLBACK, too
        unsent = not cut and isinstance(context.sqlalchemy_exception, InterfaceError)
        if statement is None and (not committing or unsent):  # its transaction may still be open
            context.is_disconnect = True
            context.invalidate_pool_on_disconnect = False
        elif statement is not None and not (cut and decides(statement, xid)):
            self.failure = context.sqlalchemy_exception or context.original_exception
            if context.connection is not None and context.connection not in self.failed_on:
                self.failed_on += (context.connection,)
        elif cut:
            self.unknown = context.is_disconnect = True
            return True
        return False

    def forgive(self) -> None:
        """Forget the errors, after every connection has answered."""
        self.failure, self.failed_on = None, ()


BLANK: Final = Ledger()
"""The ledger of every transaction that has only read; never written to."""
