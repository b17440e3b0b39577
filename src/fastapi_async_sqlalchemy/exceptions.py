"""The errors of this package: one base class, messages built from facts, each with its remedy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from sqlalchemy.exc import IllegalStateChangeError, InvalidRequestError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._pool_status import PoolStatus

__all__ = [
    "ConcurrentUseError",
    "ConfigurationError",
    "EngineAlreadyBoundError",
    "FastAPIAsyncSQLAlchemyError",
    "InDoubtError",
    "MissingSessionError",
    "PartialCommitError",
    "PoolTimeoutError",
    "PropagationError",
    "ReadOnlyError",
    "ReplicaLagError",
    "SandboxError",
    "SessionNotInitialisedError",
    "TransactionBegunError",
    "UnexpectedRollbackError",
    "UnitClosedError",
    "WrongDatabaseError",
]


_PAGE: Final = "https://github.com/h0rn3t/fastapi-async-sqlalchemy/blob/main/docs/errors.md"
_ONE_TASK_AT_A_TIME: Final = (
    "run them by `db.gather(...)`, give each task a separate unit with `async with db():` inside the task, "
    "or end one before the other"
)
_START_AGAIN: Final = (
    "call rollback() and start again, or let an error leave the unit; put what may fail in "
    "`async with db.unit.savepoint():`"
)

_NAMED: Final = 10
"""How many holders of connections a message names."""
_ANY_USE: Final = "the application's lifespan, `async with db.connect(...)`, `db.unbind()`"


def _counted(number: float, noun: str) -> str:
    """Return a number with its noun, in the plural unless the number is 1."""
    shown = str(number) if isinstance(number, int) else f"{number:g}"
    return f"{shown} {noun}{'' if number == 1 else 's'}"


class FastAPIAsyncSQLAlchemyError(Exception):
    """Base class of every error that this package raises.

    Errors of the database and of SQLAlchemy pass through unchanged.
    """

    def __str__(self) -> str:
        """Return the message, and where to read more."""
        name = next(kind.__name__ for kind in type(self).__mro__ if kind.__module__ == __name__)
        return f"{super().__str__()}\n(Background on this error at: {_PAGE}#{name.lower()})"

    def __reduce__(self) -> tuple[object, ...]:
        """Copy and pickle the message itself: the facts that it was built from are not kept."""
        return _restore, (type(self), self.args), self.__dict__


def _safe_repr(value: object) -> str:
    """Return a wrong value for an error message; a value that may hold a password becomes its type."""
    text = repr(value)
    return type(value).__name__ if "://" in text or "@" in text else text


def _restore(
    kind: type[FastAPIAsyncSQLAlchemyError], args: tuple[object, ...]
) -> FastAPIAsyncSQLAlchemyError:
    error = kind.__new__(kind, *args)
    error.args = args  # an OSError's are set by its __init__
    return error


class ConfigurationError(FastAPIAsyncSQLAlchemyError, ValueError):
    """A wrong argument, raised where it is given, before any request is served.

    The message names the parameter and the remedy, and never shows a password. It is built from the
    parameter's name, the expected value and the given one. If the fact does not fit that form, the first
    argument is the whole text.
    """

    def __init__(self, parameter: str, wanted: str | None = None, value: object = None) -> None:
        super().__init__(
            parameter if wanted is None else f"{parameter} must be {wanted}, not {_safe_repr(value)}."
        )


class EngineAlreadyBoundError(ConfigurationError, RuntimeError):
    """A second engine was given to a proxy whose first one is still in use."""

    def __init__(
        self,
        database: str,
        holder: str | None = None,
        remedy: str | None = None,
        needless: str | None = None,
    ) -> None:
        bound = f", bound by {holder}" if holder else ""
        other = "give a second database its own pair from create_middleware_and_session_proxy()"
        if needless is not None:
            other = f"leave {needless} out, because it names the same database"
        super().__init__(
            f"{database} already has an engine in use{bound}: {other}, "
            f"or end the first use ({remedy or _ANY_USE})."
        )


class SessionNotInitialisedError(FastAPIAsyncSQLAlchemyError, RuntimeError):
    """A unit of work was requested before the proxy had an engine."""

    def __init__(self, database: str) -> None:
        super().__init__(
            f"{database} has no engine yet: add the pair's middleware to the application and let it start, "
            "or open `async with db.connect(url):` around the work. A route takes the session by "
            "`Depends(db.dependency)`, not by `Depends(db.session)`."
        )


class MissingSessionError(FastAPIAsyncSQLAlchemyError, LookupError):
    """No unit of work is current.

    Raised by ``db.session`` and ``db.unit`` outside a request and outside ``async with db():``. It is also
    raised where the middleware deliberately binds no unit: in a WebSocket, on an excluded path. In a
    ``db.per_task()`` block it is raised in a thread whose task has not asked for a unit itself.
    """

    def __init__(self, database: str, place: str, remedy: str) -> None:
        super().__init__(f"{database} has no unit of work {place}: {remedy}.")


class UnitClosedError(FastAPIAsyncSQLAlchemyError, InvalidRequestError, RuntimeError):
    """A unit of work, or its session, was used after its end, or entered twice.

    It is a subclass of SQLAlchemy's ``InvalidRequestError``, which a session closed for good raises.

    A task that outlives its request gets this error, because nobody would commit or roll back
    its later writes.
    """

    def __init__(self, database: str, opening: str | None = None) -> None:
        super().__init__(
            f"This unit of work of {database} has ended and can be used only once: "
            f"open a new one with {opening or '`async with db.begin():`'} in the task that continues."
        )


class ConcurrentUseError(FastAPIAsyncSQLAlchemyError, IllegalStateChangeError, RuntimeError):
    """A task used a session while another task was in the middle of an operation on it.

    It is a subclass of SQLAlchemy's ``IllegalStateChangeError``, which a plain session raises then.

    Raised before the session's state or its connection is touched. Tasks may use one session in turn;
    to work at the same time, each needs a separate one. On MySQL and MariaDB a stream with rows left
    counts as an operation, even for the task that reads it: another statement would lose those rows. With
    asyncpg, so does another event loop that runs in another thread with connections in the same pool.
    """

    def __init__(self, database: str, attempt: str, busy: str, remedy: str | None = None) -> None:
        super().__init__(
            f"{attempt} on a session of {database} on which {busy}: {remedy or _ONE_TASK_AT_A_TIME}."
        )


class WrongDatabaseError(FastAPIAsyncSQLAlchemyError, TypeError):
    """A model or a table of another database was given to a session of ``ModelSession``.

    Nothing was sent. ``owner`` is the database that it belongs to, if a pair is known for it.
    """

    def __init__(self, database: str, fact: str, bases: Sequence[str], owner: str | None) -> None:
        remedy = "use the session of its own database" if owner is None else f"use a session of {owner}"
        super().__init__(
            f"{fact}, and {database} accepts only models of {' and '.join(bases)}: {remedy}, "
            "or let the session class take a union of bases."
        )
        self.owner: str | None = owner


class UnexpectedRollbackError(FastAPIAsyncSQLAlchemyError, PendingRollbackError, RuntimeError):
    """COMMIT was requested, but the transaction can only be rolled back.

    It is a subclass of SQLAlchemy's ``PendingRollbackError``, which SQLAlchemy raises after a failed flush.
    ``__cause__`` is the original error, if there was one. Either a statement failed, its error was swallowed
    and the database had given up the transaction, so that COMMIT would have been a silent rollback; or a
    block that had joined the unit failed and its error was swallowed.
    """

    def __init__(self, database: str, reason: str, remedy: str | None = None) -> None:
        super().__init__(
            f"The transaction of {database} cannot be committed, because {reason}: {remedy or _START_AGAIN}."
        )


class PropagationError(FastAPIAsyncSQLAlchemyError, RuntimeError):
    """A block's propagation cannot be satisfied at this place.

    It must join a unit of work and none is open, it must not run inside one and one is open, or it joins
    one that has different settings.
    """

    def __init__(self, database: str, reason: str, remedy: str) -> None:
        super().__init__(f"{database}: {reason}: {remedy}.")


class ReadOnlyError(FastAPIAsyncSQLAlchemyError, RuntimeError):
    """Changed objects were flushed in a read-only unit of work; nothing was sent.

    The caller's own SQL is sent to the database, which refuses it with its own error.
    """

    def __init__(self, database: str, objects: int) -> None:
        super().__init__(
            f"{_counted(objects, 'changed object')} of {database} cannot be flushed in a read-only unit of "
            "work: write in a unit without read_only=True, or expunge() what is not meant to be stored."
        )


class TransactionBegunError(FastAPIAsyncSQLAlchemyError, RuntimeError):
    """A call that must precede a transaction's first statement, or follow its end, came in the middle."""

    def __init__(self, database: str, remedy: str) -> None:
        super().__init__(f"A transaction of {database} is open: {remedy}.")


