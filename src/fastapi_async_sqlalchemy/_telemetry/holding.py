"""A WARNING for a unit that holds its connection too long, while it does."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

from .._arguments.checks import positive
from ..exceptions import _counted
from .logs import fields
from .observer import Observer

if TYPE_CHECKING:
    from .observer import ObservedTransaction, ObservedUnit

logger = logging.getLogger("fastapi_async_sqlalchemy")

_TOO_LONG: Final = (
    "%s: %s has held a connection for %s%s: end its transaction before slow work, by "
    "`await db.unit.commit()`, or look for what it waits for."
)


class LongHoldWarning(Observer):
    """An observer that logs a WARNING once a transaction has held its connection for so many seconds.

    It names the task and the request. In asyncio's debug mode it also names the line that opened the unit,
    and the unit's last statement.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds: float = positive("seconds", seconds)
        self._timers = WeakKeyDictionary["ObservedUnit", asyncio.TimerHandle]()

    def wait_ended(self, unit: ObservedUnit, seconds: float, error: BaseException | None) -> None:  # noqa: ARG002  # of every observer
        """Begin to count the seconds."""
        if error is None and unit not in self._timers:
            loop = asyncio.get_running_loop()
            self._timers[unit] = loop.call_later(self.seconds, self._warn, unit)

    def transaction_ended(self, unit: ObservedUnit, transaction: ObservedTransaction) -> None:  # noqa: ARG002  # as above
        """Stop counting."""
        timer = self._timers.pop(unit, None)
        if timer is not None:
            timer.cancel()

    def _warn(self, unit: ObservedUnit) -> None:
        stats, more = unit.stats, ""
        if unit.place is not None:
            more = f" (opened at {unit.place}, last statement {stats.last_statement!r})"
        extra = fields(
            unit.pool.database, unit=unit.number, request=unit.request, statements=stats.statements
        )
        logger.warning(
            _TOO_LONG, unit.pool.database, unit, _counted(self.seconds, "second"), more, extra=extra
        )
