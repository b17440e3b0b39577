"""One typed database session per request for FastAPI and Starlette, over SQLAlchemy's asyncio engine."""

from ._options import CommitWhen, EngineArgs, SessionArgs
from ._proxy import SessionProxy
from ._unit import Hook, UnitOfWork
from .exceptions import (
    ConcurrentUseError,
    ConfigurationError,
    EngineAlreadyBoundError,
    FastAPIAsyncSQLAlchemyError,
    MissingSessionError,
    PartialCommitError,
    SessionNotInitialisedError,
    UnexpectedRollbackError,
    UnitClosedError,
)
from .middleware import SQLAlchemyMiddleware, create_middleware_and_session_proxy, db

__all__ = [
    "CommitWhen",
    "ConcurrentUseError",
    "ConfigurationError",
    "EngineAlreadyBoundError",
    "EngineArgs",
    "FastAPIAsyncSQLAlchemyError",
    "Hook",
    "MissingSessionError",
    "PartialCommitError",
    "SQLAlchemyMiddleware",
    "SessionArgs",
    "SessionNotInitialisedError",
    "SessionProxy",
    "UnexpectedRollbackError",
    "UnitClosedError",
    "UnitOfWork",
    "create_middleware_and_session_proxy",
    "db",
]
