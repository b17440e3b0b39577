"""The unit of work: at most one session, one transaction at a time, and their end."""

from __future__ import annotations

import inspect
import logging
import sys
from typing import TYPE_CHECKING, Any, Generic, cast

from attrs import define
from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSessionTransaction
from sqlalchemy.orm import Session

from ._database import S_co
from ._ending import close_streams, interrupt, let_go, release, take_away, to_completion
from ._hooks import ROLLBACK_ONLY, Doom, Hooks, RegisteredHook
from ._options import shown
from ._pool import Checkout
from .exceptions import TransactionBegunError, UnexpectedRollbackError, UnitClosedError

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import SessionTransaction
    from starlette.types import Scope

    from ._database import Database, Terms
    from ._hooks import BeginHook, Hook
    from ._session import ObservedSession

logger = logging.getLogger("fastapi_async_sqlalchemy")


@define(eq=False, repr=False, weakref_slot=False)
class Lifecycle(Generic[S_co]):
    """The state of a unit and its end: what the middleware and ``async with db():`` do to it."""

    terms: Terms[S_co]
    outer: Any = None
    """What was current where the unit was opened: another unit, or what says that there is none."""
    request: Scope | None = None
    """The ASGI scope of the request that it belongs to."""
    opened: S_co | None = None
    watched: ObservedSession | None = None
    """What is known of the opened session: its synchronous side."""
    closed: bool = False
    hooks: Hooks | None = None
    """Made with the session, so that whoever has hooks has a session."""
    notes: dict[str, Any] | None = None

    @property
    def database(self) -> Database[S_co]:
        """The database that the unit is of."""
        return self.terms.database

    def here(self) -> Self:
        """Return the unit of the task that asks."""
        return self

    def belongs_to(self, scope: Scope) -> bool:
        """Whether this is the unit of a request, also where a middleware has copied the scope since."""
        own = self.request
        if own is None or own is scope:
            return own is not None
        version = own.get("asgi")  # a dictionary of each request's own, which copies share and nobody changes
        return version is not None and version is scope.get("asgi")

    def open(self) -> S_co:
        """Make the session."""
        if self.closed:
            raise UnitClosedError(self.database.name)
        terms = self.terms
        make = terms.make or terms.database.new_session
        self.opened = opened = make()
        self.watched = cast("ObservedSession", opened.sync_session)
        if terms.limits is not None:
            self.watched.uow_checkout = Checkout(terms.database.name, terms.limits)
        if isinstance(self.outer, Lifecycle):
            self.watched.uow_outer_holds = self.outer_holds
        return opened

    async def settle(self, *, commit: bool | None) -> bool:
        """Decide the transaction at hand while the unit goes on: True commits, False rolls back.

        None is for a unit that nobody asked to commit: it keeps what was written for its owner, and
        gives back the connection of one that only read. Returns whether the owner still holds it.
        """
        opened, session = self.opened, self.watched
        if opened is None or session is None:
            return False
        if commit and session.uow_holder is not None:
            await session.idle()
        if self.hooks is not None:
            commit = await self._begin_settling(self.hooks, session, commit=commit)
        if session.in_transaction():
            if session.held_by_owner():
                return True
            if commit:
                await self._commit(opened)
                return False
            if session.has_written():
                if commit is None:
                    return True
                await self.roll_back()
                return False
            await opened.run_sync(release)
        if commit is not None and self.hooks is not None:
            await self.hooks.settled(committed=commit)
        return False

    @staticmethod
    async def _begin_settling(hooks: Hooks, session: ObservedSession, *, commit: bool | None) -> bool | None:
        """Let ``before_commit`` begin a transaction where none is open; returns what to decide."""
        if commit and not hooks.rollback_only and not session.in_transaction():
            hooks.refuse_commit()
            await hooks.before_commit()
            if not hooks.rollback_only:
                hooks.refuse_commit()
        return commit and not hooks.rollback_only

    async def _commit(self, opened: AsyncSession) -> bool:
        """Commit; rolls back and returns False where a ``before_commit`` hook gives the transaction up."""
        try:
            await opened.commit()
        except UnexpectedRollbackError:
            if self.hooks is None or not self.hooks.rollback_only:
                raise
            await self.roll_back()
            return False
        return True

    async def roll_back(self) -> None:
        """Roll back while the unit goes on; a rollback that fails loses its connection, which is as good."""
        if self.opened is not None:
            try:
                await self.opened.rollback()
            except Exception:  # whatever it is, the transaction is not committed
                logger.warning(_ROLLBACK_FAILED, self.database.name, exc_info=True)
            if self.hooks is not None:  # where no transaction was open
                await self.hooks.settled(committed=False)

    def finish_idle(self) -> bool:
        """Close a unit that has nothing left to settle; returns whether that was so."""
        session = self.watched
        if session is not None:
            if session.uow_holder is not None or self.hooks is not None or session.in_transaction():
                return False
            session.end()
            self.opened = self.watched = None
        self.closed = True
        return True

    async def finish(self, *, commit: bool | None) -> None:
        """Settle what is left and close the unit for good; ``commit`` as in ``settle``."""
        if self.finish_idle():
            return
        opened, session = cast("AsyncSession", self.opened), cast("ObservedSession", self.watched)
        try:
            committed = await self._settle_rest(opened, session, commit=commit)
            while committed and self.hooks is not None:
                if session.busy() or not session.in_transaction():
                    await self.hooks.settled(committed=True)
                if session.busy() or not session.in_transaction():
                    break
                committed = await self._settle_rest(opened, session, commit=commit)  # a hook has begun it
        except BaseException:
            await to_completion(self._close(committed=False))
            raise
        if not self.finish_idle():
            await self._close(committed=committed)

    async def _settle_rest(
        self, opened: AsyncSession, session: ObservedSession, *, commit: bool | None
    ) -> bool:
        """Commit, or let go of what only read; returns whether nothing is left to roll back."""
        if session.uow_streams and not session.busy():
            await opened.run_sync(close_streams)
        if commit and session.busy():
            await session.idle()
        if self.hooks is not None:
            commit = await self._begin_settling(self.hooks, session, commit=commit)
        if commit:
            return not session.in_transaction() or await self._commit(opened)
        doomed = self.hooks is not None and self.hooks.doom is not None
        if commit is None and not self._warn_of_discarded(session) and not doomed:
            if session.in_transaction() and not session.busy():
                await opened.run_sync(release)
            return True
        return False

    async def abandon(self) -> None:
        """Roll back and close the unit for good, to the end even if the task is cancelled meanwhile."""
        if self.opened is None:
            self.closed = True
        else:
            let_go(sys.exception())
            await to_completion(self.finish(commit=False))

    async def _close(self, *, committed: bool) -> None:
        """Close the unit and its session, roll back what is open, and run the hooks that are left."""
        opened, session = self.opened, self.watched
        self.opened, self.watched, self.closed = None, None, True
        if opened is None or session is None:
            return
        if session.busy():
            await take_away(opened, session)
        else:
            await self._end_session(opened, session)
        if self.hooks is not None:
            await self.hooks.settled(committed=committed)

    async def _end_session(self, opened: AsyncSession, session: ObservedSession) -> None:
        try:
            if session.in_transaction():
                if session.uow_lent:
                    await interrupt(opened)
                session.expunge_all()  # a rollback expires what it finds; what was loaded stays readable
                await opened.rollback()
        except Exception:  # whatever it is, the transaction is not committed
            logger.warning(_ROLLBACK_FAILED, self.database.name, exc_info=True)
        finally:
            session.uow_closed = True
            if session.in_transaction():  # a listener has broken off its end
                await opened.run_sync(Session.invalidate)
            session.end()

    def _warn_of_discarded(self, session: ObservedSession) -> bool:
        """Log what the coming rollback discards; returns whether there is anything."""
        statements, objects = session.uow_written, session.pending()
        given_up = self.hooks is not None and self.hooks.rollback_only
        if not (statements or objects) or given_up or self.terms.settings.read_only:
            return False
        logger.warning(
            "%s: %d statements and %d unflushed objects are rolled back at the end of their unit of work, "
            "because nothing committed them: give commit_on_exit=True, or call `await db.session.commit()`.",
            self.database.name,
            statements,
            objects,
        )
        return True

    def doom(self, reason: str, cause: BaseException | None) -> None:
        """Let the transaction, or the savepoint at hand, only be rolled back."""
        dooms = self.hooks_here().dooms
        dooms.append(Doom(savepoint=self.savepoint_here(), reason=reason, cause=cause))

    def hooks_here(self) -> Hooks:
        """Return the unit's hooks, made with its session."""
        opened = self.open() if self.opened is None else self.opened
        if self.hooks is None:
            session = cast("ObservedSession", opened.sync_session)
            self.hooks = session.uow_hooks = Hooks(self.database.name)
            session.uow_follow()
        return self.hooks

    def savepoint_here(self) -> SessionTransaction | None:
        """Return the savepoint at hand, whose fate is shared by what is registered now."""
        return None if self.watched is None else self.watched.get_nested_transaction()

    def outer_holds(self) -> bool:
        """Whether a unit around this one holds a connection."""
        outer = self.outer
        while isinstance(outer, Lifecycle):
            if outer.watched is not None and outer.watched.in_transaction():
                return True
            outer = outer.outer
        return False


_ROLLBACK_FAILED = "ROLLBACK on %s failed; its connection is discarded."


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
        Raises ``TransactionBegunError`` in the middle of a transaction.
        """
        _require_function(hook)
        if inspect.iscoroutinefunction(hook):
            message = f"an on_begin hook must be a plain function of a Connection, not {shown(hook)}."
            raise TypeError(message)
        if self.session.in_transaction():
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
                own.commit()  # raises what tells of the flush, and sends nothing
            except PendingRollbackError as error:
                await super().__aexit__(type(error), error, error.__traceback__)
                raise
        await super().__aexit__(type_, value, traceback)


def _require_function(hook: object) -> None:
    if not callable(hook):
        message = f"a hook must be a function, not {shown(hook)}."
        raise TypeError(message)
