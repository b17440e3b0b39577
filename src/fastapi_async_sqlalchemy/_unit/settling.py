"""The single decision about a unit's transaction, and the unit's end."""

from __future__ import annotations

import logging
import sys
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final, cast

from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool
from sqlalchemy.util import greenlet_spawn

from .._session import restoring
from .._session.cancellation import clear_frames, to_completion
from .._session.ending import discard_in_use, end, release
from .._session.plain import in_transaction
from .._session.state import has_written, held_by_owner, pending
from ..exceptions import UnexpectedRollbackError, _counted
from .unit import CLOSED

if TYPE_CHECKING:
    import asyncio

    from sqlalchemy.ext.asyncio import AsyncSession
    from starlette.types import Scope

    from .._session.hooks import Hooks
    from .._session.state import StatefulSession
    from .unit import UnitOfWork

logger = logging.getLogger("fastapi_async_sqlalchemy")

_PATIENCE: Final = 30.0
"""Seconds, for a pool without a timeout; SQLAlchemy's default."""
_ROLLBACK_FAILED: Final = "ROLLBACK on %s failed; its connection is discarded."


class Decision(Enum):
    """A decision about a transaction."""

    COMMIT = auto()
    ROLLBACK = auto()
    KEEP = auto()
    """No COMMIT was requested: a transaction that only read releases its connection, writes are kept.

    At the end of the unit nobody can commit the writes any more: they are rolled back, with a WARNING.
    """

    @classmethod
    def of_exit(cls, *, commit_on_exit: bool) -> Decision:
        """Return the decision for a block that ended without an error."""
        return cls.COMMIT if commit_on_exit else cls.KEEP


class Outcome(Enum):
    """The result of settling a transaction."""

    HELD = auto()
    """User code holds the transaction, or its writes are kept for their owner."""
    KEPT = auto()
    """No transaction is open, and nothing was lost."""
    UNDONE = auto()
    """The transaction was rolled back, or the unit's end will roll it back."""


class _Action(Enum):
    HOLD = auto()
    COMMIT = auto()
    ROLL_BACK = auto()
    RELEASE = auto()
    """Release the connection of a transaction that only read."""
    LEAVE = auto()
    """Leave the rollback to the end of the unit."""
    NOTHING = auto()


HOLD, COMMIT, ROLL_BACK, RELEASE, LEAVE, NOTHING = _Action
"""Looked up once, because access to an enumeration's members is slow."""


async def settle(unit: UnitOfWork[Any], decision: Decision, *, last: bool = False) -> Outcome:
    """Carry out a decision about the current transaction; the last one leaves a rollback to ``finish()``."""
    opened, session = unit.opened, unit._watched
    if opened is None or session is None:
        return Outcome.KEPT
    state = session._fastapi_async_sqlalchemy
    if state.holder is not None or state.streams or state.joined or unit._hooks is not None:
        decision = await _prepare(unit, session, decision, last=last)
    action = _choose(unit, session, decision, last=last)
    if action is HOLD:
        return Outcome.HELD
    if action is COMMIT:
        if unit._hooks is not None:
            return await _commit_with_hooks(unit, unit._hooks, opened)
        await opened.commit()
        return Outcome.KEPT
    if action is ROLL_BACK:
        await roll_back(unit)
    elif action is RELEASE:
        await _release(unit, session)
    if action is ROLL_BACK or action is LEAVE:  # a set would be allocated
        return Outcome.UNDONE
    if unit._hooks is not None and not last and decision is not Decision.KEEP:
        await unit._hooks.settled(committed=decision is Decision.COMMIT)
    return Outcome.KEPT


