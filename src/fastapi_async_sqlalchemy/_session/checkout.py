"""The connection pool of one database: its status, its deadlines, and limits on concurrent connections."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar, cast
from weakref import ref

from attrs import Factory, define, frozen
from sqlalchemy.engine import Engine
from sqlalchemy.pool import QueuePool
from sqlalchemy.util import await_only, greenlet_spawn

from .._arguments.checks import optional_count, optional_seconds
from .._pool_status import PoolStatus
from ..exceptions import PoolTimeoutError, PropagationError
from .state import task_at_work

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from sqlalchemy.engine import Connection
    from sqlalchemy.orm import Session
    from sqlalchemy.pool import Pool

    from .state import Shared

T = TypeVar("T")

logger = logging.getLogger("fastapi_async_sqlalchemy")

Route: TypeAlias = "Callable[[Engine | Connection], Engine | Connection]"
"""A function from the engine that a session chose to the engine that it uses."""


def pool_status(pool: Pool) -> PoolStatus:
    """Return the status of a pool; only a ``QueuePool`` counts its connections."""
    if not isinstance(pool, QueuePool):
        return PoolStatus(pool_class=type(pool).__name__)
    overflow = pool._max_overflow  # there is no public name
    limited = overflow >= 0
    checked_out = pool.checkedout()
    capacity = pool.size() + overflow if limited else None
    return PoolStatus(
        pool_class=type(pool).__name__,
        size=pool.size(),
        max_overflow=overflow if limited else None,
        capacity=capacity,
        checked_in=pool.checkedin(),
        checked_out=checked_out,
        available=None if capacity is None else max(0, capacity - checked_out),
        saturation=checked_out / capacity if capacity else None,
    )


@define(eq=False, repr=False)
class Places:
    """A limit on how many sessions of a block hold a connection at a time; the others wait in order."""

    limit: int
    awaited: Mapping[asyncio.Task[Any], asyncio.Task[Any]]
    """For each task, the task that waits for its end."""
    _holders: dict[Checkout, asyncio.Task[Any] | None] = Factory(dict["Checkout", "asyncio.Task[Any] | None"])
    _waiting: dict[asyncio.Future[None], Checkout] = Factory(dict["asyncio.Future[None]", "Checkout"])
    _tasks: dict[Checkout, asyncio.Task[Any] | None] = Factory(dict["Checkout", "asyncio.Task[Any] | None"])

    async def take(self, checkout: Checkout) -> None:
        """Wait for a place; raise ``PropagationError`` if every holder waits for this one."""
        task = asyncio.current_task()
        if len(self._holders) < self.limit:
            self._holders[checkout] = task
            return
        granted = asyncio.get_running_loop().create_future()
        self._waiting[granted], self._tasks[checkout] = checkout, task
        self.refuse_deadlock()
        try:
            await granted
        except BaseException:
            if checkout in self._holders:  # granted and cancelled at the same time
                self.give_back(checkout)
            raise
        finally:
            self._waiting.pop(granted, None)
            del self._tasks[checkout]

    def give_back(self, checkout: Checkout) -> None:
        """Pass the place to the next session."""
        del self._holders[checkout]
        for granted, following in self._waiting.items():
            if not granted.done():
                self._holders[following] = self._tasks[following]
                granted.set_result(None)
                return

    def refuse_deadlock(self) -> None:
        """Fail the latest wait if every holder waits, itself or by its children, for one of the waiters."""
        blocked = set[asyncio.Task[Any] | None]()
        open_waits = [granted for granted in self._waiting if not granted.done()]
        for granted in open_waits:
            task = self._tasks[self._waiting[granted]]
            while task is not None and task not in blocked:
                blocked.add(task)
                task = self.awaited.get(task)
        if open_waits and self._holders and set(self._holders.values()) <= blocked:
            database = self._waiting[open_waits[-1]].database
            error = PropagationError(database, _DEADLOCK.format(self.limit), _RAISE_LIMIT)
            open_waits[-1].set_exception(error)


@frozen(kw_only=True, eq=False)
class Limits:
    """A session's deadline for its connection, and the limit on concurrent ones."""

    timeout: float | None
    """None means the pool's own timeout."""
    places: Places | None
    _engines: dict[Engine, Engine] = Factory(dict[Engine, Engine])

    @property
    def max_concurrent(self) -> int | None:
        """How many units may hold a connection at a time."""
        return None if self.places is None else self.places.limit

    def route_after(self, before: Route | None, shared: Shared) -> Route:
        """Return a route that continues another one to engines within the limits."""
        if before is None:
            return partial(self._route, shared)
        return lambda bind: self._route(shared, before(bind))

    def _route(self, shared: Shared, bind: Engine | Connection) -> Engine | Connection:
        """Return an engine over the same pool whose connections respect the limits."""
        if not isinstance(bind, Engine):
            return bind  # it is already connected
        limited = self._engines.get(bind)
        if limited is None:
            self._engines[bind] = limited = bind.execution_options()
            limited.connect = partial(_connect, shared, ref(limited))  # type: ignore[method-assign]  # ours
            shared.listen(bind)
            shared.loops.engines.add(limited)
        return limited


