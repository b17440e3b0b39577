"""The one decision about a unit's transaction, and the unit's end."""

from __future__ import annotations

import logging
import sys
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final, cast

from sqlalchemy.orm import Session

from .._session.cancellation import clear_frames, to_completion
from .._session.ending import discard_in_use, end, release
from .._session.state import has_written, held_by_owner, pending
from ..exceptions import UnexpectedRollbackError
from .unit import Phase

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

    from .._session.hooks import Hooks
    from .._session.state import StatefulSession
    from .unit import UnitOfWork

logger = logging.getLogger("fastapi_async_sqlalchemy")

_ROLLBACK_FAILED: Final = "ROLLBACK on %s failed; its connection is discarded."


class Decision(Enum):
    """What becomes of a transaction."""

    COMMIT = auto()
    ROLLBACK = auto()
    KEEP = auto()
    """Nobody asked for a COMMIT: what only read gives its connection back, what was written is its owner's.

    At the end of the unit nobody can commit it any more: it is rolled back, with a WARNING.
    """

    @classmethod
    def of_exit(cls, *, commit_on_exit: bool) -> Decision:
        """Decide about a block that ended without an error."""
        return cls.COMMIT if commit_on_exit else cls.KEEP


class _Outcome(Enum):
    HELD = auto()
    """User code holds the transaction, or what was written is kept for it."""
    KEPT = auto()
    """Nothing is open, and nothing was lost."""
    UNDONE = auto()
    """It was rolled back, or is to be by the unit's end."""


async def settle(unit: UnitOfWork[Any], decision: Decision) -> bool:
    """Decide the current transaction while the unit goes on; returns whether its owner still holds it."""
    opened, session = unit.opened, unit._watched
    if opened is None or session is None:
        return False
    return await _decide(unit, opened, session, decision, last=False) is _Outcome.HELD


async def finish(unit: UnitOfWork[Any], decision: Decision) -> None:
    """Settle what is left and close the unit for good."""
    if finish_idle(unit):
        return
    opened, session = cast("AsyncSession", unit.opened), cast("StatefulSession", unit._watched)
    state = session._fastapi_async_sqlalchemy
    try:
        outcome = await _decide(unit, opened, session, decision, last=True)
        while outcome is _Outcome.KEPT and unit._hooks is not None:
            if state.busy() or not session.in_transaction():
                await unit._hooks.settled(committed=True)
            if state.busy() or not session.in_transaction():
                break
            outcome = await _decide(unit, opened, session, decision, last=True)  # a hook has begun it
    except BaseException:
        await to_completion(_close(unit, committed=False))
        raise
    if not finish_idle(unit):
        await _close(unit, committed=outcome is _Outcome.KEPT)


def finish_idle(unit: UnitOfWork[Any]) -> bool:
    """Close a unit that has nothing left to settle; returns whether that was so."""
    session = unit._watched
    if session is not None:
        holder = session._fastapi_async_sqlalchemy.holder
        if holder is not None or unit._hooks is not None or session.in_transaction():
            return False
        end(session)
        unit.opened = unit._watched = None
    unit._phase = Phase.CLOSED
    return True


async def abandon(unit: UnitOfWork[Any]) -> None:
    """Roll back and close the unit for good, to the end even if the task is cancelled meanwhile."""
    if unit.opened is None:
        unit._phase = Phase.CLOSED
    else:
        clear_frames(sys.exception())
        await to_completion(finish(unit, Decision.ROLLBACK))


async def roll_back(unit: UnitOfWork[Any]) -> None:
    """Roll back while the unit goes on; where that fails, the connection is discarded, to the same effect."""
    if unit.opened is not None:
        try:
            await unit.opened.rollback()
        except Exception:  # whatever it is, the transaction is not committed
            logger.warning(_ROLLBACK_FAILED, unit._database.name, exc_info=True)
        if unit._hooks is not None:  # where no transaction was open
            await unit._hooks.settled(committed=False)


async def _decide(
    unit: UnitOfWork[Any],
    opened: AsyncSession,
    session: StatefulSession,
    decision: Decision,
    *,
    last: bool,
) -> _Outcome:
    """Carry a decision out; the last one leaves a rollback to the close of the session."""
    state, hooks = session._fastapi_async_sqlalchemy, unit._hooks
    if last and state.streams and not state.busy():
        await opened.run_sync(_close_streams)
    if decision is Decision.COMMIT and (last or hooks is not None or has_written(session)):
        await state.idle()
    if hooks is not None and decision is Decision.COMMIT:
        decision = await _before_commit(hooks, session)
    if not last and session.in_transaction() and held_by_owner(session):
        return _Outcome.HELD
    if decision is Decision.COMMIT and session.in_transaction():
        return _Outcome.KEPT if await _commit(unit, opened) else _Outcome.UNDONE
    if last:
        return await _decide_last(unit, opened, session, decision)
    return await _decide_midway(unit, opened, session, decision)


