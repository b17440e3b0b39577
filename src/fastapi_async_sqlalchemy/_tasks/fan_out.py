"""Many tasks, each in a separate unit of work: gather, task groups, connections."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from attrs import Factory, define, evolve
from sqlalchemy.util import greenlet_spawn

from .._arguments.checks import boolean, optional_count, optional_seconds
from .._arguments.keywords import session_arguments
from .._session.cancellation import to_completion
from .._session.checkout import limits_of
from .._session.watched import connection_of
from .._unit.database import S_co
from .._unit.place import open_unit
from .._unit.scope import UnitScope
from ..exceptions import _safe_repr

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable
    from contextlib import AbstractAsyncContextManager
    from contextvars import ContextVar
    from types import TracebackType

    from .._arguments.keywords import SessionArgs
    from .._session.state import Shared
    from .._unit.database import UnitConfig
    from .._unit.place import Handle, Place

T = TypeVar("T")

logger = logging.getLogger("fastapi_async_sqlalchemy")


@define(eq=False, repr=False)
class Children(Generic[S_co]):
    """The configuration of child tasks' units; by default that of the current unit."""

    config: UnitConfig[S_co]
    current: ContextVar[Place[S_co]]

    def await_all(self, waiting: asyncio.Task[Any] | None, tasks: Iterable[asyncio.Task[Any]]) -> None:
        """Record that a task waits for others, and refuse a wait that could never end."""
        if waiting is None:
            return
        self.config.database.shared.awaited.update(dict.fromkeys(tasks, waiting))
        limits = self.config.limits
        if limits is not None and limits.places is not None:
            limits.places.refuse_deadlock()

    def scope(self) -> UnitScope[S_co]:
        """Return a new unit."""
        return UnitScope(self.config, self.current)

    async def run(self, coroutine: Coroutine[Any, Any, T], places: AbstractAsyncContextManager[Any]) -> T:
        """Await a coroutine in a separate unit, once it has a place."""
        async with places, self.scope():
            return await coroutine


def _children_of(
    handle: Handle[S_co],
    commit_on_exit: bool | None,  # noqa: FBT001  # three values
    session_args: object,
) -> Children[S_co]:
    """Return the children of the current unit; raise ``SessionNotInitialisedError`` without an engine."""
    database, current = handle._database, handle._current
    if commit_on_exit is not None:
        boolean("commit_on_exit", commit_on_exit)
    arguments = session_arguments(session_args)
    _ = database.engine
    found = open_unit(current)
    config = database.configs[database.commit_on_exit] if found is None else found._config
    if config.settings.twophase:  # each of the children ends separately
        config = evolve(config, make=None, settings=database.settings)
    if arguments:
        config = evolve(config, make=database.maker(arguments, config.settings))
    if commit_on_exit is not None:
        config = evolve(config, commit_on_exit=commit_on_exit)
    return Children(config, current)


def _places(max_concurrent: int | None) -> AbstractAsyncContextManager[Any]:
    return nullcontext() if max_concurrent is None else asyncio.Semaphore(max_concurrent)


def coroutines_of(values: Iterable[object]) -> list[Coroutine[Any, Any, Any]]:
    """Validate coroutines; close all of them if anything else was given."""
    given = list(values)
    wrong = [value for value in given if not isinstance(value, Coroutine)]
    found: list[Coroutine[Any, Any, Any]] = [value for value in given if isinstance(value, Coroutine)]
    if wrong:
        close(found)
        message = (
            f"each argument must be a coroutine, as work() is of an `async def`, not {_safe_repr(wrong[0])}."
        )
        raise TypeError(message)
    if len({id(coroutine) for coroutine in found}) < len(found):
        close(found)
        message = "each coroutine runs once, and one was given twice: call its function again for the second."
        raise TypeError(message)
    return found


def close(coroutines: Iterable[Coroutine[Any, Any, Any]]) -> None:
    """Close coroutines, so that none warns of never being awaited; one that has run is closed already."""
    for coroutine in coroutines:
        coroutine.close()


async def gather(
    children: Children[Any],
    coroutines: list[Coroutine[Any, Any, Any]],
    max_concurrent: int | None,
    *,
    return_exceptions: bool,
) -> list[Any]:
    """Run each coroutine in a separate task and unit, and return the results in order.

    The first error cancels the others, waits until their units are settled, and is raised.
    """
    if max_concurrent is None and children.config.limits is not None:
        max_concurrent = children.config.limits.max_concurrent
    places = _places(max_concurrent)
    tasks = [asyncio.ensure_future(children.run(coroutine, places)) for coroutine in coroutines]
    children.await_all(asyncio.current_task(), tasks)
    try:
        await _all_or_first_error(tasks, return_exceptions=return_exceptions)
        errors = [_error(task) for task in tasks]
        failed = [error for error in errors if error is not None]
        if failed and not return_exceptions:
            for other in failed[1:]:
                extra = children.config.database.shared.fields()
                logger.error(
                    "Another coroutine of the same gather() failed, too", exc_info=other, extra=extra
                )
            raise failed[0]
        return [task.result() if error is None else error for task, error in zip(tasks, errors, strict=True)]
    finally:
        try:
            await _end(tasks, children.config.database.shared)
        finally:
            close(coroutines)


async def _all_or_first_error(tasks: list[asyncio.Task[Any]], *, return_exceptions: bool) -> None:
    enough, left = asyncio.get_running_loop().create_future(), len(tasks)

    def ended(task: asyncio.Task[Any]) -> None:
        nonlocal left
        left -= 1
        stop = left == 0 or (not return_exceptions and _error(task) is not None)
        if stop and not enough.done():
            enough.set_result(None)

    for task in tasks:
        task.add_done_callback(ended)
    if tasks:
        await enough


