"""Tasks that wait for their turn of a session, one after the other, where the pair asks for that."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from attrs import Factory, define
from sqlalchemy.pool import QueuePool

from ..exceptions import ConcurrentUseError, UnitClosedError
from .hooks import in_hook_of
from .state import task_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .state import SessionState, Shared

_LONGEST: Final = 30.0
"""Seconds to wait if the pool has no timeout."""
_DEADLOCK: Final = (
    "leave the session to the task that waits, open `async with db():` in the other one, or await it after "
    "the operation"
)
_TOO_LONG: Final = "give the slow task a separate unit with `async with db():`, or raise pool_timeout"


@define(eq=False)
class Turn:
    """A task that waits for a session, and the operation that it wants to begin."""

    task: asyncio.Task[Any]
    operation: str
    come: asyncio.Future[None] = Factory(lambda: asyncio.get_running_loop().create_future())


async def wait_for_turn(state: SessionState, task: asyncio.Task[Any], operation: str) -> None:
    """Wait until the operations of tasks that came before have ended; then nobody holds the session.

    Raises ``ConcurrentUseError`` where they wait for this task, or after the timeout of the pool.
    """
    shared, turn = state.shared, Turn(task, operation)
    attempt = f"{task_name(task)} called {operation}()"
    if in_hook_of(state.hooks) or _is_deadlock(shared, task, state.holder):  # a hook may wait for its tasks
        busy = f"{task_name(state.holder)} is in the middle of {state.operation}(), which waits for that task"
        raise ConcurrentUseError(shared.name, attempt, busy, _DEADLOCK)
    state.turns += (turn,)
    if state.waiter is None:
        state.waiter = asyncio.get_running_loop().create_future()
    shared.waiting[task] = state
    limit = asyncio.timeout(_patience(shared))
    try:
        async with limit:
            await turn.come
    except BaseException as error:
        if turn in state.turns:
            state.turns = tuple(one for one in state.turns if one is not turn)
        elif state.holder is task:  # the turn has come at the same moment
            pass_on(state)
        if limit.expired() and isinstance(error, TimeoutError):
            busy = f"{task_name(state.holder)} has been in the middle of {state.operation}() for too long"
            raise ConcurrentUseError(shared.name, attempt, busy, _TOO_LONG) from error
        raise
    finally:
        shared.waiting.pop(task, None)
    if state.closed:
        pass_on(state)
        raise UnitClosedError(shared.name)
    state.holder = None


def pass_on(state: SessionState) -> None:
    """End a task's turn: the session is the next one's from now on, or nobody's."""
    state.holder = None
    wake(state)
    while state.turns and state.holder is None:
        turn, *later = state.turns
        state.turns = tuple(later)
        if not turn.come.done():
            state.holder, state.operation = turn.task, turn.operation
            turn.come.set_result(None)
    if state.turns:
        state.waiter = asyncio.get_running_loop().create_future()


def wake(state: SessionState) -> None:
    """Let those look again who wait for a session without taking a turn."""
    if state.waiter is not None:
        state.waiter.set_result(None)
        state.waiter = None


def _patience(shared: Shared) -> float:
    """Return how many seconds to wait: as many as for a connection."""
    pool = None if shared.engine is None else shared.engine.pool
    return pool.timeout() if isinstance(pool, QueuePool) else _LONGEST


def _is_deadlock(shared: Shared, task: asyncio.Task[Any], holder: asyncio.Task[Any] | None) -> bool:
    """Whether the holder of a session waits for a task: for its end, or for a session that it holds."""
    waiting_for_task = set(_callers(shared, task))
    seen = set[asyncio.Task[Any]]()
    while holder is not None and holder not in seen:
        if holder in waiting_for_task:
            return True
        seen.add(holder)
        wanted = shared.waiting.get(holder)
        holder = None if wanted is None else wanted.holder
    return False


def _callers(shared: Shared, task: asyncio.Task[Any] | None) -> Iterator[asyncio.Task[Any]]:
    """Yield a task, the one that awaits its end, and so on."""
    while task is not None:
        yield task
        task = shared.awaited.get(task)
