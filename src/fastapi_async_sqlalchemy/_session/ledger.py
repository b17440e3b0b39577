"""What one transaction has done, as far as its end depends on it."""

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
    """A SAVEPOINT that was sent, and what the ledger said before it."""

    name: str
    written: int
    failure: BaseException | None
    owner: SessionTransaction | None = None
    """The block of the session's that sent it; None for one of the caller's own SQL."""


@define(eq=False, repr=False)
class Ledger:
    """The record of one transaction; the next one begins with a new ledger."""

    written: int = 0
    """Statements other than reads."""
    failure: BaseException | None = None
    """A statement's error that no savepoint has undone."""
    failed_on: tuple[Connection, ...] = ()
    """The connections of such errors: a session may use several engines."""
    begun: bool = False
    """User code began the transaction explicitly, and ends it."""
    lost: bool = False
    """The database has rolled the transaction back by itself."""
    unknown: bool = False
    """The connection broke, or the task was cancelled, while COMMIT was under way."""
    savepoints: list[SavepointEntry] = Factory(list[SavepointEntry])
    originals: WeakKeyDictionary[InstanceState[Any], dict[str, Any]] = Factory(
        WeakKeyDictionary["InstanceState[Any]", "dict[str, Any]"]
    )
    """What attributes held before the transaction changed them, by object."""

    def note_statement(self, statement: str, verb: str) -> None:
        """Count a statement that is about to be sent and may leave something to commit."""
        if verb == "SAVEPOINT":
            name = statement.rsplit(maxsplit=1)[-1]
            self.savepoints.append(SavepointEntry(name, self.written, self.failure))
        elif verb == "RELEASE":
            self._end_savepoint(statement)
        elif verb == "ROLLBACK":  # TO SAVEPOINT: what came after it no longer counts
            entry = self._end_savepoint(statement)
            if entry is not None:
                self.savepoints.append(entry)  # it may be rolled back to again
                self.written, self.failure = entry.written, entry.failure
        elif verb != "WITH" or has_writing_part(statement):
            self.written += 1

    def _end_savepoint(self, statement: str) -> SavepointEntry | None:
        """Remove the last savepoint of the name that a statement ends with, and those inside of it."""
        name = statement.rsplit(maxsplit=1)[-1]
        for at in range(len(self.savepoints) - 1, -1, -1):
            entry = self.savepoints[at]
            if entry.name == name:
                del self.savepoints[at:]
                return entry
        return None

    def name_owner(self, transaction: SessionTransaction) -> None:
        """Record which block of the session's has sent the last SAVEPOINT."""
        if self.savepoints:
            self.savepoints[-1].owner = transaction

    def end_block(self, transaction: SessionTransaction) -> None:
        """Forget the savepoints of a block of the session's that has ended, and those inside of it."""
        owned = next((at for at, one in enumerate(self.savepoints) if one.owner is transaction), None)
        if owned is not None:
            del self.savepoints[owned:]

    def note_error(
        self, context: ExceptionContext, statement: str | None, *, committing: bool, xid: str
    ) -> bool:
        """Record an error; returns whether it has left the outcome of COMMIT unknown.

        ``statement`` is None where COMMIT, ROLLBACK or the like failed, ``xid`` the name of a transaction
        that takes part in a two-phase commit.
        """
        # an error that is not the database's own does not say what became of a COMMIT
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
        """Forget errors after which every connection has answered."""
        self.failure, self.failed_on = None, ()


BLANK: Final = Ledger()
"""The ledger of every transaction that has only read; never written into."""
