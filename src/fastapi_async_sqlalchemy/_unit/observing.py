"""What happens when a unit makes its session: ``on_open`` callbacks, and the beginning of its observation."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from attrs import Factory, define

from .._arguments.engines import line_in_debug_mode
from .._session.checkout import pool_status
from .._session.ending import end
from .._session.observed import ObservedCheckout, ObservedEngines
from .._session.state import task_at_work, task_name
from .._telemetry.meter import UnitMeter
from .._telemetry.observer import ObservedPool, ObservedUnit, Observer, Observers
from ..exceptions import _safe_repr
from .place import around

if TYPE_CHECKING:
    from contextvars import ContextVar

    from sqlalchemy.ext.asyncio import AsyncEngine
    from starlette.types import Scope

    from .._pool_status import PoolStatus
    from .._session.state import StatefulSession
    from .database import Database
    from .place import Place
    from .unit import UnitOfWork

OpenCallback: TypeAlias = Callable[["UnitOfWork[Any]"], object]


@define(eq=False, repr=False)
class Opening:
    """What a database does with each unit that makes its session."""

    callbacks: tuple[OpenCallback, ...] = ()
    given: tuple[Observer, ...] = ()
    """The observers of the pair, the middleware and the block; one may have been given several times."""
    observers: tuple[Observer, ...] = ()
    pool: ObservedPool | None = None
    _engine: AsyncEngine | None = None
    _engines: ObservedEngines = Factory(ObservedEngines)

    def begin(self, unit: UnitOfWork[Any], session: StatefulSession) -> None:
        """Observe a unit and call the callbacks, whose errors leave the unit without a session."""
        if self.observers and self.pool is not None:
            self._observe(unit, session, self.pool)
        try:
            for callback in self.callbacks:
                _call(callback, unit)
        except BaseException:
            unit._reset()
            end(session)
            raise

    def _observe(self, unit: UnitOfWork[Any], session: StatefulSession, pool: ObservedPool) -> None:
        observed = ObservedUnit(
            number=session.hash_key,
            pool=pool,
            request=request_of(unit),
            task=task_name(task_at_work()),
            place=line_in_debug_mode(),
        )
        meter = unit._meter = UnitMeter(observed, Observers(pool.database, self.observers))
        state, limits = session._fastapi_async_sqlalchemy, unit._config.limits
        checkout = ObservedCheckout(
            unit._database.name,
            limits or self._engines.unlimited,
            state=state,
            meter=meter,
            engines=self._engines,
        )
        if limits is None:
            state.limit(checkout)
        else:
            state.checkout = checkout
        meter.observers.tell("unit_opened", observed)

    def holding(self) -> list[UnitMeter]:
        """Return the meters of the units that hold a connection."""
        return self._engines.holding()

    def change(self, given: tuple[Observer, ...]) -> tuple[Observer, ...]:
        """Replace the observers; return those that were added or removed."""
        before, after = ({id(one): one for one in several} for several in (self.observers, given))
        self.given, self.observers = given, tuple(after.values())
        return tuple((before | after)[one] for one in before.keys() ^ after.keys())

    def bind(self, database: str, engine: AsyncEngine) -> None:
        """Tell the observers of an engine that is now in use."""
        if self.pool is not None and engine is self._engine:
            return
        self.unbind()
        self._engine, self._engines, url = engine, ObservedEngines(), engine.url
        self.pool = ObservedPool(
            database=database,
            name=url.database or url.drivername,
            system=engine.dialect.name,
            status=partial(_status, engine),
        )
        Observers(database, self.observers).tell("pool_bound", self.pool)

    def unbind(self) -> None:
        """Tell the observers that the engine is no longer in use."""
        pool, self.pool = self.pool, None
        if pool is not None:
            Observers(pool.database, self.observers).tell("pool_released", pool)


def observe(database: Database[Any], observers: tuple[Observer, ...]) -> None:
    """Add observers to a database; one that it already has is not notified twice."""
    opening = _opening_of(database)
    new = opening.change(opening.given + observers)
    if opening.pool is not None:
        Observers(database.name, new).tell("pool_bound", opening.pool)
    elif database.connected:
        opening.bind(database.name, database.engine)


def stop_observing(database: Database[Any], observers: tuple[Observer, ...]) -> None:
    """Remove observers from a database, as often as they were added there."""
    opening = database.opening
    if opening is None:
        return
    left = list(opening.given)
    for observer in observers:
        del left[next(at for at, one in enumerate(left) if one is observer)]
    removed = opening.change(tuple(left))
    if opening.pool is not None:
        Observers(database.name, removed).tell("pool_released", opening.pool)
    if not (opening.observers or opening.callbacks):
        database.opening = None


def on_open(database: Database[Any], callback: OpenCallback) -> None:
    """Add a callback for each new unit of a database."""
    given: object = callback
    if not callable(given) or inspect.iscoroutinefunction(given):
        message = f"callback must be a plain function of a unit of work, not {_safe_repr(callback)}."
        raise TypeError(message)
    opening = _opening_of(database)
    opening.callbacks += (callback,)


def _opening_of(database: Database[Any]) -> Opening:
    if database.opening is None:
        database.opening = Opening()
    return database.opening


def _call(callback: OpenCallback, unit: UnitOfWork[Any]) -> None:
    result = callback(unit)
    if inspect.iscoroutine(result):
        result.close()
        message = (
            f"an on_open callback must be a plain function, and {_safe_repr(callback)} returned a coroutine."
        )
        raise TypeError(message)


def _status(engine: AsyncEngine) -> PoolStatus:
    return pool_status(engine.sync_engine.pool)  # a disposed engine has another one


def request_here(current: ContextVar[Place[Any]]) -> str | None:
    """Return the request that the current task serves."""
    return request_of(current.get())


def request_of(inside: Place[Any]) -> str | None:
    """Return the method and path of the request that a unit serves or stands in."""
    for place in around(inside):
        scope: Scope | None = getattr(place, "_scope", None)
        if scope is not None:
            # an application that is called in process may be given less than ASGI demands
            return " ".join(str(scope[key]) for key in ("method", "path") if key in scope)
    return None
