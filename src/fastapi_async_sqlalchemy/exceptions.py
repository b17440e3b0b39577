"""Every error of this package: one base, a message built from facts, the remedy named."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from sqlalchemy.exc import PendingRollbackError

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
    "SessionNotInitialisedError",
    "TransactionBegunError",
    "UnexpectedRollbackError",
    "UnitClosedError",
]


_ONE_TASK_AT_A_TIME: Final = (
    "run them by `db.gather(...)`, give each task a unit of its own with `async with db():` inside the task, "
    "or end one before the other"
)
_START_AGAIN: Final = (
    "call rollback() and start again, or let an error leave the unit; what may fail belongs into "
    "`async with db.unit.savepoint():`"
)

_ANY_USE: Final = "the application's lifespan, `async with db.connect(...)`, `db.unbind()`"


class FastAPIAsyncSQLAlchemyError(Exception):
    """Base of every error that this package raises itself.

    Errors of the database and of SQLAlchemy pass through unchanged.
    """

    def __reduce__(self) -> tuple[object, ...]:
        """Copy and pickle the message as it is: it was built from facts that are not kept."""
        return _restore, (type(self), self.args), self.__dict__


def _safe_repr(value: object) -> str:
    """Return a wrong value as an error may show it: what could hold a password, by its type alone."""
    text = repr(value)
    return type(value).__name__ if "://" in text or "@" in text else text


def _restore(
    kind: type[FastAPIAsyncSQLAlchemyError], args: tuple[object, ...]
) -> FastAPIAsyncSQLAlchemyError:
    error = kind.__new__(kind, *args)
    error.args = args  # an OSError's are set by its __init__
    return error


class ConfigurationError(FastAPIAsyncSQLAlchemyError, ValueError):
    """An argument is wrong; raised where it is given, before any request is served.

    The message names the parameter and the remedy, and never shows a password. It is built from the
    parameter's name, the value that it should have and the one that it has; or it is the whole text, where
    the fact does not fit that form.
    """

    def __init__(self, parameter: str, wanted: str | None = None, value: object = None) -> None:
        super().__init__(
            parameter if wanted is None else f"{parameter} must be {wanted}, not {_safe_repr(value)}."
        )


class EngineAlreadyBoundError(ConfigurationError, RuntimeError):
    """A second engine was given to a proxy whose first one is still in use."""

    def __init__(self, database: str, holder: str | None = None, remedy: str | None = None) -> None:
        bound = f", bound by {holder}" if holder else ""
        super().__init__(
            f"{database} already has an engine in use{bound}: give a second database its own pair from "
            f"create_middleware_and_session_proxy(), or end the first use ({remedy or _ANY_USE})."
        )


class SessionNotInitialisedError(FastAPIAsyncSQLAlchemyError, RuntimeError):
    """A unit of work was asked for before the proxy had an engine."""

    def __init__(self, database: str) -> None:
        super().__init__(
            f"{database} has no engine yet: add the pair's middleware to the application and let it start, "
            "or open `async with db.connect(url):` around the work."
        )


class MissingSessionError(FastAPIAsyncSQLAlchemyError, LookupError):
    """No unit of work is current here.

    Raised by ``db.session`` and ``db.unit`` outside a request and outside ``async with db():``,
    and in a place where the middleware binds none on purpose: a WebSocket, an excluded path. Likewise in a
    thread of a ``multi_sessions`` block whose task has not asked for a unit itself.
    """

    def __init__(self, database: str, place: str, remedy: str) -> None:
        super().__init__(f"{database} has no unit of work {place}: {remedy}.")


class UnitClosedError(FastAPIAsyncSQLAlchemyError, RuntimeError):
    """A unit of work, or its session, was used after its end, or entered twice.

    A task that outlives its request gets this error, because nobody would commit or roll back
    what it goes on to write.
    """

    def __init__(self, database: str, opening: str | None = None) -> None:
        super().__init__(
            f"This unit of work of {database} has ended and serves one use only: "
            f"open a new one with {opening or '`async with db():`'} in the task that goes on working."
        )


class ConcurrentUseError(FastAPIAsyncSQLAlchemyError, RuntimeError):
    """A task used a session while another task was in the middle of an operation on it.

    Raised before the session's state or its connection is touched. Tasks may use one session in
    turn; at the same time each needs its own. On MySQL and MariaDB a stream that has rows left is in the
    middle, too, also for the task that reads it: another statement would cost it those rows. With asyncpg
    so is another event loop that runs in another thread and has connections in the same pool.
    """

    def __init__(self, database: str, attempt: str, busy: str, remedy: str | None = None) -> None:
        super().__init__(
            f"{attempt} on a session of {database} on which {busy}: {remedy or _ONE_TASK_AT_A_TIME}."
        )


class UnexpectedRollbackError(FastAPIAsyncSQLAlchemyError, PendingRollbackError, RuntimeError):
    """COMMIT was asked for, but the transaction can only be rolled back.

    It is a ``PendingRollbackError`` of SQLAlchemy's, which SQLAlchemy itself raises after a failed flush.
    ``__cause__`` is the error that made it so, where there was one: a statement failed, its error
    was swallowed, and the database had given up the transaction, so that COMMIT would have been a
    silent rollback; or a block that had joined the unit failed, and somebody swallowed its error.
    """

    def __init__(self, database: str, reason: str, remedy: str | None = None) -> None:
        super().__init__(
            f"The transaction of {database} cannot be committed, because {reason}: {remedy or _START_AGAIN}."
        )


class PropagationError(FastAPIAsyncSQLAlchemyError, RuntimeError):
    """A block cannot have what it asks for where it stands.

    It must join a unit of work and there is none, must not find one and there is one, or joins one
    with other settings than its own.
    """

    def __init__(self, database: str, reason: str, remedy: str) -> None:
        super().__init__(f"{database}: {reason}: {remedy}.")


class ReadOnlyError(FastAPIAsyncSQLAlchemyError, RuntimeError):
    """Changed objects were flushed in a read-only unit of work; nothing was sent.

    SQL that the caller wrote himself goes to the database, which refuses it with an error of its own.
    """

    def __init__(self, database: str, objects: int) -> None:
        super().__init__(
            f"{objects} changed objects of {database} cannot be flushed in a read-only unit of work: "
            "write in a unit without read_only=True, or expunge() what is not meant to be stored."
        )


class TransactionBegunError(FastAPIAsyncSQLAlchemyError, RuntimeError):
    """What belongs before a transaction's first statement, or after its end, came in the middle of it."""

    def __init__(self, database: str, remedy: str) -> None:
        super().__init__(f"A transaction of {database} is open: {remedy}.")


