"""The unit of work, as its users hold it: its session, its outcome by name, savepoints and hooks."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSessionTransaction
from sqlalchemy.orm import SessionTransaction

from ._database import S_co
from ._hooks import ROLLBACK_ONLY, RegisteredHook
from ._lifecycle import Lifecycle
from ._options import shown
from .exceptions import TransactionBegunError

if TYPE_CHECKING:
    from types import TracebackType

    from sqlalchemy.orm import Session

    from ._hooks import BeginHook, Hook


class UnitOfWork(Lifecycle[S_co]):
    """Owns at most one session and settles its transactions.

    Opened by the middleware for each request, or by ``async with db() as unit:``; closed for good when
    the request, or the block, ends. Later use raises ``UnitClosedError``.
    ``opened`` is the session if one has been made and the unit is open, else None; it never makes one.
    """

    __slots__ = ()

    @property
    def session(self) -> S_co:
        """The unit's session, made on first use; a connection is checked out by its first statement."""
        return self.open() if self.opened is None else self.opened

    @property
    def info(self) -> dict[str, Any]:
        """A dictionary for the caller's own notes, kept as long as the unit."""
        if self.notes is None:
            self.notes = {}
        return self.notes

    async def commit(self) -> None:
        """Commit, give the connection back and run the ``on_commit`` hooks.

        The objects stay readable; the next statement begins the next transaction.
        """
        session, hooks = self.session, self.hooks
        if hooks is not None and not session.in_transaction():
            hooks.refuse_commit()
            await hooks.before_commit()
            hooks.refuse_commit()
        if session.in_transaction():
            await session.commit()
        elif hooks is not None:
            await hooks.settled(committed=True)

    async def rollback(self) -> None:
        """Roll back, give the connection back and run the ``on_rollback`` hooks.

        Lifts what had made the unit rollback-only, too.
        """
        session = self.session
        if session.in_transaction():
            await session.rollback()
        elif self.hooks is not None:
            await self.hooks.settled(committed=False)

    def savepoint(self) -> AsyncSessionTransaction:
        """Return a SAVEPOINT for ``async with``: an error that leaves the block undoes the block alone.

        So does a flush that failed: where its error was swallowed in the block, the end of the block raises
        SQLAlchemy's ``PendingRollbackError``.
        """
        return Savepoint(self.session, nested=True)

    def on_commit(self, hook: Hook) -> None:
        """Register what runs after the next COMMIT, with no connection held.

        Hooks run in order; an error in one is logged and does not stop the others. One that was
        registered inside a savepoint is dropped when the savepoint is rolled back. None runs when the
        outcome of COMMIT is unknown. A hook may use the unit's session, or open a unit of its own; only
        the latter where ``async with session.begin():`` committed.
        """
        self._register(hook, on_commit=True)

    def on_rollback(self, hook: Hook) -> None:
        """Register what runs after the next ROLLBACK, with no connection held; else as ``on_commit``."""
        self._register(hook, on_commit=False)

    def before_commit(self, hook: Hook) -> None:
        """Register what runs before the next COMMIT, inside its transaction, and may write.

        An error in it stops the COMMIT and goes on to whoever asked for that. Else as ``on_commit``.
        """
        _require_function(hook)
        before = self.hooks_here().before
        before.append(RegisteredHook(savepoint=self.savepoint_here(), run=hook, on_commit=True))

    def on_begin(self, hook: BeginHook) -> None:
        """Register what runs at the beginning of each transaction of the unit, before its first statement.

        ``hook`` is a plain function; it gets SQLAlchemy's synchronous ``Connection``, whose ``execute()``
        it calls without awaiting. An error in it stops the statement, and the connection is discarded.
        Raises ``TransactionBegunError`` in the middle of a transaction; objects that were only added, and not
        flushed, have not begun one.
        """
        _require_function(hook)
        if inspect.iscoroutinefunction(hook):
            message = f"an on_begin hook must be a plain function of a Connection, not {shown(hook)}."
            raise TypeError(message)
        if _begun(self.session.sync_session):
            remedy = (
                "call on_begin() before the unit's first statement, or after `await db.unit.commit()` or "
                "`await db.unit.rollback()`"
            )
            raise TransactionBegunError(self.database.name, remedy)
        self.hooks_here().begin.append(hook)

    def set_rollback_only(self) -> None:
        """Have the transaction rolled back where the unit would commit it by itself.

        A COMMIT that is asked for by name raises ``UnexpectedRollbackError``. ``rollback()`` lifts it, and
        so does the rollback of the savepoint that it was called in.
        """
        self.doom(ROLLBACK_ONLY, None)

    def _register(self, hook: Hook, *, on_commit: bool) -> None:
        _require_function(hook)
        after = self.hooks_here().after
        after.append(RegisteredHook(savepoint=self.savepoint_here(), run=hook, on_commit=on_commit))

    def __repr__(self) -> str:
        if self.closed:
            state = "closed"
        elif self.opened is None:
            state = "no session yet"
        else:
            state = "in a transaction" if self.opened.in_transaction() else "no transaction"
        return f"<UnitOfWork of {self.database.name}: {state}>"


class Savepoint(AsyncSessionTransaction):
    """A savepoint whose block does not end well once a flush in it has failed.

    SQLAlchemy rolls back to the savepoint then, and its own block closes it without a word.
    """

    async def __aexit__(
        self, type_: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        own = self.sync_transaction
        at_hand = own is not None and own is self.session.sync_session.get_nested_transaction()
        if type_ is None and own is not None and at_hand and not own.is_active:
            try:
                SessionTransaction.commit(own)  # raises what tells of the flush, and sends nothing
            except PendingRollbackError as error:
                await super().__aexit__(type(error), error, error.__traceback__)
                raise
        await super().__aexit__(type_, value, traceback)


def _require_function(hook: object) -> None:
    if not callable(hook):
        message = f"a hook must be a function, not {shown(hook)}."
        raise TypeError(message)


def _begun(session: Session) -> bool:
    """Whether the transaction at hand has begun on a connection, or has a savepoint, which may be undone."""
    transaction = session.get_transaction()
    if transaction is None:
        return False
    begun = transaction._connections  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # `connections` is 2.1.7's
    return bool(begun) or session.in_nested_transaction()