class PoolTimeoutError(FastAPIAsyncSQLAlchemyError, PoolTimeout, TimeoutError):
    """No connection became free in time; nothing was sent.

    It is a subclass of SQLAlchemy's ``TimeoutError``, which it replaces, and of Python's.

    ``timeout`` is how long the wait was and ``retry_after`` when to try again, both in seconds.
    ``pool_status`` is the result of ``db.pool_status()`` at that moment, and ``holders`` describes the units
    that held a connection, as far as they are known: if units are observed, or from Python 3.12 on.
    """

    def __init__(
        self,
        database: str,
        timeout: float,
        pool_status: PoolStatus,
        remedy: str,
        holders: Sequence[str] = (),
    ) -> None:
        limit = "no limit" if pool_status.capacity is None else pool_status.capacity
        super().__init__(
            f"{database} had no free connection within {_counted(timeout, 'second')} "
            f"({pool_status.checked_out or 0} of {limit} are checked out): {remedy}."
        )
        self.timeout: float = timeout
        self.retry_after: int = max(1, math.ceil(timeout))
        self.pool_status: PoolStatus = pool_status
        self.holders: tuple[str, ...] = ()
        self._name_holders(holders)

    def _name_holders(self, holders: Sequence[str]) -> None:
        """Add the units that hold the connections to the message, some of them if there are many."""
        self.holders = tuple(holders)
        if holders:
            more = f"; and {len(holders) - _NAMED} more" if len(holders) > _NAMED else ""
            self.args = (f"{self.args[0]}\nHeld by {'; '.join(holders[:_NAMED])}{more}.",)


