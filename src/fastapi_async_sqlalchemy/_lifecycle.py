"""The life of a unit of work: its state, how its transactions are settled, and its end."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any, Final, Generic, cast

from attrs import define
from sqlalchemy.orm import Session

from ._database import S_co
from ._ending import close_streams, interrupt, let_go, release, take_away, to_completion
from ._hooks import Doom, Hooks
from ._pool import Checkout
from .exceptions import UnexpectedRollbackError, UnitClosedError

if TYPE_CHECKING:
    from typing import Self

    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import SessionTransaction
    from starlette.types import Scope

    from ._database import Database, Terms
    from ._session import ObservedSession

logger = logging.getLogger("fastapi_async_sqlalchemy")

_ROLLBACK_FAILED: Final = "ROLLBACK on %s failed; its connection is discarded."


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
        if commit and session.uow_holder is not None and (session.has_written() or self.hooks is not None):
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
            await self._release(opened)
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

    async def _release(self, opened: AsyncSession) -> None:
        """Give the connection of what only read back, by a rollback that may fail as any."""
        try:
            await opened.run_sync(release)
        except Exception:  # as below
            logger.warning(_ROLLBACK_FAILED, self.database.name, exc_info=True)

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
                await self._release(opened)
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
