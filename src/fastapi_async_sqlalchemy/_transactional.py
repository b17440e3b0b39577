"""Functions that run in a unit of work, and again when the database says that others were in their way."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from sqlalchemy.exc import DBAPIError

from ._options import shown
from .exceptions import ConfigurationError, PropagationError, UnexpectedRollbackError

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

F = TypeVar("F", bound=Callable[..., Coroutine[Any, Any, Any]])

_SQLSTATES: Final = frozenset({"40001", "40P01"})
"""PostgreSQL's serialization_failure and deadlock_detected (its manual, appendix A)."""
_MYSQL_ERRORS: Final = frozenset({1020, 1205, 1213})
"""ER_CHECKREAD (a newer version of the row, MariaDB), ER_LOCK_WAIT_TIMEOUT and ER_LOCK_DEADLOCK."""
_SAVEPOINT_LOST: Final = 1305
"""ER_SP_DOES_NOT_EXIST: MySQL's and MariaDB's answer to ROLLBACK TO SAVEPOINT after a deadlock."""
_SQLITE_BUSY: Final = 5
"""SQLITE_BUSY; extended codes hold it in their lowest byte."""


def is_conflict(error: Exception) -> bool:
    """Whether the database refused work only because of other work at the same time.

    Its transaction has been rolled back then, or will be, and may succeed when it is done again.
    """
    if isinstance(error, UnexpectedRollbackError):
        return isinstance(error.__cause__, Exception) and is_conflict(error.__cause__)
    if not isinstance(error, DBAPIError) or error.connection_invalidated:
        return False
    driver = error.orig
    if driver is None:
        return False
    if driver.args[:1] == (_SAVEPOINT_LOST,) and isinstance(driver.__context__, Exception):
        return is_conflict(driver.__context__)  # it has rolled the savepoint's transaction back
    state = getattr(driver, "sqlstate", None)
    code: object = driver.args[0] if driver.args else None
    busy = getattr(driver, "sqlite_errorcode", None)
    return (
        state in _SQLSTATES
        or (isinstance(code, int) and code in _MYSQL_ERRORS)
        or (isinstance(busy, int) and busy & 0xFF == _SQLITE_BUSY)
    )


def transactional(
    function: F,
    unit: Callable[[], AbstractAsyncContextManager[object]],
    alone: Callable[[], bool],
    retries: int,
) -> F:
    """Return the function, run in a unit of work, and again up to ``retries`` times after a conflict.

    ``alone`` tells whether the unit will be its own: a part of a unit cannot be done again.
    """
    if not inspect.iscoroutinefunction(function):
        message = f"transactional is for coroutine functions (`async def`), not {shown(function)}."
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
                "retries cannot do a part of an open unit of work again",
                "call it outside, retry the outer function, or use propagation='requires_new'",
            )
        return await retrying(*args, **kwargs)

    return cast("F", repeatedly)


def _name(function: object) -> str:
    """Name a function in a message; a part of one by what it is a part of, without its arguments."""
    called: object = function.func if isinstance(function, functools.partial) else function
    return getattr(called, "__qualname__", type(called).__name__)