class ReplicaLagError(FastAPIAsyncSQLAlchemyError, TimeoutError):
    """A replica had not replayed a position in time; nothing was read from it.

    ``position`` is the position required, ``replayed`` the one that the replica had reached, if known,
    and ``timeout`` how long the wait was in seconds.
    """

    def __init__(self, database: str, position: str, replayed: str | None, timeout: float) -> None:
        state = f"did not say whether it has replayed {position}"
        if replayed is not None:
            state = f"had replayed {replayed} and not {position}"
        super().__init__(
            f"{database} {state} within {_counted(timeout, 'second')}: "
            "wait longer by timeout=, or read from the primary by fallback=."
        )
        self.position: str = position
        self.replayed: str | None = replayed
        self.timeout: float = timeout


class PartialCommitError(FastAPIAsyncSQLAlchemyError, RuntimeError):
    """One database has committed and a later one has not.

    Without two-phase commit several databases commit one after the other, the inner middleware's
    first. ``committed`` and ``failed`` name the two sides; ``__cause__`` is the later one's error.
    """

    def __init__(self, committed: Sequence[str], failed: str) -> None:
        super().__init__(
            f"COMMIT failed on {failed} after {', '.join(committed)} had committed: repair the committed "
            "side with a compensating transaction. To let constraints fail earlier, flush the sessions of "
            "all databases before the first COMMIT; where half a commit must not happen, use atomic()."
        )
        self.committed: tuple[str, ...] = tuple(committed)
        self.failed: str = failed


class InDoubtError(FastAPIAsyncSQLAlchemyError, RuntimeError):
    """A connection broke so late in ``atomic()`` that a prepared transaction may be left behind.

    ``transaction`` is a part of its name, ``committed`` and ``in_doubt`` are databases, and ``__cause__`` is
    the error that broke the connection. A prepared transaction holds its locks until it is finished.
    """

    def __init__(self, transaction: str, committed: Sequence[str], in_doubt: Sequence[str]) -> None:
        done = f"is committed on {', '.join(committed)} and " if committed else ""
        super().__init__(
            f"The atomic transaction {transaction} {done}may be left prepared on {', '.join(in_doubt)}: run "
            "`python -m fastapi_async_sqlalchemy.recovery` with the URLs of all its databases."
        )
        self.transaction: str = transaction
        self.committed: tuple[str, ...] = tuple(committed)
        self.in_doubt: tuple[str, ...] = tuple(in_doubt)


class SandboxError(FastAPIAsyncSQLAlchemyError, RuntimeError):
    """A test sandbox cannot do what production would do, and does not pretend to."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"The sandbox cannot continue: {reason}.")