async def _decide_midway(
    unit: UnitOfWork[Any], opened: AsyncSession, session: StatefulSession, decision: Decision
) -> _Outcome:
    """Decide what no COMMIT ends while the unit goes on."""
    if session.in_transaction():
        if has_written(session):
            if decision is Decision.KEEP:
                return _Outcome.HELD
            await roll_back(unit)
            return _Outcome.UNDONE
        await _release(unit, opened)
    if unit._hooks is not None and decision is not Decision.KEEP:
        await unit._hooks.settled(committed=decision is Decision.COMMIT)
    return _Outcome.KEPT


async def _decide_last(
    unit: UnitOfWork[Any], opened: AsyncSession, session: StatefulSession, decision: Decision
) -> _Outcome:
    """Decide what no COMMIT ends; a rollback is left to the close of the session."""
    if decision is Decision.KEEP:
        marked = unit._hooks is not None and unit._hooks.mark is not None
        if _warn_of_discarded(unit, session) or marked:
            return _Outcome.UNDONE
        if session.in_transaction() and not session._fastapi_async_sqlalchemy.busy():
            await _release(unit, opened)
    return _Outcome.UNDONE if decision is Decision.ROLLBACK else _Outcome.KEPT


async def _before_commit(hooks: Hooks, session: StatefulSession) -> Decision:
    """Let ``before_commit`` begin a transaction where none is open; returns what to decide."""
    if not hooks.rollback_only and not session.in_transaction():
        hooks.refuse_commit()
        await hooks.before_commit()
        if not hooks.rollback_only:
            hooks.refuse_commit()
    return Decision.ROLLBACK if hooks.rollback_only else Decision.COMMIT


async def _commit(unit: UnitOfWork[Any], opened: AsyncSession) -> bool:
    """Commit; rolls back and returns False where a ``before_commit`` hook gives the transaction up."""
    try:
        await opened.commit()
    except UnexpectedRollbackError:
        if unit._hooks is None or not unit._hooks.rollback_only:
            raise
        await roll_back(unit)
        return False
    return True


async def _release(unit: UnitOfWork[Any], opened: AsyncSession) -> None:
    """Give the connection of what only read back, by a rollback that may fail as any."""
    try:
        await opened.run_sync(_release_session)
    except Exception:  # whatever it is, nothing was written
        logger.warning(_ROLLBACK_FAILED, unit._database.name, exc_info=True)


async def _close(unit: UnitOfWork[Any], *, committed: bool) -> None:
    """Close the unit and its session, roll back what is open, and run the hooks that are left."""
    opened, session = unit.opened, unit._watched
    unit.opened, unit._watched, unit._phase = None, None, Phase.CLOSED
    if opened is None or session is None:
        return
    if session._fastapi_async_sqlalchemy.busy():
        await discard_in_use(opened, session)
    else:
        await _end_session(unit, opened, session)
    if unit._hooks is not None:
        await unit._hooks.settled(committed=committed)


async def _end_session(unit: UnitOfWork[Any], opened: AsyncSession, session: StatefulSession) -> None:
    state = session._fastapi_async_sqlalchemy
    try:
        if session.in_transaction():
            session.expunge_all()  # a rollback expires what it finds; what was loaded stays readable
            await opened.rollback()
    except Exception:  # whatever it is, the transaction is not committed
        logger.warning(_ROLLBACK_FAILED, unit._database.name, exc_info=True)
    finally:
        state.closed = True
        if session.in_transaction():  # a listener has broken off its end
            await opened.run_sync(Session.invalidate)
        end(session)


def _warn_of_discarded(unit: UnitOfWork[Any], session: StatefulSession) -> bool:
    """Log what the coming rollback discards; returns whether there is anything."""
    statements, objects = session._fastapi_async_sqlalchemy.ledger.written, pending(session)
    given_up = unit._hooks is not None and unit._hooks.rollback_only
    if not (statements or objects) or given_up or unit._config.settings.read_only:
        return False
    logger.warning(
        "%s: %d statements and %d unflushed objects are rolled back at the end of their unit of work, "
        "because nothing committed them: give commit_on_exit=True, or call `await db.session.commit()`.",
        unit._database.name,
        statements,
        objects,
    )
    return True


def _release_session(session: Session) -> None:
    release(cast("StatefulSession", session))


def _close_streams(session: Session) -> None:
    cast("StatefulSession", session)._fastapi_async_sqlalchemy.close_streams()
