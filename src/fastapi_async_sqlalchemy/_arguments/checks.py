"""What a caller may ask for, and its validation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal, TypeAlias, cast, get_args

from ..exceptions import ConfigurationError, _safe_repr

Propagation: TypeAlias = Literal["requires_new", "required", "nested", "mandatory", "never"]
"""What a block does about the unit of work that is open where it stands."""
IsolationLevel: TypeAlias = Literal["READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
"""SQLAlchemy's names, less AUTOCOMMIT, which is no transaction."""
PROPAGATIONS: Final[tuple[str, ...]] = get_args(Propagation)
ISOLATION_LEVELS: Final[tuple[str, ...]] = get_args(IsolationLevel)


def mapping(name: str, value: object) -> Mapping[str, Any]:
    """Return an optional mapping, checked."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        message = f"{name} must be a mapping of keyword arguments, not {type(value).__name__}."
        raise ConfigurationError(message)  # its values may be secrets
    return cast("Mapping[str, Any]", value)


def boolean(name: str, value: object) -> bool:
    """Return a flag, checked: a truthy string is a mistake, not a yes."""
    if not isinstance(value, bool):
        wanted = "True or False"
        raise ConfigurationError(name, wanted, value)
    return value


def propagation_of(value: object) -> Propagation:
    """Return a propagation, checked."""
    if value not in PROPAGATIONS:
        wanted = f"one of {', '.join(PROPAGATIONS)}"
        msg = "propagation"
        raise ConfigurationError(msg, wanted, value)
    return cast("Propagation", value)


def count(name: str, value: object, least: int) -> int:
    """Return a whole number, checked."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        wanted = f"a whole number of at least {least}"
        raise ConfigurationError(name, wanted, value)
    return value


def positive(name: str, value: object) -> float:
    """Return a number of seconds or a part, checked: more than nothing, and finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        wanted = "a finite number above 0"
        raise ConfigurationError(name, wanted, value)
    return float(value)


def optional_count(name: str, value: object) -> int | None:
    """Return a whole number of at least 1, checked; None is no limit."""
    return None if value is None else count(name, value, 1)


def optional_seconds(name: str, value: object) -> float | None:
    """Return a number of seconds, checked; None is no deadline."""
    return None if value is None else positive(name, value)


def paths(name: str, value: object) -> frozenset[str]:
    """Return request paths, checked: each begins with a slash."""
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