def _choose(unit: UnitOfWork[Any], session: StatefulSession, decision: Decision, *, last: bool) -> _Action:
    """Choose the action that a decision requires in the transaction's current state."""
    if last and (decision is Decision.ROLLBACK or _is_discarded(unit, session, decision)):
        return LEAVE
    if not in_transaction(session) or (last and decision is Decision.KEEP and _is_busy(session)):
        return NOTHING
    if not last and held_by_owner(session):
        return HOLD
    if decision is Decision.COMMIT:
        return COMMIT
    if not last and has_written(session):
        return HOLD if decision is Decision.KEEP else ROLL_BACK
    return RELEASE


async def finish(unit: UnitOfWork[Any], decision: Decision) -> None:
    """Settle the rest and close the unit for good."""
    if finish_idle(unit):
        return
    session = cast("StatefulSession", unit._watched)
    state = session._fastapi_async_sqlalchemy
    try:
        outcome = await settle(unit, decision, last=True)
        while outcome is Outcome.KEPT and unit._hooks is not None:
            if state.busy() or not in_transaction(session):
                await unit._hooks.settled(committed=True)
            if state.busy() or not in_transaction(session):
                break
            outcome = await settle(unit, decision, last=True)  # a hook has begun it
    except BaseException:
        await to_completion(_close(unit, committed=False))
        raise
    if not finish_idle(unit):
        await _close(unit, committed=outcome is Outcome.KEPT)


def finish_idle(unit: UnitOfWork[Any]) -> bool:
    """Close a unit that has nothing left to settle; return whether it was closed."""
    session = unit._watched
    if session is not None:
        holder = session._fastapi_async_sqlalchemy.holder
        if holder is not None or unit._hooks is not None or in_transaction(session):
            return False
        end(session)
        unit.opened = unit._watched = None
    unit._phase = CLOSED
    return True


async def abandon(unit: UnitOfWork[Any]) -> None:
    """Roll back and close the unit for good, to the end even if the task is cancelled meanwhile."""
    if unit.opened is None:
        unit._phase = CLOSED
    else:
        clear_frames(sys.exception())
        await to_completion(finish(unit, Decision.ROLLBACK))


async def roll_back(unit: UnitOfWork[Any]) -> None:
    """Roll back while the unit goes on; if that fails, discard the connection, to the same effect."""
    if unit._watched is not None:
        try:
            await greenlet_spawn(restoring.roll_back, unit._watched)
        except Exception:  # any error: the transaction is not committed
            extra = unit._fields("rolled back")
            logger.warning(_ROLLBACK_FAILED, unit._database.name, exc_info=True, extra=extra)
        if unit._hooks is not None:  # if no transaction was open
            await unit._hooks.settled(committed=False)


async def _prepare(
    unit: UnitOfWork[Any], session: StatefulSession, decision: Decision, *, last: bool
) -> Decision:
    """Wait for operations that a COMMIT, or the unit's end, must not cut short; return the decision then."""
    state, hooks = session._fastapi_async_sqlalchemy, unit._hooks
    if last and state.streams and not state.busy():
        await greenlet_spawn(state.close_streams)
    for block in state.joined:
        block.own = block.own or _serves(block.task, unit)
    if decision is not Decision.COMMIT:
        return decision
    if state.joined:
        await state.joined_ended(_patience(unit))
    if state.holder is not None and (last or hooks is not None or has_written(session)):
        await state.idle()
    return decision if hooks is None else await before_commit(hooks, session)


def _serves(task: asyncio.Task[Any] | None, unit: UnitOfWork[Any]) -> bool:
    """Whether a task runs the application for a unit's request, as below Starlette's BaseHTTPMiddleware.

    It waits for the response to be passed on, so that the settlement must not wait for it.
    """
    call: Any = None if task is None or unit._scope is None else task.get_coro()
    while call is not None:
        frame = getattr(call, "cr_frame", None)
        scope = None if frame is None else frame.f_locals.get("scope")
        if isinstance(scope, dict) and unit._belongs_to(cast("Scope", scope)):
            return True
        call = getattr(call, "cr_await", None)
    return False


