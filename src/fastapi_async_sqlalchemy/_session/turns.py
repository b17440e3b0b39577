"""Turns: a session serves one task at a time, and no task after its unit's end.

SQLAlchemy has no event for the beginning and the end of each operation, and a refusal must come before
the session's own state changes. So operations are overridden, and each override takes a turn.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final, TypeVar

from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool
from sqlalchemy.util import EMPTY_DICT, await_only

from ..exceptions import ConcurrentUseError, PoolTimeoutError, UnexpectedRollbackError, UnitClosedError
from .cancellation import clear_frames
from .checkout import pool_status, remedy_for
from .hooks import in_hook_of
from .plain import in_transaction
from .restoring import note_loaded
from .state import SessionState, StatefulSession, task_at_work, task_name
from .streams import watch_stream
from .waiting import pass_on, wait_for_turn, wake

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable


T = TypeVar("T")

ENDINGS: Final = frozenset({"commit", "rollback", "close", "reset", "release"})
"""The operations that decide a transaction, and so must not be cut short."""
_GIVES_UP: Final = frozenset({"rollback", "close", "reset", "invalidate", "release"})
"""The operations that may leave a stream unread."""
_STREAM_LEFT: Final = (
    "a stream has rows left, which would be lost (read it to its end, or `await result.close()`)"
)
_FLUSH_FAILED: Final = "a flush in it failed and it has been rolled back"


def exclusive(method: Callable[..., T], name: str = "") -> Callable[..., T]:
    """Guard an operation that waits for the database: one task at a time may run it; others are refused."""
    name = name or method.__name__

    @functools.wraps(method)
    def operation(session: StatefulSession, *args: Any, **kwargs: Any) -> T:
        state = session._fastapi_async_sqlalchemy
        task = task_at_work()
        if (state.holder is not None or state.closed) and _reenter(state, task, name):
            return method(session, *args, **kwargs)
        outer = _enter(state, session, task, name)
        try:
            result = method(session, *args, **kwargs)
        except BaseException as error:
            _translate(session, state, error)
            raise
        finally:
            _leave(session, state, task, outer)
        if state.closed and name not in ENDINGS:
            raise UnitClosedError(state.shared.name)
        if state.streamed:
            watch_stream(session, result)
        return result

    return operation


def returning(method: Callable[..., Any]) -> Callable[..., Any]:
    """Guard what executes a statement otherwise than by ``execute``: SQLAlchemy does not call that for it."""
    guarded = exclusive(method)

    @functools.wraps(method)
    def operation(session: StatefulSession, *args: Any, **kwargs: Any) -> Any:
        statement = args[0] if args else kwargs.get("statement")
        closed = session._fastapi_async_sqlalchemy.closed
        if getattr(statement, "is_dml", False) and session.identity_map and not closed:
            note_loaded(session, statement, kwargs.get("execution_options", EMPTY_DICT))
        return guarded(session, *args, **kwargs)

    return operation


def executing(method: Callable[..., Any]) -> Callable[..., Any]:
    """Guard ``execute``, the most frequent operation and the only one that may leave a stream unread.

    Its usual call is written out, because passing on ``*args, **kwargs`` costs more than the whole guard.
    """
    guarded = exclusive(method)

    @functools.wraps(method)
    def execute(
        session: StatefulSession,
        statement: Any,
        params: Any = None,
        *,
        execution_options: Any = EMPTY_DICT,
        bind_arguments: Any = None,
        **internal: Any,
    ) -> Any:
        state = session._fastapi_async_sqlalchemy
        if internal or state.holder is not None or state.closed:
            if getattr(statement, "is_dml", False) and session.identity_map and not state.closed:
                note_loaded(session, statement, execution_options)
            options = {"execution_options": execution_options, "bind_arguments": bind_arguments}
            return guarded(session, statement, params=params, **options, **internal)
        task = task_at_work()
        outer = _enter(state, session, task, "execute")
        try:
            if getattr(statement, "is_dml", False) and session.identity_map:
                note_loaded(session, statement, execution_options)
            result = method(
                session,
                statement,
                params=params,
                execution_options=execution_options,
                bind_arguments=bind_arguments,
            )
        except BaseException as error:
            _translate(session, state, error)
            raise
        finally:
            _leave(session, state, task, outer)
        if state.closed:
            raise UnitClosedError(state.shared.name)
        if state.streamed:
            watch_stream(session, result)
        return result

    return execute


def flushing(method: Callable[..., Any]) -> Callable[..., Any]:
    """Guard ``flush``. Nearly every other operation calls it first, where the guard must cost little."""
    guarded = exclusive(method)

    @functools.wraps(method)
    def flush(session: StatefulSession, *args: Any, **kwargs: Any) -> Any:
        state = session._fastapi_async_sqlalchemy
        holder = state.holder
        if holder is None or holder is not task_at_work():
            return guarded(session, *args, **kwargs)
        try:
            return method(session, *args, **kwargs)
        except BaseException:
            state.committing = False  # commit() flushes before it sends COMMIT
            raise

    return flush


def cleaning(method: Callable[..., Any]) -> Callable[..., Any]:
    """Guard an operation that gives the transaction up; after the unit's end it is always allowed."""
    guarded = exclusive(method)

    @functools.wraps(method)
    def operation(session: StatefulSession, *args: Any, **kwargs: Any) -> Any:
        closed = session._fastapi_async_sqlalchemy.closed
        return (method if closed else guarded)(session, *args, **kwargs)

    return operation


