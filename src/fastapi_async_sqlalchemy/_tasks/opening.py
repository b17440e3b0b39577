"""Construction of blocks from the arguments of ``db(...)`` and ``db.connect(...)``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast

from attrs import define, evolve
from sqlalchemy.ext.asyncio import AsyncEngine

from .._arguments.checks import begin_of, boolean, mapping, propagation_of
from .._arguments.keywords import session_arguments
from .._cluster.replica import ReplicaScope, replay, require_postgresql, written_position
from .._dialects.begin import require_deferrable
from .._dialects.engines import make_engine
from .._session.checkout import limits_of
from .._session.plain import in_transaction
from .._session.state import has_written
from .._unit.database import Database, UnitConfig
from .._unit.observing import observe, stop_observing
from .._unit.place import Handle, around, open_unit
from .._unit.scope import PropagatingScope, UnitScope
from .._unit.settings import transaction_settings
from .._unit.unit import UnitOfWork
from .._unit.uses import use_of
from .._unit.warming import require_room, warm_up, warm_up_of
from ..exceptions import ConfigurationError, TransactionBegunError
from .each import TaskUnitsScope
from .fan_out import open_connection

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager, AsyncExitStack
    from types import TracebackType

    from sqlalchemy.engine import URL
    from starlette.requests import HTTPConnection

    from .._arguments.checks import Begin, IsolationLevel, Propagation
    from .._arguments.keywords import EngineArgs, SessionArgs
    from .._cluster.replica import WalPosition
    from .._dialects.begin import TransactionSettings
    from .._telemetry.observer import Observer
    from .._unit.database import S_co
    from .._unit.uses import Use

P = TypeVar("P")

_FALLBACK: Final = "fallback must be the primary's proxy, which has a separate engine."


def open_scope(
    handle: Handle[S_co],
    session_args: SessionArgs | None,
    commit_on_exit: bool | None,  # noqa: FBT001  # validated in the body
    *,
    propagation: Propagation = "requires_new",
    read_only: bool | None = None,
    isolation_level: IsolationLevel | None = None,
    deferrable: bool | None = None,
    begin: Begin | None = None,
    multi_sessions: bool = False,
    max_concurrent: int | None = None,
    pool_timeout: float | None = None,
) -> AbstractAsyncContextManager[UnitOfWork[S_co], None]:
    """Return the block for ``db(...)``, ``db.begin(...)`` and ``db.per_task(...)``."""
    database, make, limits = handle._database, None, None
    commits = database.commit_on_exit if commit_on_exit is None else boolean("commit_on_exit", commit_on_exit)
    settings = database.settings
    if not (read_only is None and isolation_level is None and deferrable is None and begin is None):
        settings = transaction_settings(read_only, isolation_level, deferrable, settings, begin)
    if pool_timeout is not None or max_concurrent is not None:
        limits = limits_of("pool_timeout", pool_timeout, max_concurrent, database.shared)
    for_each_task = multi_sessions is not False or max_concurrent is not None
    if propagation != "requires_new" or for_each_task:
        _check_kind(propagation, multi_sessions=multi_sessions, per_task=for_each_task)
    if session_args is not None:
        # an empty mapping is no argument
        session_args = cast("SessionArgs", session_arguments(session_args)) or None
    if session_args or settings is not database.settings:
        make = database.maker(session_args, settings)
        if propagation == "requires_new":  # another block may join a unit that has the settings
            require_deferrable(database.engine, settings)
    config = database.configs[commits]
    if make or limits:
        config = UnitConfig(database, settings, make, limits, commits)
    new = UnitScope(config, handle._current)
    if for_each_task:
        return TaskUnitsScope(new)
    return new if propagation == "requires_new" else PropagatingScope(new, propagation, bool(session_args))


def _check_kind(propagation: Propagation, *, multi_sessions: bool, per_task: bool) -> None:
    """Validate what kind of block is requested."""
    propagation_of(propagation)
    if not per_task:
        return
    if not boolean("multi_sessions", multi_sessions):
        message = "max_concurrent is for tasks with a unit each: write `db.per_task(max_concurrent=...)`."
        raise ConfigurationError(message)
    if propagation != "requires_new":
        message = f"multi_sessions=True opens separate units: leave propagation={propagation!r} out."
        raise ConfigurationError(message)


def open_after(
    handle: Handle[S_co],
    position: object,
    timeout: object,
    fallback: object,
    *,
    session_args: SessionArgs | None,
    isolation_level: IsolationLevel | None,
    pool_timeout: float | None,
) -> ReplicaScope[S_co]:
    """Return the block for ``db.after(...)``."""
    database, limits = handle._database, None
    settings = transaction_settings(None, isolation_level, None, database.settings)
    wait = replay(database.name, position, timeout)
    if pool_timeout is not None:
        limits = limits_of("pool_timeout", pool_timeout, None, database.shared)
    if not (fallback is None or isinstance(fallback, Handle)) or fallback is handle:
        raise ConfigurationError(_FALLBACK)
    session_arguments(session_args)
    require_postgresql("after()", database.engine)

    def scope(settings: TransactionSettings, engine: AsyncEngine | None) -> UnitScope[S_co]:
        make = database.maker(session_args or None, settings, engine)
        config = UnitConfig(database, settings, make, limits, database.commit_on_exit)
        return UnitScope(config, handle._current)

    new, primary = scope(settings, None), None
    if isinstance(fallback, Handle):
        primary_engine: AsyncEngine = fallback._database.engine  # pyright: ignore[reportUnknownMemberType]  # for mypy a cast is redundant
        if primary_engine is database.engine:
            raise ConfigurationError(_FALLBACK)
        require_postgresql("fallback", primary_engine)
        primary = scope(evolve(settings, read_only=True), primary_engine)
    return ReplicaScope(new, wait, primary)


async def commit_position(handle: Handle[Any]) -> WalPosition:
    """Return the primary's current log position; see ``SessionProxy.commit_position()``."""
    database = handle._database
    require_postgresql("commit_position()", database.engine)
    if database.settings.read_only:
        message = f"commit_position() is for the primary's proxy, and {database.name} only reads."
        raise ConfigurationError(message)
    unit = open_unit(handle._current)
    if unit is not None and unit._watched is not None and in_transaction(unit._watched):
        if has_written(unit._watched):
            remedy = "call commit_position() when `await db.unit.commit()` has given its writes a position"
            raise TransactionBegunError(database.name, remedy)
        return await written_position(unit._watched)
    async with open_connection(handle, None, commit_on_exit=False) as session:
        return await written_position(session.sync_session)


