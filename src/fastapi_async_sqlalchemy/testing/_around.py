"""The sessions of the units that are open around the current code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._tasks.each import TaskUnits
from .._unit.place import bound_here
from .._unit.unit import UnitOfWork

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.orm import Session

    from .._unit.place import Place


def sessions_around() -> Iterator[Session]:
    """Yield the sessions of the units that are open around the current code."""
    for place in bound_here():
        for unit in _units_of(place):
            if unit._watched is not None:
                yield unit._watched


def _units_of(place: Place[Any]) -> Iterator[UnitOfWork[Any]]:
    if isinstance(place, UnitOfWork):
        yield place
    elif isinstance(place, TaskUnits) and not place.closed:
        yield place._units[place._owner]
