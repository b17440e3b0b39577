"""Functions that run in a unit of work, and run again after a conflict with other transactions."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar, cast

from .._arguments.checks import count, propagation_of
from .._dialects.errors import is_conflict
from .._unit.database import UnitConfig
from .._unit.scope import PropagatingScope, UnitScope
from .._unit.settings import transaction_settings
from ..exceptions import ConfigurationError, PropagationError, _safe_repr

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from .._arguments.checks import IsolationLevel, Propagation
    from .._unit.place import Handle

F = TypeVar("F", bound=Callable[..., Coroutine[Any, Any, Any]])


def transactional(
    function: F,
    unit: Callable[[], AbstractAsyncContextManager[object]],
    alone: Callable[[], bool],
    retries: int,
) -> F:
    """Wrap a function to run in a unit of work, and again up to ``retries`` times after a conflict.

    ``alone`` returns whether the unit will be a new one: a part of a unit cannot be retried.
    """
    if not inspect.iscoroutinefunction(function):
        described, remedy = _safe_repr(function), _remedy(function)
        message = f"transactional is for coroutine functions (`async def`), not {described}: {remedy}."
        raise ConfigurationError(message)

    @functools.wraps(function)
    async def once(*args: Any, **kwargs: Any) -> Any:
        async with unit():
            return await function(*args, **kwargs)

    if not retries:
        return cast("F", once)
    try:
        import stamina  # noqa: PLC0415  # an extra
    except ImportError as error:
        message = "retries need the package stamina: install fastapi-async-sqlalchemy[retries]."
        raise ConfigurationError(message) from error
    retrying = stamina.retry(
        on=is_conflict, attempts=retries + 1, timeout=None, wait_initial=0.01, wait_max=1.0, wait_jitter=0.05
    )(once)

    @functools.wraps(function)
    async def repeatedly(*args: Any, **kwargs: Any) -> Any:
        if not alone():
            raise PropagationError(
                _name(function),
                "retries cannot repeat part of an open unit of work",
                "call it outside, retry the outer function, or use propagation='requires_new'",
            )
        return await retrying(*args, **kwargs)

    return cast("F", repeatedly)


def _remedy(function: object) -> str:
    """Say what to write in place of a decorated object that is no coroutine function."""
    if isinstance(function, classmethod | staticmethod):
        return "write @classmethod or @staticmethod above it"
    if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
        return "a dependency that yields opens a unit itself, by `async with db.begin() as unit: yield unit`"
    return "write it as `async def`, or open `async with db.begin():` inside"


def _name(function: object) -> str:
    """Return a function's name for a message; a partial's is that of its function, without arguments."""
    called: object = function.func if isinstance(function, functools.partial) else function
    return getattr(called, "__qualname__", type(called).__name__)


def decorator(
    handle: Handle[Any],
    *,
    propagation: Propagation,
    read_only: bool | None,
    isolation_level: IsolationLevel | None,
    deferrable: bool | None,
    retries: int,
) -> Callable[[F], F]:
    """Return the decorator for ``db.transactional(...)``."""
    propagation, database = propagation_of(propagation), handle._database
    settings = transaction_settings(read_only, isolation_level, deferrable, database.settings)
    if count("retries", retries, 0) and propagation in {"mandatory", "nested"}:
        message = f"retries need a separate unit: propagation={propagation!r} joins another one."
        raise ConfigurationError(message)

    def scope() -> PropagatingScope[Any]:
        config = database.configs[True]
        if settings is not config.settings:
            config = UnitConfig(database, settings, database.maker(None, settings), commit_on_exit=True)
        return PropagatingScope(UnitScope(config, handle._current), propagation, has_session_args=False)

    def decorate(function: F) -> F:
        return transactional(function, scope, lambda: scope().joins() is None, retries)

    return decorate
