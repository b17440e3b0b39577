"""Validation of simple arguments."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal, TypeAlias, cast, get_args

from ..exceptions import ConfigurationError, _safe_repr

Propagation: TypeAlias = Literal["requires_new", "required", "nested", "mandatory", "never"]
"""How a block treats the unit of work that encloses it."""
IsolationLevel: TypeAlias = Literal["READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
"""SQLAlchemy's names without AUTOCOMMIT, which is not a transaction."""
Begin: TypeAlias = Literal["on_first_use", "on_first_write"]
"""When a unit's transactions begin: with any statement, or with the first that is not a plain read."""
PROPAGATIONS: Final[tuple[str, ...]] = get_args(Propagation)
BEGINS: Final[tuple[str, ...]] = get_args(Begin)
ISOLATION_LEVELS: Final[tuple[str, ...]] = get_args(IsolationLevel)


def mapping(name: str, value: object) -> Mapping[str, Any]:
    """Validate an optional mapping."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        message = f"{name} must be a mapping of keyword arguments, not {type(value).__name__}."
        raise ConfigurationError(message)  # its values may be secrets
    return cast("Mapping[str, Any]", value)


def boolean(name: str, value: object) -> bool:
    """Validate a flag: a truthy string is a mistake, not a yes."""
    if not isinstance(value, bool):
        wanted = "True or False"
        raise ConfigurationError(name, wanted, value)
    return value


def propagation_of(value: object) -> Propagation:
    """Validate a propagation."""
    if value not in PROPAGATIONS:
        wanted = f"one of {', '.join(PROPAGATIONS)}"
        msg = "propagation"
        raise ConfigurationError(msg, wanted, value)
    return cast("Propagation", value)


def waits(value: object) -> bool:
    """Validate ``concurrent_use``; return whether a second task waits for its turn."""
    if not (isinstance(value, str) and value in {"refuse", "wait"}):
        wanted = "'refuse' or 'wait'"
        name = "concurrent_use"
        raise ConfigurationError(name, wanted, value)
    return value == "wait"


def optional_waits(value: object) -> bool | None:
    """Validate ``concurrent_use`` of a middleware; None is as the pair."""
    return None if value is None else waits(value)


def begin_of(value: object) -> Begin | None:
    """Validate when transactions begin; None is as around."""
    if value is not None and value not in BEGINS:
        wanted = f"one of {', '.join(BEGINS)}"
        msg = "begin"
        raise ConfigurationError(msg, wanted, value)
    return cast("Begin | None", value)


def count(name: str, value: object, least: int) -> int:
    """Validate a whole number."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        wanted = f"a whole number of at least {least}"
        raise ConfigurationError(name, wanted, value)
    return value


def positive(name: str, value: object) -> float:
    """Validate a number of seconds or a share: above 0, and finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        wanted = "a finite number above 0"
        raise ConfigurationError(name, wanted, value)
    return float(value)


def optional_count(name: str, value: object) -> int | None:
    """Validate a whole number of at least 1; None means no limit."""
    return None if value is None else count(name, value, 1)


def optional_seconds(name: str, value: object) -> float | None:
    """Validate a number of seconds; None means no deadline."""
    return None if value is None else positive(name, value)


def exception(name: str, value: object) -> BaseException:
    """Validate an error that a caller passes in to learn its meaning."""
    if not isinstance(value, BaseException):
        wanted = "an exception, such as SQLAlchemy's IntegrityError"
        raise ConfigurationError(name, wanted, value)
    return value


def paths(name: str, value: object) -> frozenset[str]:
    """Validate request paths: each begins with a slash."""
    if value is None:
        return frozenset()
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        wanted = "an iterable of paths such as ['/health']"
        raise ConfigurationError(name, wanted, value)
    found: list[str] = []
    for path in cast("Iterable[object]", value):
        if not (isinstance(path, str) and path.startswith("/")):
            message = f"{name} must hold paths that begin with '/', not {_safe_repr(path)}."
            raise ConfigurationError(message)
        found.append(path)
    return frozenset(found)
