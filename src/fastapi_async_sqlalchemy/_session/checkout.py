"""The connection pool of one database: its status, its deadlines, and limits on concurrent connections."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
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
from .plain import get_transaction, in_transaction
from .state import task_at_work

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping

    from sqlalchemy.engine import Connection
    from sqlalchemy.orm import Session
    from sqlalchemy.pool import Pool

    from .state import SessionState, Shared, StatefulSession

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
    _waiting: dict[asyncio.Future[None], Wait] = Factory(dict["asyncio.Future[None]", "Wait"])
    _blocked: Counter[asyncio.Task[Any]] = Factory(Counter["asyncio.Task[Any]"])
    """For each task, how many waits it cannot go on before the end of."""

    async def take(self, checkout: Checkout) -> None:
        """Wait for a place; raise ``PropagationError`` if every holder waits for this one."""
        task = asyncio.current_task()
        if len(self._holders) < self.limit:
            self._holders[checkout] = task
            return
        granted = asyncio.get_running_loop().create_future()
        self._waiting[granted] = wait = Wait(checkout, task)
        self._begin(wait)
        self._refuse_deadlock()
        try:
            await granted
        except BaseException:
            if checkout in self._holders:  # granted and cancelled at the same time
                self.give_back(checkout)
            raise
        finally:
            if self._waiting.pop(granted, None) is not None:
                self._end(wait)

    def give_back(self, checkout: Checkout) -> None:
        """Pass the place to the next session."""
        del self._holders[checkout]
        while self._waiting:
            granted = next(iter(self._waiting))
            wait = self._waiting.pop(granted)
            self._end(wait)
            if not granted.done():
                self._holders[wait.checkout] = wait.task
                granted.set_result(None)
                return

    def refuse_deadlock(self) -> None:
        """Look at all waits again, after tasks have begun to wait for others."""
        self._blocked.clear()
        for wait in self._waiting.values():
            self._begin(wait)
        self._refuse_deadlock()

    def _begin(self, wait: Wait) -> None:
        blocked, task = dict[asyncio.Task[Any], None](), wait.task
        while task is not None and task not in blocked:
            blocked[task] = None
            task = self.awaited.get(task)
        wait.blocked = tuple(blocked)
        self._blocked.update(wait.blocked)

    def _end(self, wait: Wait) -> None:
        for task in wait.blocked:
            self._blocked[task] -= 1
            if not self._blocked[task]:
                del self._blocked[task]

    def _refuse_deadlock(self) -> None:
        """Fail the latest wait if every holder waits, itself or by its children, for one of the waiters."""
        holders = set(self._holders.values())
        if not holders or not self._blocked.keys() >= holders:
            return
        # a wait that was cancelled still counts until its task goes on
        waits = [(granted, wait) for granted, wait in self._waiting.items() if not granted.done()]
        if waits and holders <= {task for _, wait in waits for task in wait.blocked}:
            granted, wait = waits[-1]
            error = PropagationError(wait.checkout.database, _DEADLOCK.format(self.limit), _RAISE_LIMIT)
            granted.set_exception(error)


@define(eq=False, repr=False)
class Wait:
    """A session that waits for a place, and the tasks that cannot go on before it has one."""

    checkout: Checkout
    task: asyncio.Task[Any] | None
    blocked: tuple[asyncio.Task[Any], ...] = ()


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


def holds_connection_of(session: StatefulSession, pool: Pool, waiting: Collection[object]) -> bool:
    """Whether a session holds a connection of a pool in a transaction that one of the tasks has begun."""
    transaction = get_transaction(session)
    if transaction is None or session._fastapi_async_sqlalchemy.beginner not in waiting:
        return False
    return any(connection.engine.pool is pool for connection, *_ in transaction._connections.values())


@define(eq=False, repr=False)
class NestedRoute:
    """The route of a unit inside others: it refuses a wait for a connection that only they could give."""

    session: ref[StatefulSession]
    enclosing: Callable[[], Iterable[StatefulSession]]
    before: Route | None

    def __call__(self, bind: Engine | Connection) -> Engine | Connection:
        """Return the engine."""
        session = self.session()
        if session is not None and isinstance(bind, Engine):
            state, transaction = session._fastapi_async_sqlalchemy, get_transaction(session)
            if state.holder is not None and not (transaction is not None and transaction._connections):
                self._refuse_deadlock(bind.pool, state)
        return bind if self.before is None else self.before(bind)

    def _refuse_deadlock(self, pool: Pool, state: SessionState) -> None:
        status = pool_status(pool)
        if status.available != 0:
            return
        task, waiting = state.holder, set[object]()
        while task is not None and task not in waiting:
            waiting.add(task)
            task = state.shared.awaited.get(task)
        held = {one for one in self.enclosing() if holds_connection_of(one, pool, waiting)}
        if len(held) >= (status.checked_out or 0):
            timeout = None if state.checkout is None else state.checkout.limits.timeout
            raise PoolTimeoutError(state.shared.name, _deadline(timeout, pool) or 0.0, status, _NESTED)


def _deadline(timeout: float | None, pool: Pool) -> float | None:
    """Return how many seconds a wait for a connection may take; None for a pool without a deadline."""
    return pool.timeout() if timeout is None and isinstance(pool, QueuePool) else timeout


def _connect(shared: Shared, engine: ref[Engine]) -> Connection:
    """Check a connection out, for the session at work; called inside SQLAlchemy's greenlet."""
    session, found = shared.operating.get(task_at_work()), cast("Engine", engine())
    state = None if session is None else session._fastapi_async_sqlalchemy
    if state is None or state.checkout is None:  # user code connects by what `get_bind()` has returned
        return type(found).connect(found)
    return state.checkout.connect(found, state.outer_holds)


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
        timeout = _deadline(self.limits.timeout, engine.pool)

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
        if self.placed and self.limits.places is not None and not in_transaction(session):
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
