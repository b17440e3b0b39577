from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from types import ModuleType
from typing import Any, Generic, Literal, TypeAlias, TypedDict

from sqlalchemy.engine import URL
from sqlalchemy.engine.interfaces import DBAPIConnection, IsolationLevel
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, AsyncSessionTransaction
from sqlalchemy.orm import Mapper, Query, Session
from sqlalchemy.pool import ConnectionPoolEntry, Pool
from sqlalchemy.sql.schema import Table
from typing_extensions import TypeVar

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

_S_co = TypeVar("_S_co", bound=AsyncSession, covariant=True, default=AsyncSession)

CommitWhen: TypeAlias = Callable[[int, BaseException | None], bool]
Hook: TypeAlias = Callable[[], Awaitable[object] | object]

class EngineArgs(TypedDict, total=False):
    async_creator: Callable[[], Awaitable[object]]
    connect_args: Mapping[str, Any]
    creator: Callable[[], DBAPIConnection] | Callable[[ConnectionPoolEntry], DBAPIConnection]
    echo: bool | Literal["debug"] | None
    echo_pool: bool | Literal["debug"] | None
    enable_from_linting: bool
    execution_options: Mapping[str, Any]
    hide_parameters: bool
    implicit_returning: Literal[True]
    insertmanyvalues_page_size: int
    isolation_level: IsolationLevel
    json_deserializer: Callable[[str], Any]
    json_serializer: Callable[[Any], str]
    label_length: int | None
    logging_name: str
    max_identifier_length: int | None
    max_overflow: int
    module: ModuleType | str | None
    paramstyle: Literal["qmark", "numeric", "named", "format", "pyformat", "numeric_dollar"] | None
    plugins: list[str]
    pool: Pool | None
    pool_logging_name: str
    pool_pre_ping: bool
    pool_recycle: int
    pool_reset_on_return: Literal["rollback", "commit"] | bool | None
    pool_size: int
    pool_timeout: float
    pool_use_lifo: bool
    poolclass: type[Pool] | None
    query_cache_size: int
    skip_autocommit_rollback: bool
    use_insertmanyvalues: bool

class SessionArgs(TypedDict, total=False):
    autobegin: bool
    autoflush: bool
    binds: dict[type[Any] | Mapper[Any] | Table | str, AsyncEngine | AsyncConnection]
    class_: type[AsyncSession]
    close_resets_only: bool
    enable_baked_queries: bool
    execution_options: Mapping[str, Any]
    expire_on_commit: bool
    info: dict[Any, Any]
    join_transaction_mode: Literal[
        "conditional_savepoint", "rollback_only", "control_fully", "create_savepoint"
    ]
    query_cls: type[Query[Any]]
    sync_session_class: type[Session]
    twophase: bool

class UnitOfWork(Generic[_S_co]):
    @property
    def opened(self) -> _S_co | None: ...
    @property
    def closed(self) -> bool: ...
    @property
    def session(self) -> _S_co: ...
    @property
    def info(self) -> dict[str, Any]: ...
    async def commit(self) -> None: ...
    async def rollback(self) -> None: ...
    def savepoint(self) -> AsyncSessionTransaction: ...
    def on_commit(self, hook: Hook) -> None: ...
    def on_rollback(self, hook: Hook) -> None: ...

class SessionProxy(Generic[_S_co]):
    @property
    def session(self) -> _S_co: ...
    @property
    def unit(self) -> UnitOfWork[_S_co]: ...
    @property
    def engine(self) -> AsyncEngine: ...
    def __call__(
        self, session_args: SessionArgs | None = None, commit_on_exit: bool = False
    ) -> AbstractAsyncContextManager[UnitOfWork[_S_co], None]: ...
    def connect(
        self,
        url: str | URL | AsyncEngine,
        *,
        engine_args: EngineArgs | None = None,
        session_args: SessionArgs | None = None,
    ) -> AbstractAsyncContextManager[SessionProxy[_S_co], None]: ...
    def bind(self, engine: AsyncEngine, *, session_args: SessionArgs | None = None) -> None: ...
    def unbind(self) -> None: ...
