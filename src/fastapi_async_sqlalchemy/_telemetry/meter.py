"""The meter of one observed unit: it counts, measures, and tells the observers."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

from attrs import define

from .observer import ObservedTransaction

if TYPE_CHECKING:
    from .observer import ObservedUnit, Observers, TransactionOutcome


@define(eq=False, repr=False)
class UnitMeter:
    """What an observed unit has done, and is doing now."""

    unit: ObservedUnit
    observers: Observers
    held_since: float | None = None
    """When the current transaction got its connection, by the clock of ``perf_counter()``."""
    _wait_since: float = 0.0
    _commit_since: float | None = None
    _commit_error: str | None = None
    _committing: float = 0.0
    _statements: int = 0
    _rows: int = 0
    _wrote: bool = False
    _closed: bool = False

    def wait_began(self) -> None:
        """The session asks the pool for a connection."""
        self._wait_since = perf_counter()
        self.observers.tell("wait_began", self.unit)

    def wait_ended(self, error: BaseException | None) -> None:
        """The session has got a connection, or an error."""
        now = perf_counter()
        seconds = now - self._wait_since
        self.unit.stats.waited += seconds
        if error is None and self.held_since is None:
            self.held_since = now
        self.observers.tell("wait_ended", self.unit, seconds, error)

    def statement_sent(self, statement: str, *, writes: bool) -> None:
        """A statement is about to be sent."""
        stats = self.unit.stats
        stats.last_statement = statement
        stats.statements += 1
        self._statements += 1
        self._wrote = self._wrote or writes

    def rows_counted(self, rows: int) -> None:
        """A statement has returned or changed rows; drivers that do not count them say -1."""
        if rows > 0:
            self._rows += rows
            self.unit.stats.rows += rows

    def commit_began(self) -> None:
        """COMMIT, or PREPARE of a two-phase commit, is about to be sent."""
        if self._commit_since is None:
            self._commit_since = perf_counter()

    def operation_failed(self, error: BaseException) -> None:
        """An operation of the session has failed, perhaps by its COMMIT."""
        if self._commit_since is not None and self._commit_error is None:
            self._commit_error = type(error).__name__
            self._committing = perf_counter() - self._commit_since

    def transaction_ended(self, *, committed: bool, unknown: bool) -> None:
        """The session's transaction has ended; without a connection it was none of the database's."""
        began, self.held_since = self.held_since, None
        if began is None:
            return
        now, stats = perf_counter(), self.unit.stats
        if self._commit_since is not None and self._commit_error is None:
            self._committing = now - self._commit_since
        ended = ObservedTransaction(
            outcome=self._outcome(committed=committed, unknown=unknown),
            statements=self._statements,
            rows=self._rows,
            held=now - began,
            committing=self._committing,
            commit_error=None if committed else self._commit_error,
        )
        self._statements, self._rows, self._wrote = 0, 0, False
        self._commit_since, self._commit_error, self._committing = None, None, 0.0
        stats.transactions += 1
        stats.held += ended.held
        stats.committing += ended.committing
        self.observers.tell("transaction_ended", self.unit, ended)

    def _outcome(self, *, committed: bool, unknown: bool) -> TransactionOutcome:
        if unknown:
            return "unknown"
        if not self._wrote and (committed or self._commit_since is None):
            return "only read"
        return "committed" if committed else "rolled back"

    def held(self) -> float:
        """Return the seconds for which connections were held, the current one included."""
        now = perf_counter()
        return self.unit.stats.held + now - (now if self.held_since is None else self.held_since)

    def hooks_ran(self, count: int, seconds: float) -> None:
        """Hooks for an outcome have run."""
        self.observers.tell("hooks_ran", self.unit, count, seconds)

    def unit_closed(self) -> None:
        """The unit has ended; a second call has no effect."""
        if not self._closed:
            self._closed = True
            self.observers.tell("unit_closed", self.unit)
