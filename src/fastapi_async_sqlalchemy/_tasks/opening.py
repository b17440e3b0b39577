"""Construction of blocks from the arguments of ``db(...)`` and ``db.connect(...)``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from attrs import define, evolve
from sqlalchemy.ext.asyncio import AsyncEngine

from .._arguments.checks import boolean, mapping, propagation_of
from .._arguments.engines import create_engine, holder
from .._cluster.replica import ReplicaScope, replay, require_postgresql, written_position
from .._session.checkout import limits_of
from .._session.state import has_written
from .._unit.database import Database, UnitConfig
from .._unit.observing import observe, stop_observing
from .._unit.place import Handle, around, open_unit
from .._unit.scope import PropagatingScope, UnitScope
from .._unit.settings import transaction_settings
from .._unit.unit import UnitOfWork
from ..exceptions import ConfigurationError, TransactionBegunError
from .each import TaskUnitsScope
from .fan_out import open_connection

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager, AsyncExitStack
    from types import TracebackType

    from sqlalchemy.engine import URL
    from starlette.requests import HTTPConnection

    from .._arguments.checks import IsolationLevel, Propagation
    from .._arguments.keywords import EngineArgs, SessionArgs
    from .._cluster.replica import WalPosition
    from .._telemetry.observer import Observer
    from .._unit.database import S_co

P = TypeVar("P")


def open_scope(
    handle: Handle[S_co],
    session_args: SessionArgs | None,
    commit_on_exit: bool,  # noqa: FBT001  # validated in the body
    *,
    propagation: Propagation,
    read_only: bool | None,
    isolation_level: IsolationLevel | None,
    deferrable: bool | None,
    multi_sessions: bool,
    max_concurrent: int | None,
    pool_timeout: float | None,
    waiting: tuple[object, object, object],
) -> AbstractAsyncContextManager[UnitOfWork[S_co], None]:
    """Return the block for ``db(...)``; ``waiting`` is its wait_for, timeout and fallback."""
    if commit_on_exit is not False and commit_on_exit is not True:
        boolean("commit_on_exit", commit_on_exit)
    database, make, limits = handle._database, None, None
    settings = database.settings
    if not (read_only is None and isolation_level is None and deferrable is None):
        settings = transaction_settings(read_only, isolation_level, deferrable, settings)
    if session_args is not None or settings is not database.settings:
        make = database.maker(session_args, settings)
    if pool_timeout is not None or max_concurrent is not None:
        limits = limits_of("pool_timeout", pool_timeout, max_concurrent, database.shared)
    config = database.configs[commit_on_exit]
    if make or limits:
        config = UnitConfig(database, settings, make, limits, commit_on_exit)
    new = UnitScope(config, handle._current)
    if multi_sessions is not False or max_concurrent is not None:
        return _for_each_task(new, multi_sessions, propagation, waiting)
    if waiting != (None, None, None):
        return _on_replica(handle, new, session_args, propagation, waiting)
    if propagation == "requires_new":
        return new
    return PropagatingScope(new, propagation_of(propagation), session_args is not None)


def _for_each_task(
    new: UnitScope[S_co],
    multi_sessions: bool,  # noqa: FBT001  # validated in the body
    propagation: Propagation,
    waiting: tuple[object, object, object],
) -> TaskUnitsScope[S_co]:
    if not boolean("multi_sessions", multi_sessions):
        message = "max_concurrent goes with multi_sessions=True: one session has one connection."
        raise ConfigurationError(message)
    if propagation_of(propagation) != "requires_new":
        message = f"multi_sessions=True opens units of its own: leave propagation={propagation!r} out."
        raise ConfigurationError(message)
    if any(one is not None for one in waiting):
        message = "wait_for, timeout and fallback are for one unit: leave multi_sessions=True out."
        raise ConfigurationError(message)
    return TaskUnitsScope(new)


def _on_replica(
    handle: Handle[S_co],
    new: UnitScope[S_co],
    session_args: SessionArgs | None,
    propagation: Propagation,
    waiting: tuple[object, object, object],
) -> ReplicaScope[S_co]:
    position, timeout, fallback = waiting
    if propagation_of(propagation) != "requires_new":
        message = f"wait_for opens a unit of its own: leave propagation={propagation!r} out."
        raise ConfigurationError(message)
    database = handle._database
    wait = replay(database.name, database.engine, position, timeout)
    primary = None
    if fallback is not None:
        primary_engine: AsyncEngine | None = None
        if isinstance(fallback, Handle):
            primary_engine = fallback._database.engine  # pyright: ignore[reportUnknownMemberType]  # for mypy a cast is redundant
        if primary_engine is None or primary_engine is database.engine:
            message = "fallback must be the primary's proxy, which has an engine of its own."
            raise ConfigurationError(message)
        settings = evolve(new.config.settings, read_only=True)
        require_postgresql("fallback", primary_engine)
        make = database.maker(session_args, settings, primary_engine)
        primary = UnitScope(UnitConfig(database, settings, make, new.config.limits), handle._current)
    return ReplicaScope(new, wait, primary)


async def commit_position(handle: Handle[Any]) -> WalPosition:
    """Return the primary's current log position; see ``SessionProxy.commit_position()``."""
    database = handle._database
    require_postgresql("commit_position()", database.engine)
    if database.settings.read_only:
        message = f"commit_position() is for the primary's proxy, and {database.name} only reads."
        raise ConfigurationError(message)
    unit = open_unit(handle._current)
    if unit is not None and unit._watched is not None and unit._watched.in_transaction():
        if has_written(unit._watched):
            remedy = "call commit_position() when `await db.unit.commit()` has given its writes a position"
            raise TransactionBegunError(database.name, remedy)
        return await written_position(unit.session)
    async with open_connection(handle, None, commit_on_exit=False) as session:
        return await written_position(session)


