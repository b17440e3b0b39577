"""The unit of work: at most one session, one transaction at a time, and their end."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, cast

from attrs import define
from sqlalchemy.exc import IllegalStateChangeError, SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from ._database import Database, S_co
from ._session import ENDINGS
from .exceptions import UnitClosedError

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction
    from sqlalchemy.orm import SessionTransaction

    from ._session import ObservedSession

logger = logging.getLogger("fastapi_async_sqlalchemy")

Hook: TypeAlias = Callable[[], Awaitable[object] | object]
"""What runs after an outcome: a function or a coroutine function without arguments."""


@define(eq=False)
class RegisteredHook:
    """A hook, the outcome it waits for, and the savepoint whose fate it shares."""

    run: Hook
    on_commit: bool
    savepoint: SessionTransaction | None
    undone: bool = False
    """Its savepoint was rolled back."""


@define(eq=False, repr=False)
class Lifecycle(Generic[S_co]):
    """The state of a unit and its end: what the middleware and ``async with db():`` do to it."""

    database: Database[S_co]
    make_session: Callable[[], S_co] | None = None
    opened: S_co | None = None
    watched: ObservedSession | None = None
    """What is known of the opened session: its synchronous side."""
    closed: bool = False
    hooks: list[RegisteredHook] | None = None
    notes: dict[str, Any] | None = None
    outer: Any = None
    """What was current where the unit was opened: another unit, or what says that there is none."""

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
        if not session.in_transaction():
            if commit is not None and self.hooks:
                await self.run_hooks(committed=commit)
            return False
        if session.held_by_owner():
            return True
        if commit:
            await opened.commit()
        elif not session.has_written():
            await opened.run_sync(_release)
        elif commit is None:
            return True
        else:
            await self.roll_back()
        return False

    async def roll_back(self) -> None:
        """Roll back while the unit goes on; a rollback that fails loses its connection, which is as good."""
        if self.opened is not None:
            try:
                await self.opened.rollback()
            except Exception:  # whatever it is, the transaction is not committed
                logger.warning(_ROLLBACK_FAILED, self.database.name, exc_info=True)

    def finish_idle(self) -> bool:
        """Close a unit that has nothing left to settle; returns whether that was so."""
        session = self.watched
        if session is not None:
            if session.uow_holder is not None or self.hooks or session.in_transaction():
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
        except BaseException:
            await to_completion(self._close())
            raise
        if self.hooks or not self.finish_idle():
            await self._close()
            await self.run_hooks(committed=committed)

    async def _settle_rest(
        self, opened: AsyncSession, session: ObservedSession, *, commit: bool | None
    ) -> bool:
        """Commit, or let go of what only read; returns whether nothing is left to roll back."""
        if session.uow_streams and not session.busy():
            await opened.run_sync(_close_streams)
        if commit:
            if session.busy():
                await session.idle()
            if session.in_transaction():
                await opened.commit()
            return True
        if commit is None and not self._warn_of_discarded(session):
            if session.in_transaction() and not session.busy():
                await opened.run_sync(_release)
            return True
        return False

    async def abandon(self) -> None:
        """Roll back and close the unit for good, to the end even if the task is cancelled meanwhile."""
        if self.opened is None:
            self.closed = True
        else:
            await to_completion(self.finish(commit=False))

    async def run_hooks(self, *, committed: bool) -> None:
        """Run the hooks of an outcome, each isolated from the others."""
        hooks, self.hooks = self.hooks, None
        for hook in hooks or ():
            # the hook of a savepoint that was rolled back saw a rollback, whatever became of the rest
            if hook.on_commit == (committed and not hook.undone):
                try:
                    result = hook.run()
                    if inspect.isawaitable(result):
                        await result
                except Exception:
                    logger.exception(
                        "A hook of %s failed after its outcome: %r", self.database.name, hook.run
                    )

    def follow(self, transaction: SessionTransaction, outcome: bool | None) -> None:  # noqa: FBT001  # an event
        """Follow a transaction's or savepoint's end; called by SQLAlchemy inside its greenlet."""
        parent = transaction.parent
        if parent is None:
            if outcome is None:
                self.hooks = None
            elif self.hooks:
                await_only(self.run_hooks(committed=outcome))
            return
        for hook in self.hooks or ():
            if hook.savepoint is transaction:
                hook.undone = not outcome
                hook.savepoint = parent if outcome and parent.nested else None

    async def _close(self) -> None:
        """Close the unit and its session; whatever is open is rolled back."""
        opened, session = self.opened, self.watched
        self.opened, self.watched, self.closed = None, None, True
        if opened is None or session is None:
            return
        if session.busy():
            await _take_away(opened, session)
            return
        try:
            if session.in_transaction():
                if session.uow_lent:
                    await _interrupt(opened)
                session.expunge_all()  # a rollback expires what it finds; what was loaded stays readable
                await opened.rollback()
        except Exception:  # whatever it is, the transaction is not committed
            logger.warning(_ROLLBACK_FAILED, self.database.name, exc_info=True)
        finally:
            session.uow_closed = True
            if not session.in_transaction():
                session.end()

    def _warn_of_discarded(self, session: ObservedSession) -> bool:
        """Log what the coming rollback discards; returns whether there is anything."""
        statements, objects = session.uow_written, session.pending()
        if not (statements or objects):
            return False
        logger.warning(
            "%s: %d statements and %d unflushed objects are rolled back at the end of their unit of work, "
            "because nothing committed them: give commit_on_exit=True, or call `await db.session.commit()`.",
            self.database.name,
            statements,
            objects,
        )
        return True


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
        if self.opened is None:
            if self.closed:
                raise UnitClosedError(self.database.name)
            make = self.make_session or self.database.new_session
            self.opened = make()
            self.watched = cast("ObservedSession", self.opened.sync_session)
        return self.opened

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
        session = self.session
        if session.in_transaction():
            await session.commit()
        else:
            await self.run_hooks(committed=True)

    async def rollback(self) -> None:
        """Roll back, give the connection back and run the ``on_rollback`` hooks."""
        session = self.session
        if session.in_transaction():
            await session.rollback()
        else:
            await self.run_hooks(committed=False)

    def savepoint(self) -> AsyncSessionTransaction:
        """Return a SAVEPOINT for ``async with``: an error that leaves the block undoes the block alone."""
        return self.session.begin_nested()

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

    def _register(self, hook: Hook, *, on_commit: bool) -> None:
        if not callable(hook):
            message = f"a hook must be a function without arguments, not {hook!r}."
            raise TypeError(message)
        session = cast("ObservedSession", self.session.sync_session)
        session.uow_follow()
        session.uow_settled = self.follow
        if self.hooks is None:
            self.hooks = []
        self.hooks.append(RegisteredHook(hook, on_commit, session.get_nested_transaction()))

    def __repr__(self) -> str:
        if self.closed:
            state = "closed"
        elif self.opened is None:
            state = "no session yet"
        else:
            state = "in a transaction" if self.opened.in_transaction() else "no transaction"
        return f"<UnitOfWork of {self.database.name}: {state}>"


async def to_completion(cleanup: Coroutine[Any, Any, None]) -> None:
    """Run a clean-up in a task of its own and wait for its end, through any cancellation.

    A cancellation that arrives meanwhile is raised at the end.
    """
    task = asyncio.ensure_future(cleanup)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError as error:
            cancelled = error
    task.result()
    if cancelled is not None:
        raise cancelled


async def _take_away(opened: AsyncSession, session: ObservedSession) -> None:
    """End a session under a task that is in the middle of an operation on it.

    The connection is discarded, so that the task's statement fails and no other request inherits it; where
    the driver can interrupt a statement, that is enough. In the middle of COMMIT or of a checkout
    SQLAlchemy refuses: then the operation closes the session when it ends. COMMIT is waited for, a
    checkout holds no connection yet.
    """
    session.uow_closed = True
    if await _interrupt(opened):
        await session.idle()
        return
    try:
        await opened.invalidate()
    except IllegalStateChangeError:
        if session.uow_operation in ENDINGS:
            await session.idle()


async def _interrupt(opened: AsyncSession) -> bool:
    """Interrupt the statement under way, where the driver can; returns whether it can.

    SQLite's do not go on before their statement ends, and one closed under it keeps the file locked.
    """
    driver = await opened.run_sync(_driver_connection)
    if not hasattr(driver, "interrupt"):
        return False
    await driver.interrupt()
    return True


def _driver_connection(session: Session) -> Any:
    """Return the driver's connection of a session that is in the middle of a statement, else None."""
    if not session.in_transaction():
        return None
    try:
        return Session.connection(session).connection.driver_connection
    except SQLAlchemyError:  # in the middle of COMMIT or of a checkout
        return None


def _close_streams(session: Session) -> None:
    cast("ObservedSession", session).close_streams()


def _release(session: Session) -> None:
    cast("ObservedSession", session).release()