def _patience(unit: UnitOfWork[Any]) -> float | None:
    """Return how many seconds COMMIT waits for another task's block: as long as for a connection."""
    limits, pool = unit._config.limits, unit._database.engine.sync_engine.pool
    if limits is not None and limits.timeout is not None:
        return limits.timeout
    return pool.timeout() if isinstance(pool, QueuePool) else _PATIENCE


async def before_commit(hooks: Hooks, session: StatefulSession) -> Decision:
    """Run ``before_commit`` hooks if no transaction is open, as they may begin one; return the decision."""
    if not hooks.rollback_only and not in_transaction(session):
        hooks.refuse_commit()
        await hooks.before_commit()
        if not hooks.rollback_only:
            hooks.refuse_commit()
    return Decision.ROLLBACK if hooks.rollback_only else Decision.COMMIT


async def _commit_with_hooks(unit: UnitOfWork[Any], hooks: Hooks, opened: AsyncSession) -> Outcome:
    """Commit; roll back if a ``before_commit`` hook has set rollback-only."""
    try:
        await opened.commit()
    except UnexpectedRollbackError:
        if not hooks.rollback_only:
            raise
        await roll_back(unit)
        return Outcome.UNDONE
    return Outcome.KEPT


async def _release(unit: UnitOfWork[Any], session: StatefulSession) -> None:
    try:
        await greenlet_spawn(release, session)
    except Exception:  # any error: nothing was written
        extra = unit._fields("only read")
        logger.warning(_ROLLBACK_FAILED, unit._database.name, exc_info=True, extra=extra)


async def _close(unit: UnitOfWork[Any], *, committed: bool) -> None:
    """Close the unit and its session, roll back any open transaction, and run the remaining hooks."""
    session = unit._watched
    unit.opened, unit._watched, unit._phase = None, None, CLOSED
    if session is None:
        return
    if session._fastapi_async_sqlalchemy.busy():
        await discard_in_use(session)
    else:
        await _end_session(unit, session)
    if unit._hooks is not None:
        await unit._hooks.settled(committed=committed)


async def _end_session(unit: UnitOfWork[Any], session: StatefulSession) -> None:
    state = session._fastapi_async_sqlalchemy
    try:
        if in_transaction(session):
            await greenlet_spawn(restoring.roll_back, session)
    except Exception:  # any error: the transaction is not committed
        extra = unit._database.shared.fields(session.hash_key, "rolled back")
        logger.warning(_ROLLBACK_FAILED, unit._database.name, exc_info=True, extra=extra)
    finally:
        state.closed = True
        if in_transaction(session):  # a listener has interrupted its end
            await greenlet_spawn(Session.invalidate, session)
        end(session)


def _is_busy(session: StatefulSession) -> bool:
    return session._fastapi_async_sqlalchemy.busy()


def _is_discarded(unit: UnitOfWork[Any], session: StatefulSession, decision: Decision) -> bool:
    """Whether the unit's end rolls back work that nobody asked to commit; logs the discarded work."""
    if decision is not Decision.KEEP:
        return False
    return _warn_of_discarded(unit, session) or (unit._hooks is not None and unit._hooks.mark is not None)


def _warn_of_discarded(unit: UnitOfWork[Any], session: StatefulSession) -> bool:
    statements, objects = session._fastapi_async_sqlalchemy.ledger.written, pending(session)
    given_up = unit._hooks is not None and unit._hooks.rollback_only
    if not (statements or objects) or given_up or unit._config.settings.read_only:
        return False
    logger.warning(
        "%s: %s and %s are rolled back at the end of their unit of work, "
        "because nothing committed them: give the middleware commit_on_exit=True, open a block with "
        "`db.begin()`, or call `await db.session.commit()`.",
        unit._database.name,
        _counted(statements, "statement"),
        _counted(objects, "unflushed object"),
        extra=unit._fields("rolled back", statements),
    )
    return True
