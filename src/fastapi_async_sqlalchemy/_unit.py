"""The unit of work: at most one session, one transaction at a time, and their end."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, cast

from attrs import define
from sqlalchemy.exc import IllegalStateChangeError
from sqlalchemy.util import await_only

from ._database import Database, S_co
from ._observer import ObservedSession, held_by_owner, pending
from .exceptions import UnitClosedError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction
    from sqlalchemy.orm import Session, SessionTransaction

logger = logging.getLogger("fastapi_async_sqlalchemy")

Hook: TypeAlias = Callable[[], Awaitable[object] | object]
"""What runs after an outcome: a function or a coroutine function without arguments."""


@define(eq=False)
class _Registered:
    """A hook, the outcome it waits for, and the savepoint whose fate it shares."""

    hook: Hook
    on_commit: bool
    savepoint: SessionTransaction | None
    due: bool = False


@define(eq=False, repr=False)
class UnitOfWork(Generic[S_co]):
    """Owns at most one session and settles its transactions.

    Opened by the middleware for each request, or by ``async with db() as unit:``; closed for good when
    the request, or the block, ends. Later use raises ``UnitClosedError``.
    """

    _database: Database[S_co]
    _session_args: Mapping[str, Any] | None = None
    opened: S_co | None = None
    """The session if one has been made and the unit is open, else None; never makes one."""
    closed: bool = False
    """Whether the unit has ended."""
    _hooks: list[_Registered] | None = None
    _info: dict[str, Any] | None = None

    @property
    def session(self) -> S_co:
        """The unit's session, made on first use; a connection is checked out by its first statement."""
        session = self.opened
        return self._open() if session is None else session

    @property
    def info(self) -> dict[str, Any]:
        """A dictionary for the caller's own notes, kept as long as the unit."""
        if self._info is None:
            self._info = {}
        return self._info

    async def commit(self) -> None:
        """Commit, give the connection back and run the ``on_commit`` hooks.

        The objects stay readable; the next statement begins the next transaction.
        """
        await self._end_transaction(committed=True)

    async def rollback(self) -> None:
        """Roll back, give the connection back and run the ``on_rollback`` hooks."""
        await self._end_transaction(committed=False)

    def savepoint(self) -> AsyncSessionTransaction:
        """Return a SAVEPOINT for ``async with``: an error that leaves the block undoes the block alone."""
        return self.session.begin_nested()

    def on_commit(self, hook: Hook) -> None:
        """Register what runs after the next COMMIT, with no connection held.

        Hooks run in order; an error in one is logged and does not stop the others. One that was
        registered inside a savepoint is dropped when the savepoint is rolled back. None runs when the
        outcome of COMMIT is unknown.
        """
        self._register(hook, on_commit=True)

    def on_rollback(self, hook: Hook) -> None:
        """Register what runs after the next ROLLBACK, with no connection held; else as ``on_commit``."""
        self._register(hook, on_commit=False)

    def __repr__(self) -> str:
        if self.closed:
            state = "closed"
        elif self.opened is None:
            state = "no session yet"
        else:
            state = "in a transaction" if self.opened.in_transaction() else "no transaction"
        return f"<UnitOfWork of {self._database.name}: {state}>"

    async def _end_transaction(self, *, committed: bool) -> None:
        session = self.session
        if not session.in_transaction():
            await self._run(committed=committed)  # nothing to decide: the hooks' moment all the same
        elif committed:
            await session.commit()
        else:
            await session.rollback()

    def _open(self) -> S_co:
        if self.closed:
            raise UnitClosedError(self._database.name)
        session = self.opened = self._database.new_session(self._session_args)
        return session

    def _register(self, hook: Hook, *, on_commit: bool) -> None:
        if not callable(hook):
            message = f"a hook must be callable, not {hook!r}."
            raise TypeError(message)
        session = _observed(self.session)
        session.observer.settled = self._settled
        if self._hooks is None:
            self._hooks = []
        self._hooks.append(_Registered(hook, on_commit, session.get_nested_transaction()))

    def _settled(self, transaction: SessionTransaction, outcome: bool | None) -> None:
        """Follow a transaction's or savepoint's end; called by SQLAlchemy inside its greenlet."""
        if transaction.parent is None:
            if outcome is None:
                self._hooks = None
            elif self._hooks:
                await_only(self._run(committed=outcome))
            return
        for registered in self._hooks or ():
            if registered.savepoint is transaction:
                if outcome:
                    parent = transaction.parent
                    registered.savepoint = parent if parent.nested else None
                else:
                    registered.due = True

    async def _run(self, *, committed: bool) -> None:
        """Run the hooks of an outcome, each isolated from the others."""
        hooks, self._hooks = self._hooks, None
        for registered in hooks or ():
            # a hook of a savepoint that was rolled back saw a rollback, whatever became of the rest
            if registered.on_commit != (committed and not registered.due):
                continue
            try:
                result = registered.hook()
                if inspect.isawaitable(result):
                    await result
            except Exception:
                logger.exception("A hook of %s failed after its unit had ended: %r", self._database.name, registered.hook)


