"""Metrics of pools and transactions; needs the extra ``[opentelemetry]``.

Names, units and attributes of ``db.client.connection`` are those of OpenTelemetry's semantic conventions.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from opentelemetry.metrics import CallbackOptions, Meter, Observation

from .tracing import ERROR_TYPE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from .._pool_status import PoolStatus
    from .observer import ObservedPool, ObservedTransaction

_PREFIX: Final = "db.client.connection"
POOL_NAME: Final = f"{_PREFIX}.pool.name"
STATE: Final = f"{_PREFIX}.state"
OUTCOME: Final = "fastapi_async_sqlalchemy.outcome"


class PoolMetrics:
    """The instruments, and the pools that they look at."""

    def __init__(self, meter: Meter, pool_name: Callable[[ObservedPool], str]) -> None:
        self.pool_name = pool_name
        self._pools: tuple[ObservedPool, ...] = ()
        """Replaced as a whole, because readers use other threads."""
        for name, unit, look, description in (
            ("count", "{connection}", _count, "Connections that are used or idle"),
            ("max", "{connection}", _maximum, "The most connections that the pool opens"),
            ("idle.max", "{connection}", _idle_maximum, "The most idle connections that the pool keeps"),
        ):
            meter.create_observable_up_down_counter(
                f"{_PREFIX}.{name}", [partial(self._observe, look)], unit, description
            )
        self._pending = meter.create_up_down_counter(
            f"{_PREFIX}.pending_requests", "{request}", "Units that wait for a connection now"
        )
        self._timeouts = meter.create_counter(
            f"{_PREFIX}.timeouts", "{timeout}", "Waits that ended without a connection"
        )
        self._wait_time = meter.create_histogram(f"{_PREFIX}.wait_time", "s", "Waits for a connection")
        self._use_time = meter.create_histogram(f"{_PREFIX}.use_time", "s", "How long one was held")
        self._transactions = meter.create_counter(
            "fastapi_async_sqlalchemy.transactions", "{transaction}", "Transactions that have ended"
        )
        self._commit_time = meter.create_histogram(
            "fastapi_async_sqlalchemy.commit_time", "s", "From the sending of COMMIT to the transaction's end"
        )

    def add(self, pool: ObservedPool) -> None:
        """Look at a pool from now on."""
        self._pools += (pool,)

    def remove(self, pool: ObservedPool) -> None:
        """Look at a pool no longer."""
        self._pools = tuple(one for one in self._pools if one is not pool)

    def wait_began(self, pool: ObservedPool) -> None:
        """Count a wait."""
        self._pending.add(1, self._name(pool))

    def wait_ended(self, pool: ObservedPool, seconds: float, error: BaseException | None) -> None:
        """Count a wait no longer, and measure one that got a connection."""
        name = self._name(pool)
        self._pending.add(-1, name)
        if error is None:
            self._wait_time.record(seconds, name)
        elif isinstance(error, TimeoutError):
            self._timeouts.add(1, name)

    def transaction_ended(self, pool: ObservedPool, transaction: ObservedTransaction) -> None:
        """Count and measure a transaction."""
        name = self._name(pool)
        self._use_time.record(transaction.held, name)
        self._transactions.add(1, {**name, OUTCOME: transaction.outcome})
        if transaction.committing:
            error = transaction.commit_error
            self._commit_time.record(
                transaction.committing, name if error is None else {**name, ERROR_TYPE: error}
            )

    def _name(self, pool: ObservedPool) -> dict[str, str]:
        return {POOL_NAME: self.pool_name(pool)}

    def _observe(
        self, look: Callable[[PoolStatus], Iterator[tuple[int | None, dict[str, str]]]], _: CallbackOptions
    ) -> Iterable[Observation]:
        for pool in self._pools:
            for value, attributes in look(pool.status()):
                if value is not None:  # a pool that is no queue does not count
                    yield Observation(value, {**self._name(pool), **attributes})


def _count(status: PoolStatus) -> Iterator[tuple[int | None, dict[str, str]]]:
    yield status.checked_out, {STATE: "used"}
    yield status.checked_in, {STATE: "idle"}


def _maximum(status: PoolStatus) -> Iterator[tuple[int | None, dict[str, str]]]:
    yield status.capacity, {}


def _idle_maximum(status: PoolStatus) -> Iterator[tuple[int | None, dict[str, str]]]:
    yield status.size, {}
