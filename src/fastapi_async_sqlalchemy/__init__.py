"""One typed database session per request for FastAPI and Starlette, over SQLAlchemy's asyncio engine."""

from ._arguments.checks import Begin, IsolationLevel, Propagation
from ._arguments.engines import pgbouncer_engine_args
from ._arguments.keywords import EngineArgs, SessionArgs
from ._cluster.atomic import atomic
from ._cluster.replica import WalPosition
from ._dialects.constraints import violated_constraint
from ._dialects.errors import is_conflict, is_unavailable
from ._pool_status import PoolStatus
from ._proxy import DBSessionMeta, SessionProxy
from ._session.hooks import BeginHook, Hook
from ._session.models import ModelSession
from ._tasks.fan_out import UnitTaskGroup
from ._telemetry.holding import LongHoldWarning
from ._telemetry.observer import (
    ObservedPool,
    ObservedTransaction,
    ObservedUnit,
    Observer,
    TransactionOutcome,
    UnitStats,
)
from ._unit.unit import UnitOfWork
from ._web.policy import CommitWhen
from .exceptions import (
    ConcurrentUseError,
    ConfigurationError,
    EngineAlreadyBoundError,
    FastAPIAsyncSQLAlchemyError,
    InDoubtError,
    MissingSessionError,
    PartialCommitError,
    PoolTimeoutError,
    PropagationError,
    ReadOnlyError,
    ReplicaLagError,
    SandboxError,
    SessionNotInitialisedError,
    TransactionBegunError,
    UnexpectedRollbackError,
    UnitClosedError,
    WrongDatabaseError,
)
from .middleware import (
    SQLAlchemyMiddleware,
    add_pool_timeout_handler,
    create_middleware_and_session_proxy,
    db,
)

__version__: str = "1.0.0.dev0"

__all__ = [
    "Begin",
    "BeginHook",
    "CommitWhen",
    "ConcurrentUseError",
    "ConfigurationError",
    "DBSessionMeta",
    "EngineAlreadyBoundError",
    "EngineArgs",
    "FastAPIAsyncSQLAlchemyError",
    "Hook",
    "InDoubtError",
    "IsolationLevel",
    "LongHoldWarning",
    "MissingSessionError",
    "ModelSession",
    "ObservedPool",
    "ObservedTransaction",
    "ObservedUnit",
    "Observer",
    "PartialCommitError",
    "PoolStatus",
    "PoolTimeoutError",
    "Propagation",
    "PropagationError",
    "ReadOnlyError",
    "ReplicaLagError",
    "SQLAlchemyMiddleware",
    "SandboxError",
    "SessionArgs",
    "SessionNotInitialisedError",
    "SessionProxy",
    "TransactionBegunError",
    "TransactionOutcome",
    "UnexpectedRollbackError",
    "UnitClosedError",
    "UnitOfWork",
    "UnitStats",
    "UnitTaskGroup",
    "WalPosition",
    "WrongDatabaseError",
    "add_pool_timeout_handler",
    "atomic",
    "create_middleware_and_session_proxy",
    "db",
    "is_conflict",
    "is_unavailable",
    "pgbouncer_engine_args",
    "violated_constraint",
]