async def session_of_request(handle: Handle[S_co], connection: HTTPConnection) -> S_co:
    """Return the session of a request's unit; see ``SessionProxy.dependency()``."""
    for place in around(handle._current.get()):  # a unit opened earlier is not the request's
        if isinstance(place, UnitOfWork) and place._belongs_to(connection.scope):
            own: UnitOfWork[S_co] = place
            return own.session
    stack: AsyncExitStack | None = connection.scope.get("fastapi_function_astack")
    if stack is None or connection.scope["type"] != "http":
        return handle._current.get().session
    opened: UnitOfWork[S_co] = await stack.enter_async_context(
        UnitScope(handle._database.configs[True], handle._current)
    )
    opened._scope = connection.scope
    return opened.session


def connect(
    result: P,
    handle: Handle[Any],
    url: str | URL | AsyncEngine,
    engine_args: EngineArgs | None,
    session_args: SessionArgs | None,
    *,
    observers: tuple[Observer, ...],
) -> Connected[P]:
    """Return the block for ``db.connect(...)``, which yields ``result``."""
    if isinstance(url, AsyncEngine):
        if mapping("engine_args", engine_args):
            message = "engine_args go with a URL: an engine has its own already."
            raise ConfigurationError(message)
        engine = url
    else:
        engine = create_engine("url", url, engine_args)
    handle._database.check(engine, session_args)
    return Connected(result, handle._database, engine, session_args, observers, owned=engine is not url)


@define(eq=False, repr=False)
class Connected(Generic[P]):
    """The result of ``db.connect(...)``: an async context manager around the use of an engine."""

    proxy: P
    database: Database[Any]
    engine: AsyncEngine
    session_args: SessionArgs | None
    observers: tuple[Observer, ...]
    owned: bool

    async def __aenter__(self) -> P:
        by = holder("`async with db.connect(...)`", "leave that block")
        self.database.bind(self.engine, self.session_args, by)
        if self.observers:
            observe(self.database, self.observers)
        return self.proxy

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.database.release(self.engine, owned=self.owned)
        finally:
            self.database.unbind()
            stop_observing(self.database, self.observers)
