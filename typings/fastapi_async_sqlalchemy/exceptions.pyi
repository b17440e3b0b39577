from collections.abc import Sequence

from sqlalchemy.exc import IllegalStateChangeError, InvalidRequestError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from . import PoolStatus

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

class FastAPIAsyncSQLAlchemyError(Exception): ...

class ConfigurationError(FastAPIAsyncSQLAlchemyError, ValueError):
    def __init__(self, parameter: str, wanted: str | None = None, value: object = None) -> None: ...

class EngineAlreadyBoundError(ConfigurationError, RuntimeError):
    def __init__(
        self,
        database: str,
        holder: str | None = None,
        remedy: str | None = None,
        needless: str | None = None,
    ) -> None: ...

class SessionNotInitialisedError(FastAPIAsyncSQLAlchemyError, RuntimeError):
    def __init__(self, database: str) -> None: ...

class MissingSessionError(FastAPIAsyncSQLAlchemyError, LookupError):
    def __init__(self, database: str, place: str, remedy: str) -> None: ...

class UnitClosedError(FastAPIAsyncSQLAlchemyError, InvalidRequestError, RuntimeError):
    def __init__(self, database: str, opening: str | None = None) -> None: ...

class ConcurrentUseError(FastAPIAsyncSQLAlchemyError, IllegalStateChangeError, RuntimeError):
    def __init__(self, database: str, attempt: str, busy: str, remedy: str | None = None) -> None: ...

class WrongDatabaseError(FastAPIAsyncSQLAlchemyError, TypeError):
    def __init__(self, database: str, fact: str, bases: Sequence[str], owner: str | None) -> None: ...
    owner: str | None

class UnexpectedRollbackError(FastAPIAsyncSQLAlchemyError, PendingRollbackError, RuntimeError):
    def __init__(self, database: str, reason: str, remedy: str | None = None) -> None: ...

class PropagationError(FastAPIAsyncSQLAlchemyError, RuntimeError):
    def __init__(self, database: str, reason: str, remedy: str) -> None: ...

class ReadOnlyError(FastAPIAsyncSQLAlchemyError, RuntimeError):
    def __init__(self, database: str, objects: int) -> None: ...

class TransactionBegunError(FastAPIAsyncSQLAlchemyError, RuntimeError):
    def __init__(self, database: str, remedy: str) -> None: ...

class PoolTimeoutError(FastAPIAsyncSQLAlchemyError, PoolTimeout, TimeoutError):
    timeout: float
    retry_after: int
    pool_status: PoolStatus
    holders: tuple[str, ...]
    def __init__(
        self,
        database: str,
        timeout: float,
        pool_status: PoolStatus,
        remedy: str,
        holders: Sequence[str] = (),
    ) -> None: ...

class ReplicaLagError(FastAPIAsyncSQLAlchemyError, TimeoutError):
    position: str
    replayed: str | None
    timeout: float
    def __init__(self, database: str, position: str, replayed: str | None, timeout: float) -> None: ...

class PartialCommitError(FastAPIAsyncSQLAlchemyError, RuntimeError):
    committed: tuple[str, ...]
    failed: str
    def __init__(self, committed: Sequence[str], failed: str) -> None: ...

class InDoubtError(FastAPIAsyncSQLAlchemyError, RuntimeError):
    transaction: str
    committed: tuple[str, ...]
    in_doubt: tuple[str, ...]
    def __init__(self, transaction: str, committed: Sequence[str], in_doubt: Sequence[str]) -> None: ...

class SandboxError(FastAPIAsyncSQLAlchemyError, RuntimeError):
    def __init__(self, reason: str) -> None: ...