def in_memory(method: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse a change of the session while another task uses it, or after the unit's end."""
    name = method.__name__

    @functools.wraps(method)
    def operation(session: StatefulSession, *args: Any, **kwargs: Any) -> Any:
        state = session._fastapi_async_sqlalchemy
        # a settlement includes objects added meanwhile, unless it is a rollback, which would drop them
        if state.closed or (
            state.holder is not None
            and (not state.settling or state.operation == "rollback")
            and not (state.shared.waits and not session._flushing)
        ):
            _refuse(state, task_at_work(), name)
        return method(session, *args, **kwargs)

    return operation


def _reenter(state: SessionState, task: asyncio.Task[Any] | None, name: str) -> bool:
    """Allow an operation inside another of the same task, or after a settlement; refuse anything else.

    Return whether it is inside another one.
    """
    while state.settling and state.holder is not None and state.holder is not task:
        if in_hook_of(state.hooks):
            break  # the settlement may be waiting for this task
        await_only(state.idle())
    if state.shared.waits and task is not None and state.holder not in {None, task} and not state.closed:
        await_only(wait_for_turn(state, task, name))
        try:
            _refuse_between_rows(state, task, name)
        except BaseException:
            pass_on(state)
            raise
    _refuse(state, task, name)
    return state.holder is not None


def _refuse(state: SessionState, task: asyncio.Task[Any] | None, name: str) -> None:
    """Refuse an operation after the unit's end, or in the middle of another task's operation."""
    if state.closed:
        raise UnitClosedError(state.shared.name)
    if state.holder is not None and state.holder is not task:
        raise ConcurrentUseError(
            state.shared.name,
            f"{task_name(task)} called {name}()",
            f"{task_name(state.holder)} is in the middle of {state.operation}()",
        )


def _enter(
    state: SessionState, session: StatefulSession, task: asyncio.Task[Any] | None, name: str
) -> StatefulSession | None:
    """Begin an operation; return the session whose operation this task is already in the middle of."""
    shared = state.shared
    if task is not None and (loop := task.get_loop()) is not shared.loops.current:
        shared.loops.take_over(loop, shared.name, f"{task_name(task)} called {name}()")
    if shared.unbuffered and name not in _GIVES_UP:
        _refuse_between_rows(state, task, name)
    state.holder = task
    state.operation = name
    outer = shared.operating.get(task)
    shared.operating[task] = session
    return outer


def _leave(
    session: StatefulSession,
    state: SessionState,
    task: asyncio.Task[Any] | None,
    outer: StatefulSession | None,
) -> None:
    operating = state.shared.operating
    if outer is None:
        del operating[task]
    else:
        operating[task] = outer
    if state.closed or state.waiter is not None:
        _leave_to_others(session, state, task)
    else:
        state.holder = None
    if state.checkout is not None:
        state.checkout.after_operation(session)


def _leave_to_others(session: StatefulSession, state: SessionState, task: asyncio.Task[Any] | None) -> None:
    """End an operation that another task waits for, or that outlasted its unit."""
    try:
        if state.closed and in_transaction(session):
            Session.close(session)  # the unit has ended meanwhile, and left the rest to this task
            if state.checkout is not None:
                state.checkout.after_operation(session)
    finally:  # ROLLBACK may fail, too
        if state.holder is task:
            pass_on(state)
        else:
            wake(state)


def refuse_to_lose_rows(session: StatefulSession | None) -> None:
    """Refuse a statement on the session's connection itself; an operation of the session was asked before."""
    state = None if session is None else session._fastapi_async_sqlalchemy
    if state is not None and state.holder is None:
        _refuse_between_rows(state, task_at_work(), "execute")


def _refuse_between_rows(state: SessionState, task: asyncio.Task[Any] | None, name: str) -> None:
    """Refuse an operation if the driver would lose the remaining rows of a stream."""
    if any(stream.between_rows for stream in state.streams):
        attempt = f"{task_name(task)} called {name}()"
        raise ConcurrentUseError(state.shared.name, attempt, _STREAM_LEFT)


def _translate(session: StatefulSession, state: SessionState, error: BaseException) -> None:
    """Replace an error by a more specific one of this package."""
    clear_frames(error)
    if not isinstance(error, Exception):
        return
    if state.operation not in ENDINGS:
        state.shared.note_replaced(session, error, committing=False)
    name = state.shared.name
    if state.closed:
        raise UnitClosedError(name) from error
    flush_failed = type(error) is PendingRollbackError and state.operation == "commit"
    if flush_failed and state.ledger.failure is not None:
        raise UnexpectedRollbackError(name, _FLUSH_FAILED) from state.ledger.failure
    if isinstance(error, PoolTimeoutError):
        if not error.holders:
            error._name_holders(state.shared.holders())
    elif isinstance(error, PoolTimeout):
        raise pool_timeout(state) from error


def pool_timeout(state: SessionState) -> PoolTimeoutError:
    """Return the error for a pool that had no connection within its own timeout."""
    pools = [engine.pool for engine in state.shared.loops.engines]
    pool = next((pool for pool in pools if pool_status(pool).available == 0), pools[0])
    timeout = pool.timeout() if isinstance(pool, QueuePool) else 0.0
    remedy, holders = remedy_for(state.outer_holds), state.shared.holders()
    return PoolTimeoutError(state.shared.name, timeout, pool_status(pool), remedy, holders)