def _connect(shared: Shared, engine: ref[Engine]) -> Connection:
    """Check a connection out for the session at work; called inside SQLAlchemy's greenlet."""
    state = shared.operating[task_at_work()]._fastapi_async_sqlalchemy
    return cast("Checkout", state.checkout).connect(cast("Engine", engine()), state.outer_holds)


def limits_of(
    name: str, timeout: object, max_concurrent: object, shared: Shared, outer: Limits | None = None
) -> Limits | None:
    """Validate the limits. Anything not given is inherited from the enclosing unit."""
    seconds = optional_seconds(name, timeout)
    limit = optional_count("max_concurrent", max_concurrent)
    if seconds is None and limit is None:
        return outer
    if outer is not None and seconds is None:
        seconds = outer.timeout
    places = None if outer is None else outer.places
    return Limits(timeout=seconds, places=places if limit is None else Places(limit, shared.awaited))


@define(eq=False, repr=False)
class Checkout:
    """The checkout of one session's connections, within limits.

    The place among concurrent sessions is taken before the connection and given back with it.
    """

    database: str
    limits: Limits
    placed: bool = False

    def connect(self, engine: Engine, outer_holds: Callable[[], bool] | None) -> Connection:
        """Check a connection out in time; called inside SQLAlchemy's greenlet."""
        if self.limits.places is not None and not self.placed:
            self._wait_for(self.limits.places.take(self), self.limits.timeout, engine, lambda _: NO_PLACE)
            self.placed = True
        timeout, pool = self.limits.timeout, engine.pool
        if timeout is None and isinstance(pool, QueuePool):
            timeout = pool.timeout()

        def remedy(status: PoolStatus) -> str:
            return _UNREACHABLE if status.available != 0 else remedy_for(outer_holds)

        return self._wait_for(greenlet_spawn(type(engine).connect, engine), timeout, engine, remedy)

    def _wait_for(
        self,
        coming: Coroutine[Any, Any, T],
        timeout: float | None,
        engine: Engine,
        remedy: Callable[[PoolStatus], str],
    ) -> T:
        """Await one coroutine in time; called inside SQLAlchemy's greenlet."""
        deadline = asyncio.timeout(timeout)

        async def within() -> T:
            async with deadline:
                return await coming

        try:
            return await_only(within())
        except TimeoutError as error:
            if timeout is None or not deadline.expired():
                raise  # the driver's own timeout
            status = pool_status(engine.pool)
            raise PoolTimeoutError(self.database, timeout, status, remedy(status)) from error

    def after_transaction(self, session: Session, *, committed: bool, unknown: bool) -> None:  # noqa: ARG002  # for observed units
        """Give the place back after a transaction."""
        self.after_operation(session)

    def after_operation(self, session: Session) -> None:
        """Give the place back once no transaction is open."""
        if self.placed and self.limits.places is not None and not session.in_transaction():
            self.placed = False
            self.limits.places.give_back(self)


NO_PLACE: Final = (
    "max_concurrent units of this block have one, this task's own perhaps among them, so raise it, or end "
    "their transactions sooner"
)
_DEADLOCK: Final = "max_concurrent={} units of this block have a connection, and all wait for this one"
_RAISE_LIMIT: Final = "raise max_concurrent, or end their transactions before"
_NESTED: Final = (
    "this unit stands inside one that holds a connection itself, so end that one's transaction first, or, in "
    "the same task, join it by propagation='required' or 'nested'"
)
_UNREACHABLE: Final = "the pool has room, so look why the database does not let a new connection in"
_BUSY: Final = "hold connections for a shorter time, or give engine_args a larger pool_size"


def remedy_for(outer_holds: Callable[[], bool] | None) -> str:
    """Return the remedy for a pool whose connections are all in use."""
    return _NESTED if outer_holds is not None and outer_holds() else _BUSY
