"""The connection pool of one database: what it says of itself, deadlines, and the warning when it fills."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Final

from attrs import define, frozen
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool
from sqlalchemy.util import await_only, greenlet_spawn

from .._arguments.checks import optional_count, optional_seconds
from .._pool_status import PoolStatus
from ..exceptions import PoolTimeoutError
from .state import pending

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Connection, Engine
    from sqlalchemy.pool import Pool

    from .state import StatefulSession

_WITHOUT_STATEMENT: Final = frozenset(
    {"commit", "rollback", "close", "reset", "release", "begin", "connection"}
)

logger = logging.getLogger("fastapi_async_sqlalchemy")


def pool_status(pool: Pool) -> PoolStatus:
    """Ask a pool; only a queue counts its connections."""
    if not isinstance(pool, QueuePool):
        return PoolStatus(pool_class=type(pool).__name__)
    overflow = pool._max_overflow  # pyright: ignore[reportPrivateUsage]  # there is no public name
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


@frozen(kw_only=True, eq=False)
class Limits:
    """In how many seconds a session must have its connection, and with how many others at a time."""

    timeout: float | None
    """None is the pool's own."""
    places: asyncio.Semaphore | None


def limits_of(
    name: str, timeout: object, max_concurrent: object, outer: Limits | None = None
) -> Limits | None:
    """Return limits, checked; what is not asked for is as around."""
    seconds = optional_seconds(name, timeout)
    limit = optional_count("max_concurrent", max_concurrent)
    if seconds is None and limit is None:
        return outer
    if outer is not None and seconds is None:
        seconds = outer.timeout
    places = None if outer is None else outer.places
    return Limits(timeout=seconds, places=places if limit is None else asyncio.Semaphore(limit))


@define(eq=False, repr=False)
class Checkout:
    """How one session comes to its connections, within limits.

    The place among the others is taken before the connection and given back with it.
    """

    database: str
    limits: Limits
    placed: bool = False
    deadline: asyncio.Timeout | None = None
    """Of a connection that is waited for now."""

    def before_operation(self, session: StatefulSession, operation: str) -> None:
        """Check a connection out in time for an operation that will need one; runs in a greenlet."""
        if operation not in _WITHOUT_STATEMENT or (operation == "commit" and pending(session)):
            holds = session._fastapi_async_sqlalchemy.outer_holds
            self.connect(session.get_bind(), partial(Session.connection, session), holds)

    def connect(
        self,
        bind: Engine | Connection,
        connection: Callable[[], Connection],
        outer_holds: Callable[[], bool] | None,
    ) -> Connection:
        """Call what comes to a connection of an engine, in time; called inside SQLAlchemy's greenlet."""
        pool = bind.engine.pool
        timeout = self.limits.timeout
        if timeout is None and isinstance(pool, QueuePool):
            timeout = pool.timeout()
        deadline = asyncio.timeout(timeout)
        try:
            return await_only(self._check_out(connection, deadline))
        except TimeoutError as error:
            if timeout is None or not deadline.expired():
                raise  # a driver's own
            status = pool_status(pool)
            remedy = NO_PLACE
            if self.limits.places is None or self.placed:
                remedy = _UNREACHABLE if status.available != 0 else remedy_for(outer_holds)
            raise PoolTimeoutError(self.database, timeout, status, remedy) from error

    async def _check_out(self, connection: Callable[[], Connection], deadline: asyncio.Timeout) -> Connection:
        self.deadline = deadline
        try:
            async with deadline:
                if self.limits.places is not None and not self.placed:
                    await self.limits.places.acquire()
                    self.placed = True
                return await greenlet_spawn(connection)
        finally:
            self.deadline = None

    def connected(self) -> None:
        """End the deadline: what is sent before the first statement takes as long as it takes."""
        if self.deadline is not None and not self.deadline.expired():
            self.deadline.reschedule(None)

    def after_operation(self, session: Session) -> None:
        """Give the place back once no transaction is open."""
        if self.placed and self.limits.places is not None and not session.in_transaction():
            self.placed = False
            self.limits.places.release()


NO_PLACE: Final = (
    "max_concurrent units of this block have one, this task's own perhaps among them, so raise it, or end "
    "their transactions sooner"
)
_NESTED: Final = (
    "this unit stands inside one that holds a connection itself, so end that one's transaction first, or, in "
    "the same task, join it by propagation='required' or 'nested'"
)
_UNREACHABLE: Final = "the pool has room, so look why the database does not let a new connection in"
_BUSY: Final = "hold connections for a shorter time, or give engine_args a larger pool_size"


def remedy_for(outer_holds: Callable[[], bool] | None) -> str:
    """Return what to do about a pool whose connections are all in use."""
    return _NESTED if outer_holds is not None and outer_holds() else _BUSY