async def unit_of_request(handle: Handle[S_co], connection: HTTPConnection | None) -> UnitOfWork[S_co]:
    """Return the unit of a request, or the current one; see ``SessionProxy.unit_dependency()``."""
    if connection is None:
        return handle._current.get()._here()
    for place in around(handle._current.get()):  # a unit opened earlier is not the request's
        if isinstance(place, UnitOfWork) and place._belongs_to(connection.scope):
            own: UnitOfWork[S_co] = place
            return own
    stack: AsyncExitStack | None = connection.scope.get("fastapi_function_astack")
    if stack is None or connection.scope["type"] != "http":
        return handle._current.get()._here()
    opened: UnitOfWork[S_co] = await stack.enter_async_context(
        UnitScope(handle._database.configs[True], handle._current)
    )
    opened._scope = connection.scope
    return opened


def connect(
    result: P,
    handle: Handle[Any],
    url: str | URL | AsyncEngine,
    engine_args: EngineArgs | None,
    session_args: SessionArgs | None,
    *,
    commit_on_exit: bool | None,
    begin: Begin | None,
    pool_warm_up: int | None,
    observers: tuple[Observer, ...],
) -> Connected[P]:
    """Return the block for ``db.connect(...)``, which yields ``result``."""
    begin, count = begin_of(begin), warm_up_of(pool_warm_up)
    session_arguments(session_args)
    if isinstance(url, AsyncEngine):
        if mapping("engine_args", engine_args):
            message = "engine_args go with a URL: an engine has its own already."
            raise ConfigurationError(message)
        engine = url
    else:
        engine = make_engine("url", url, engine_args)
    require_room(engine, count)
    database = handle._database
    database.check(engine, session_args, begin)
    if commit_on_exit is not None:
        boolean("commit_on_exit", commit_on_exit)
    return Connected(
        result,
        database,
        engine,
        session_args,
        observers,
        owned=engine is not url,
        begin=begin,
        warm_up=count,
        use=use_of(
            "`async with db.connect(...)`",
            "leave that block",
            engine=engine,
            commit_on_exit=commit_on_exit,
        ),
    )


@define(eq=False, repr=False)
class Connected(Generic[P]):
    """The result of ``db.connect(...)``: an async context manager around the use of an engine."""

    proxy: P
    database: Database[Any]
    engine: AsyncEngine
    session_args: SessionArgs | None
    observers: tuple[Observer, ...]
    owned: bool
    begin: Begin | None
    warm_up: int
    use: Use

    async def __aenter__(self) -> P:
        self.database.take(self.use, self.session_args, self.begin)
        if self.observers:
            observe(self.database, self.observers)
        try:
            await warm_up(self.engine, self.warm_up)
        except BaseException as error:
            await self.__aexit__(type(error), error, error.__traceback__)
            raise
        return self.proxy

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.database.release(self.use)
        stop_observing(self.database, self.observers)
        if self.owned:
            await self.engine.dispose()
