"""Spans and metrics of units of work by OpenTelemetry; needs the extra ``[opentelemetry]``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry.metrics import MeterProvider, get_meter
from opentelemetry.trace import TracerProvider, get_tracer

from ._telemetry.metrics import PoolMetrics
from ._telemetry.observer import Observer
from ._telemetry.tracing import UnitSpans
from .exceptions import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._telemetry.observer import ObservedPool, ObservedTransaction, ObservedUnit

__all__ = ["OpenTelemetryObserver"]

_NAME = __name__.partition(".")[0]


class OpenTelemetryObserver(Observer):
    """An observer that makes a span of each unit of work, and metrics of pools and transactions.

    One object serves any number of pairs. The span of a unit is inside the current one, such as that of its
    request. A pool is called by the name of its database, or as ``pool_name`` says. Without providers those
    that OpenTelemetry has for the process are used.
    """

    def __init__(
        self,
        *,
        pool_name: Callable[[ObservedPool], str] | None = None,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
    ) -> None:
        if pool_name is not None and not callable(pool_name):
            parameter, wanted = "pool_name", "a function from an ObservedPool to its name"
            raise ConfigurationError(parameter, wanted, pool_name)
        self._pool_name = pool_name or _database_of
        self._spans = UnitSpans(get_tracer(_NAME, tracer_provider=tracer_provider))
        self._metrics = PoolMetrics(get_meter(_NAME, meter_provider=meter_provider), self._pool_name)

    def pool_bound(self, pool: ObservedPool) -> None:
        """Look at the pool from now on."""
        self._metrics.add(pool)

    def pool_released(self, pool: ObservedPool) -> None:
        """Look at the pool no longer."""
        self._metrics.remove(pool)

    def unit_opened(self, unit: ObservedUnit) -> None:
        """Begin the unit's span."""
        self._spans.begin(unit, self._pool_name(unit.pool))

    def wait_began(self, unit: ObservedUnit) -> None:
        """Count a unit that waits."""
        self._metrics.wait_began(unit.pool)

    def wait_ended(self, unit: ObservedUnit, seconds: float, error: BaseException | None) -> None:
        """Measure the wait, and add it to the span."""
        self._metrics.wait_ended(unit.pool, seconds, error)
        self._spans.add_wait(unit, seconds, error)

    def transaction_ended(self, unit: ObservedUnit, transaction: ObservedTransaction) -> None:
        """Measure the transaction, and add its outcome and COMMIT to the span."""
        self._metrics.transaction_ended(unit.pool, transaction)
        self._spans.add_transaction(unit, transaction)

    def hooks_ran(self, unit: ObservedUnit, count: int, seconds: float) -> None:
        """Add the hooks to the span."""
        self._spans.add_hooks(unit, count, seconds)

    def unit_closed(self, unit: ObservedUnit) -> None:
        """End the span."""
        self._spans.end(unit)


def _database_of(pool: ObservedPool) -> str:
    return pool.name
