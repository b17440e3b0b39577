"""Who holds the connections of a pool in which none came free in time."""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from .._session.state import task_name
from .observing import request_of
from .place import around
from .unit import UnitOfWork, has_connection

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextvars import ContextVar

    from .._telemetry.meter import UnitMeter
    from .database import Database
    from .place import Place

_TASKS: Final = 3
"""How many tasks are named of those that have the same unit."""


def holders(database: Database[Any], current: ContextVar[Place[Any]]) -> tuple[str, ...]:
    """Describe the units that hold a connection: observed ones, otherwise those that tasks have.

    Nobody keeps a list of units that are not observed. So the contexts of all tasks are searched, which
    Python shows since 3.12.
    """
    opening = database.opening
    if opening is not None and opening.observers:
        return tuple(map(_described, opening.holding()))
    found: dict[int, list[str]] = {}
    requests: dict[int, str] = {}
    for task in asyncio.all_tasks():
        for unit in _units_of(task, current):
            if has_connection(unit):
                found.setdefault(id(unit), []).append(task_name(task))  # a child task has its parent's unit
                request = request_of(unit)
                requests[id(unit)] = "" if request is None else f" ({request})"
    return tuple(f"{' or '.join(sorted(tasks)[:_TASKS])}{requests[unit]}" for unit, tasks in found.items())


def _units_of(task: asyncio.Task[Any], current: ContextVar[Place[Any]]) -> Iterator[UnitOfWork[Any]]:
    get_context: Any = getattr(task, "get_context", dict)  # new in Python 3.12
    for place in around(get_context().get(current)):
        yield from place._units_inside()


def _described(meter: UnitMeter) -> str:
    unit = meter.unit
    name = f"{unit} for {perf_counter() - (meter.held_since or 0):.1f} s"
    if unit.place is None:
        return name
    return f"{name}, opened at {unit.place}, last statement {unit.stats.last_statement!r}"
