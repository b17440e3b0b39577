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

class FastAPIAsyncSQLAlchemyError(Exception): ...
class ConfigurationError(FastAPIAsyncSQLAlchemyError, ValueError): ...

class EngineAlreadyBoundError(ConfigurationError, RuntimeError):
    def __init__(self, database: str) -> None: ...

class SessionNotInitialisedError(FastAPIAsyncSQLAlchemyError, RuntimeError):
    def __init__(self, database: str) -> None: ...

class MissingSessionError(FastAPIAsyncSQLAlchemyError, LookupError):
    def __init__(self, database: str, place: str, remedy: str) -> None: ...

class UnitClosedError(FastAPIAsyncSQLAlchemyError, RuntimeError):
    def __init__(self, database: str) -> None: ...

class ConcurrentUseError(FastAPIAsyncSQLAlchemyError, RuntimeError):
    def __init__(self, holder: str, operation: str, intruder: str, attempted: str) -> None: ...

class UnexpectedRollbackError(FastAPIAsyncSQLAlchemyError, RuntimeError):
    def __init__(self, reason: str) -> None: ...

class PartialCommitError(FastAPIAsyncSQLAlchemyError, RuntimeError):
    committed: tuple[str, ...]
    failed: str
    def __init__(self, committed: Sequence[str], failed: str) -> None: ...