class Closing(Coroutine[Any, Any, T]):
    """A coroutine that closes others if it is closed before it begins."""

    __slots__ = ("_inner", "_others")

    def __init__(self, inner: Coroutine[Any, Any, T], others: Iterable[Coroutine[Any, Any, Any]]) -> None:
        self._inner, self._others = inner, others

    def send(self, value: Any) -> Any:
        """Resume the coroutine."""
        return self._inner.send(value)

    def throw(self, *error: Any) -> Any:
        """Resume the coroutine with an error, and close the others if it ends by one."""
        try:
            return self._inner.throw(*error)
        except BaseException:
            close(self._others)
            raise

    def close(self) -> None:
        """Close the coroutine and the others."""
        self._inner.close()
        close(self._others)

    def __await__(self) -> Generator[Any, Any, T]:
        return self._inner.__await__()


def _error(task: asyncio.Task[Any]) -> BaseException | None:
    """Return the error of a task that has ended with one."""
    if not task.done():
        return None
    return asyncio.CancelledError() if task.cancelled() else task.exception()


async def _end(tasks: Iterable[asyncio.Task[Any]], shared: Shared) -> None:
    """Cancel the running tasks and wait until their units are settled."""
    running = [task for task in tasks if task.cancel()]
    if running:
        await to_completion(_all_done(running, shared))


async def _all_done(tasks: list[asyncio.Task[Any]], shared: Shared) -> None:
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s failed while it was cancelled", task, exc_info=error, extra=shared.fields())


@define(eq=False, repr=False)
class UnitTaskGroup(Generic[S_co]):
    """The result of ``db.task_group()``: built on ``asyncio.TaskGroup``, with a unit for each task."""

    _children: Callable[[], Children[S_co]]
    _max_concurrent: int | None
    _group: asyncio.TaskGroup = Factory(asyncio.TaskGroup)
    _entered: tuple[Children[S_co], AbstractAsyncContextManager[Any]] | None = None
    _running: set[asyncio.Task[Any]] = Factory(set["asyncio.Task[Any]"])
    _leaving: asyncio.Task[Any] | None = None
    """The task that leaves the group, and so waits for tasks that others still start in it."""

    async def __aenter__(self) -> Self:
        children = self._children()
        await self._group.__aenter__()
        self._entered = children, _places(self._max_concurrent)
        return self

    def create_task(self, coroutine: Coroutine[Any, Any, T], *, name: str | None = None) -> asyncio.Task[T]:
        """Start a coroutine in a separate task and unit, which commits or rolls back by its outcome."""
        coroutines_of([coroutine])
        if self._entered is None:
            coroutine.close()
            message = "enter the group first: `async with db.task_group() as tasks:`."
            raise RuntimeError(message)
        children, places = self._entered
        running = children.run(coroutine, places)
        try:
            task = self._group.create_task(running, name=name)
        except BaseException:
            running.close()
            coroutine.close()
            raise
        self._running.add(task)
        children.await_all(self._leaving, [task])
        task.add_done_callback(self._running.discard)
        task.add_done_callback(lambda _: coroutine.close())
        return task

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._entered is not None:
            self._leaving = asyncio.current_task()
            self._entered[0].await_all(self._leaving, self._running)
        await self._group.__aexit__(kind, error, trace)


@define(eq=False, repr=False)
class Connection(Generic[S_co]):
    """The result of ``db.connection()``: a unit of work whose connection is checked out on entry."""

    scope: UnitScope[S_co]

    async def __aenter__(self) -> S_co:
        unit = await self.scope.__aenter__()
        try:
            await greenlet_spawn(connection_of, unit.session.sync_session)
        except BaseException as error:
            await self.scope.__aexit__(type(error), error, error.__traceback__)
            raise
        return unit.session

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.scope.__aexit__(kind, error, trace)


def open_connection(
    handle: Handle[S_co],
    timeout: float | None,
    commit_on_exit: bool | None,  # noqa: FBT001  # three values
) -> Connection[S_co]:
    """Return the block for ``db.connection()``."""
    optional_seconds("timeout", timeout)
    children = _children_of(handle, commit_on_exit, None)
    limits = limits_of("timeout", timeout, None, handle._database.shared, children.config.limits)
    return Connection(UnitScope(evolve(children.config, limits=limits), children.current))


def gather_in_units(
    handle: Handle[Any],
    coroutines: tuple[Coroutine[Any, Any, Any], ...],
    *,
    return_exceptions: bool,
    max_concurrent: int | None,
    commit_on_exit: bool | None,
    session_args: SessionArgs | None,
) -> Coroutine[Any, Any, Any]:
    """Return the coroutine for ``db.gather()``."""
    found = coroutines_of(coroutines)
    try:
        places = optional_count("max_concurrent", max_concurrent)
        boolean("return_exceptions", return_exceptions)
        children = _children_of(handle, commit_on_exit, session_args)
    except BaseException:
        close(found)
        raise
    return Closing(gather(children, found, places, return_exceptions=return_exceptions), found)


def open_task_group(
    handle: Handle[S_co],
    max_concurrent: int | None,
    commit_on_exit: bool | None,  # noqa: FBT001  # three values
    session_args: SessionArgs | None,
) -> UnitTaskGroup[S_co]:
    """Return the group for ``db.task_group()``."""
    places = optional_count("max_concurrent", max_concurrent)
    _children_of(handle, commit_on_exit, session_args)  # refuses wrong arguments now
    return UnitTaskGroup(lambda: _children_of(handle, commit_on_exit, session_args), places)
