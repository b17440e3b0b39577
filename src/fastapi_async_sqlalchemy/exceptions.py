"""Every error of this package: one base, a message built from facts, the remedy named."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "ConcurrentUseError",
    "ConfigurationError",
    "EngineAlreadyBoundError",
    "FastAPIAsyncSQLAlchemyError",
    "MissingSessionError",
    "PartialCommitError",
    "SessionNotInitialisedError",
    "UnexpectedRollbackError",
    "UnitClosedError",
]


class FastAPIAsyncSQLAlchemyError(Exception):
    """Base of every error that this package raises itself.

    Errors of the database and of SQLAlchemy pass through unchanged.
    """

    def __reduce__(self) -> tuple[object, ...]:
        """Copy and pickle the message as it is: it was built from facts that are not kept."""
        return _restore, (type(self), self.args), self.__dict__


def _restore(
    kind: type[FastAPIAsyncSQLAlchemyError], args: tuple[object, ...]
) -> FastAPIAsyncSQLAlchemyError:
    return kind.__new__(kind, *args)


class ConfigurationError(FastAPIAsyncSQLAlchemyError, ValueError):
    """An argument is wrong; raised where it is given, before any request is served.

    The message names the parameter and the remedy, and never shows a password.
    """


class EngineAlreadyBoundError(ConfigurationError, RuntimeError):
    """A second engine was given to a proxy whose first one is still in use."""

    def __init__(self, database: str) -> None:
        super().__init__(
            f"{database} already has an engine in use: give a second database its own pair from "
            "create_middleware_and_session_proxy(), or end the first use (the application's lifespan, "
            "`async with db.connect(...)`, `db.unbind()`)."
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
    and in a place where the middleware binds none on purpose: a WebSocket, an excluded path.
    """

    def __init__(self, database: str, place: str, remedy: str) -> None:
        super().__init__(f"{database} has no unit of work {place}: {remedy}.")


class UnitClosedError(FastAPIAsyncSQLAlchemyError, RuntimeError):
    """A unit of work, or its session, was used after its end, or entered twice.

    A task that outlives its request gets this error, because nobody would commit or roll back
    what it goes on to write.
    """

    def __init__(self, database: str) -> None:
        super().__init__(
            f"This unit of work of {database} has ended and serves one use only: "
            "open a new one with `async with db():` in the task that goes on working."
        )


class ConcurrentUseError(FastAPIAsyncSQLAlchemyError, RuntimeError):
    """A task used a session while another task was in the middle of an operation on it.

    Raised before the session's state or its connection is touched. Tasks may use one session in
    turn; at the same time each needs its own.
    """

    def __init__(self, holder: str, operation: str, intruder: str, attempted: str) -> None:
        super().__init__(
            f"{intruder} called {attempted}() on a session on which {holder} is in the middle of "
            f"{operation}(): give each task a unit of its own with `async with db():` inside the task, "
            "or await one before the other."
        )


class UnexpectedRollbackError(FastAPIAsyncSQLAlchemyError, RuntimeError):
    """COMMIT was asked for, but the transaction can only be rolled back.

    ``__cause__`` is the error that made it so, where there was one: a statement failed, its error
    was swallowed, and the database had given up the transaction, so that COMMIT would have been a
    silent rollback.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"The transaction cannot be committed, because {reason}: let the error leave the unit, call "
            "rollback() and start again, or wrap the statement that may fail in "
            "`async with db.unit.savepoint():`."
        )


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