async def settle(unit: UnitOfWork[AsyncSession], *, commit: bool | None) -> bool:
    """Decide the transaction at hand while the unit goes on: True commits, False rolls back.

    None is for a unit that nobody asked to commit: it keeps what was written for its owner, and
    gives back the connection of one that only read. Returns whether the owner still holds it.
    """
    opened = unit.opened
    if opened is None:
        return False
    session = _observed(opened)
    if commit and session.observer.busy():
        await session.observer.idle()
    if not session.in_transaction():
        if commit is not None:
            await unit._run(committed=commit)
        return False
    if held_by_owner(session):
        return True
    if commit:
        await opened.commit()
    elif not has_written(unit):
        await opened.run_sync(_release)
    elif commit is None:
        return True
    else:
        await roll_back(unit)
    return False


async def roll_back(unit: UnitOfWork[AsyncSession]) -> None:
    """Roll back while the unit goes on; a rollback that fails loses its connection, which is as good."""
    if unit.opened is not None:
        try:
            await unit.opened.rollback()
        except Exception:
            logger.warning("ROLLBACK on %s failed; its connection was discarded.", unit._database.name, exc_info=True)


async def finish(unit: UnitOfWork[AsyncSession], *, commit: bool | None) -> None:
    """Settle what is left and close the unit for good; ``commit`` as in ``settle``."""
    if unit.opened is None:
        unit.closed = True
        return
    session = _observed(unit.opened)
    try:
        if commit:
            await session.observer.idle()
            if session.in_transaction():
                await unit.opened.commit()
        elif commit is None:
            commit = not _warn_of_discarded(unit, session)
            if commit and session.in_transaction() and not session.observer.busy():
                await unit.opened.run_sync(_release)
    except BaseException:
        await to_completion(_close(unit))
        raise
    await _close(unit)
    await unit._run(committed=bool(commit))


async def abandon(unit: UnitOfWork[AsyncSession]) -> None:
    """Roll back and close the unit for good, to the end even if the task is cancelled meanwhile."""
    if unit.opened is None:
        unit.closed = True
    else:
        await to_completion(finish(unit, commit=False))


def has_written(unit: UnitOfWork[AsyncSession]) -> bool:
    """Whether the transaction at hand has sent a statement that writes, or has objects to flush."""
    if unit.opened is None:
        return False
    session = _observed(unit.opened)
    return bool(session.observer.written or pending(session))


async def to_completion(cleanup: Coroutine[Any, Any, None]) -> None:
    """Run a clean-up in a task of its own and wait for its end, through any cancellation.

    A cancellation that arrives meanwhile is raised at the end.
    """
    task = asyncio.ensure_future(cleanup)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
        except Exception:  # noqa: BLE001, S110, PERF203  # result() below raises it
            pass
    task.result()
    if cancelled is not None:
        raise cancelled


async def _close(unit: UnitOfWork[AsyncSession]) -> None:
    """Close the unit and its session; whatever was open is rolled back."""
    opened, unit.opened, unit.closed = unit.opened, None, True
    if opened is None:
        return
    session = _observed(opened)
    observer = session.observer
    if observer.busy():
        await _take_away(opened, session)
        return
    try:
        if session.in_transaction():
            session.expunge_all()  # a rollback expires what it finds; what was loaded stays readable
            await opened.rollback()
    except Exception:
        logger.warning("ROLLBACK on %s failed; its connection was discarded.", observer.database, exc_info=True)
    finally:
        observer.closed = True
        if not session.in_transaction():
            session.close()  # nothing is checked out any more: this sends nothing


async def _take_away(opened: AsyncSession, session: ObservedSession) -> None:
    """End a session under a task that is in the middle of an operation on it.

    The connection is discarded, so that the task's statement fails and no other request inherits it. In
    the middle of COMMIT or of a checkout SQLAlchemy refuses: then the operation itself closes the
    session when it ends, and only one that holds a connection is waited for.
    """
    observer = session.observer
    observer.closed = True
    try:
        await opened.invalidate()
    except IllegalStateChangeError:
        if observer.connections:
            await observer.idle()


def _release(session: Session) -> None:
    cast("ObservedSession", session).release()


def _warn_of_discarded(unit: UnitOfWork[AsyncSession], session: ObservedSession) -> bool:
    """Log what the coming rollback discards; returns whether there was anything."""
    statements, objects = session.observer.written, pending(session)
    if not (statements or objects):
        return False
    logger.warning(
        "%s: %d statements and %d unflushed objects are rolled back at the end of their unit of work, because "
        "nothing committed them: give commit_on_exit=True, or call `await db.session.commit()`.",
        unit._database.name,
        statements,
        objects,
    )
    return True


def _observed(session: AsyncSession) -> ObservedSession:
    return cast("ObservedSession", session.sync_session)
