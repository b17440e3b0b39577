"""A span for each unit of work, with its waits and COMMITs; needs the extra ``[opentelemetry]``."""

from __future__ import annotations

from time import time_ns
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from attrs import Factory, define
from opentelemetry.trace import Span, Status, StatusCode, Tracer, set_span_in_context

if TYPE_CHECKING:
    from .observer import ObservedTransaction, ObservedUnit

UNIT: Final = "unit of work"
WAIT: Final = "wait for a connection"
COMMIT: Final = "COMMIT"
ERROR_TYPE: Final = "error.type"
_OURS: Final = "fastapi_async_sqlalchemy"


@define(eq=False, repr=False)
class UnitSpans:
    """The spans of the units that are open."""

    tracer: Tracer
    _spans: WeakKeyDictionary[ObservedUnit, Span] = Factory(WeakKeyDictionary["ObservedUnit", "Span"])

    def begin(self, unit: ObservedUnit, pool_name: str) -> None:
        """Begin a unit's span inside the current one."""
        self._spans[unit] = self.tracer.start_span(
            UNIT,
            attributes={
                "db.system.name": unit.pool.system,
                "db.namespace": pool_name,
                f"{_OURS}.unit": unit.number,
                f"{_OURS}.task": unit.task,
                **({f"{_OURS}.place": unit.place} if unit.place else {}),
            },
        )

    def add_wait(self, unit: ObservedUnit, seconds: float, error: BaseException | None) -> None:
        """Add a wait for a connection that has just ended."""
        self._add(unit, WAIT, seconds, None if error is None else type(error).__name__)

    def add_transaction(self, unit: ObservedUnit, transaction: ObservedTransaction) -> None:
        """Add a transaction that has just ended: its outcome, and its COMMIT if there was one."""
        span = self._spans.get(unit)
        if span is None:
            return
        outcome = {f"{_OURS}.outcome": transaction.outcome}
        span.add_event("transaction ended", {**outcome, f"{_OURS}.statements": transaction.statements})
        span.set_attributes(outcome)
        if transaction.committing:
            error = transaction.commit_error
            if transaction.outcome == "unknown":
                error = "unknown"
            self._add(unit, COMMIT, transaction.committing, error)

    def add_hooks(self, unit: ObservedUnit, count: int, seconds: float) -> None:
        """Add hooks that have just run; a span that has ended takes none."""
        span = self._spans.get(unit)
        if span is not None:
            span.add_event("hooks ran", {f"{_OURS}.hooks": count, f"{_OURS}.seconds": seconds})

    def end(self, unit: ObservedUnit) -> None:
        """End a unit's span."""
        span = self._spans.pop(unit, None)
        if span is not None:
            stats = unit.stats
            span.set_attributes(
                {
                    f"{_OURS}.statements": stats.statements,
                    f"{_OURS}.rows": stats.rows,
                    f"{_OURS}.transactions": stats.transactions,
                    f"{_OURS}.waited": stats.waited,
                    f"{_OURS}.held": stats.held,
                }
            )
            span.end()

    def _add(self, unit: ObservedUnit, name: str, seconds: float, error: str | None) -> None:
        """Add a child that has just ended; its error is the unit's, too."""
        span = self._spans.get(unit)
        if span is None:
            return
        now = time_ns()
        attributes: dict[str, Any] = {} if error is None else {ERROR_TYPE: error}
        child = self.tracer.start_span(
            name,
            context=set_span_in_context(span),
            start_time=now - round(seconds * 1e9),
            attributes=attributes,
        )
        if error is not None:
            failed = Status(StatusCode.ERROR, f"{name}: {error}")
            child.set_status(failed)
            span.set_status(failed)
            span.set_attributes(attributes)
        child.end(now)
