"""Observers: the few moments of a unit of work that they are notified of, and the facts they receive."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

from attrs import Factory, define, field, frozen

from ..exceptions import ConfigurationError
from .logs import fields

if TYPE_CHECKING:
    from .._pool_status import PoolStatus

logger = logging.getLogger("fastapi_async_sqlalchemy")

TransactionOutcome: TypeAlias = Literal["committed", "rolled back", "only read", "unknown"]
"""How a transaction ended; ``only read`` is one that sent no other statement, whatever its end."""


@define(eq=False)
class UnitStats:
    """What one unit of work has done so far."""

    statements: int = 0
    rows: int = 0
    """Rows that statements returned or changed, where the driver counts them."""
    transactions: int = 0
    """Transactions that have ended."""
    waited: float = 0.0
    """Seconds of waiting for a connection."""
    held: float = 0.0
    """Seconds of holding one, in transactions that have ended."""
    committing: float = 0.0
    """Seconds from the sending of COMMIT to the end of its transaction."""
    last_statement: str = ""
    """The text of the last statement, without its values."""


@frozen(kw_only=True, eq=False)
class ObservedPool:
    """The pool of a database that has an engine."""

    database: str
    """The database's name in messages: never with a user, a password or a query."""
    name: str
    """The name of the database in its URL, or of the driver if there is none."""
    system: str
    """SQLAlchemy's name of the kind of database."""
    _status: Callable[[], PoolStatus] = field(alias="status")

    def status(self) -> PoolStatus:
        """Return the pool's current state."""
        return self._status()


@frozen(kw_only=True, eq=False)
class ObservedUnit:
    """A unit of work that has a session."""

    number: int
    """Its number in this process, which log records have, too."""
    pool: ObservedPool
    request: str | None
    """The method and path of the request that it serves or stands in."""
    task: str
    """The task that made its session."""
    place: str | None
    """The line of code that made its session, in asyncio's debug mode."""
    stats: UnitStats = Factory(UnitStats)

    def __str__(self) -> str:
        """Name the task and the request."""
        return self.task if self.request is None else f"{self.task} ({self.request})"


@frozen(kw_only=True, eq=False)
class ObservedTransaction:
    """A transaction that has ended."""

    outcome: TransactionOutcome
    statements: int
    rows: int
    held: float
    """Seconds for which it held its connection."""
    committing: float
    """Seconds from the sending of COMMIT to the end; 0 if none was sent."""
    commit_error: str | None
    """The class of the error of a COMMIT that failed."""


class Observer:
    """Base class of observers: each method is a moment, and does nothing unless it is overridden.

    All are plain functions, called in the task or thread at work. An error in one is logged, and changes
    nothing for the unit.
    """

    def pool_bound(self, pool: ObservedPool) -> None:
        """A database has an engine, or the observer came to one that has."""

    def pool_released(self, pool: ObservedPool) -> None:
        """That engine, or the observer, is no longer in use."""

    def unit_opened(self, unit: ObservedUnit) -> None:
        """A unit has made its session; a request that asks for none makes none."""

    def wait_began(self, unit: ObservedUnit) -> None:
        """A unit asks the pool for a connection."""

    def wait_ended(self, unit: ObservedUnit, seconds: float, error: BaseException | None) -> None:
        """It has got one, or this error, which is a ``PoolTimeoutError`` if none became free in time."""

    def transaction_ended(self, unit: ObservedUnit, transaction: ObservedTransaction) -> None:
        """A transaction has ended and its connection is released; its hooks have not run yet."""

    def hooks_ran(self, unit: ObservedUnit, count: int, seconds: float) -> None:
        """Hooks for an outcome have run, perhaps after the unit was closed."""

    def unit_closed(self, unit: ObservedUnit) -> None:
        """A unit has ended."""


@frozen(eq=False)
class Observers:
    """Several observers, none of which can harm another one or the unit."""

    database: str
    each: tuple[Observer, ...]

    def tell(self, moment: str, *facts: object) -> None:
        """Call a method of each; log its error."""
        for observer in self.each:
            try:
                getattr(observer, moment)(*facts)
            except Exception:
                extra = fields(self.database)
                logger.exception(
                    "An observer of %s failed in %s(): %r", self.database, moment, observer, extra=extra
                )


def observers_of(value: object) -> tuple[Observer, ...]:
    """Validate the ``observers`` of a pair, a middleware or ``db.connect()``."""
    if value is None:
        return ()
    if not isinstance(value, Iterable) or isinstance(value, str | bytes):
        parameter, wanted = "observers", "an iterable of Observer objects"
        raise ConfigurationError(parameter, wanted, value)
    found: list[Observer] = []
    for one in cast("Iterable[object]", value):
        if not isinstance(one, Observer):
            parameter, wanted = "each of observers", "an object of a subclass of Observer"
            raise ConfigurationError(parameter, wanted, one)
        found.append(one)
    return tuple(found)