class PoolTimeoutError(FastAPIAsyncSQLAlchemyError, TimeoutError):
    """No connection came free in time; nothing was sent.

    ``timeout`` is how long was waited and ``retry_after`` when to try again, both in seconds.
    ``pool_status`` is what ``db.pool_status()`` would have said then.
    """

    def __init__(self, database: str, timeout: float, pool_status: PoolStatus, remedy: str) -> None:
        limit = "no limit" if pool_status.capacity is None else pool_status.capacity
        super().__init__(
            f"{database} had no free connection within {timeout:g} seconds "
            f"({pool_status.checked_out or 0} of {limit} are checked out): {remedy}."
        )
        self.timeout: float = timeout
        self.retry_after: int = max(1, math.ceil(timeout))
        self.pool_status: PoolStatus = pool_status


class ReplicaLagError(FastAPIAsyncSQLAlchemyError, TimeoutError):
    """A replica had not replayed a position in time; nothing was read from it.

    ``position`` is where the primary had been, ``replayed`` how far the replica had come, if it had begun,
    and ``timeout`` how many seconds were waited.
    """

    def __init__(self, database: str, position: str, replayed: str | None, timeout: float) -> None:
        state = f"did not say whether it has replayed {position}"
        if replayed is not None:
            state = f"had replayed {replayed} and not {position}"
        super().__init__(
            f"{database} {state} within {timeout:g} seconds: "
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
            "side by a compensating transaction, or write to one database only where that cannot be done."
        )
        self.committed: tuple[str, ...] = tuple(committed)
        self.failed: str = failed


class InDoubtError(FastAPIAsyncSQLAlchemyError, RuntimeError):
    """A connection broke so late in ``atomic()`` that a prepared transaction may be left behind.

    ``transaction`` is a part of its name, ``committed`` and ``in_doubt`` are databases; ``__cause__`` is what
    broke. What is prepared holds its locks until it is finished.
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
