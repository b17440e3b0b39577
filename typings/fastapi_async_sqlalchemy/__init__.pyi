import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from types import ModuleType, TracebackType
from typing import Any, Generic, Literal, Never, NewType, Protocol, Self, TypeAlias, TypedDict, overload

from sqlalchemy.engine import URL, Connection
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.engine.interfaces import IsolationLevel as EngineIsolationLevel
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, AsyncSessionTransaction
from sqlalchemy.orm import Mapper, Query, Session
from sqlalchemy.orm.interfaces import ORMOption
from sqlalchemy.pool import ConnectionPoolEntry, Pool
from sqlalchemy.sql.schema import MetaData, Table
from sqlalchemy.sql.selectable import ForUpdateParameter
from starlette.requests import HTTPConnection
from typing_extensions import TypeVar

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

__version__: str

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

_S_co = TypeVar("_S_co", bound=AsyncSession, covariant=True, default=AsyncSession)

_B = TypeVar("_B")
_B_co = TypeVar("_B_co", covariant=True)
_B_contra = TypeVar("_B_contra", contravariant=True)
_M = TypeVar("_M")
_M_co = TypeVar("_M_co", covariant=True)
_T = TypeVar("_T")
_T1 = TypeVar("_T1")
_T2 = TypeVar("_T2")
_T3 = TypeVar("_T3")
_T4 = TypeVar("_T4")
_T5 = TypeVar("_T5")
_T6 = TypeVar("_T6")
_F = TypeVar("_F", bound=Callable[..., Coroutine[Any, Any, Any]])

CommitWhen: TypeAlias = Callable[[int, BaseException | None], bool]
Hook: TypeAlias = Callable[[], Awaitable[object] | object]
WalPosition = NewType("WalPosition", str)
BeginHook: TypeAlias = Callable[[Connection], object]
Propagation: TypeAlias = Literal["requires_new", "required", "nested", "mandatory", "never"]
Begin: TypeAlias = Literal["on_first_use", "on_first_write"]
IsolationLevel: TypeAlias = Literal["READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]

class EngineArgs(TypedDict, total=False):
    async_creator: Callable[[], Awaitable[object]]
    connect_args: Mapping[str, object]
    creator: Callable[[], DBAPIConnection] | Callable[[ConnectionPoolEntry], DBAPIConnection]
    echo: bool | Literal["debug"] | None
    echo_pool: bool | Literal["debug"] | None
    enable_from_linting: bool
    execution_options: Mapping[str, object]
    hide_parameters: bool
    implicit_returning: Literal[True]
    insertmanyvalues_page_size: int
    isolation_level: EngineIsolationLevel
    json_deserializer: Callable[[str], object]
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

def pgbouncer_engine_args(**connect_args: object) -> EngineArgs: ...
def is_conflict(error: BaseException) -> bool: ...
def is_unavailable(error: BaseException) -> bool: ...
def violated_constraint(error: BaseException) -> str | None: ...
def atomic(
    first: SessionProxy[AsyncSession],
    second: SessionProxy[AsyncSession],
    /,
    *databases: SessionProxy[AsyncSession],
) -> AbstractAsyncContextManager[None, None]: ...

TransactionOutcome: TypeAlias = Literal["committed", "rolled back", "only read", "unknown"]

class UnitStats:
    statements: int
    rows: int
    transactions: int
    waited: float
    held: float
    committing: float
    last_statement: str
    def __init__(self, made_by_the_library: Never, /) -> None: ...

class ObservedPool:
    def __init__(self, made_by_the_library: Never, /) -> None: ...
    @property
    def database(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def system(self) -> str: ...
    def status(self) -> PoolStatus: ...

class ObservedUnit:
    def __init__(self, made_by_the_library: Never, /) -> None: ...
    @property
    def number(self) -> int: ...
    @property
    def pool(self) -> ObservedPool: ...
    @property
    def request(self) -> str | None: ...
    @property
    def task(self) -> str: ...
    @property
    def place(self) -> str | None: ...
    @property
    def stats(self) -> UnitStats: ...

class ObservedTransaction:
    def __init__(self, made_by_the_library: Never, /) -> None: ...
    @property
    def outcome(self) -> TransactionOutcome: ...
    @property
    def statements(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def held(self) -> float: ...
    @property
    def committing(self) -> float: ...
    @property
    def commit_error(self) -> str | None: ...

class Observer:
    def pool_bound(self, pool: ObservedPool) -> None: ...
    def pool_released(self, pool: ObservedPool) -> None: ...
    def unit_opened(self, unit: ObservedUnit) -> None: ...
    def wait_began(self, unit: ObservedUnit) -> None: ...
    def wait_ended(self, unit: ObservedUnit, seconds: float, error: BaseException | None) -> None: ...
    def transaction_ended(self, unit: ObservedUnit, transaction: ObservedTransaction) -> None: ...
    def hooks_ran(self, unit: ObservedUnit, count: int, seconds: float) -> None: ...
    def unit_closed(self, unit: ObservedUnit) -> None: ...

class LongHoldWarning(Observer):
    seconds: float
    def __init__(self, seconds: float) -> None: ...
    def wait_ended(self, unit: ObservedUnit, seconds: float, error: BaseException | None) -> None: ...
    def transaction_ended(self, unit: ObservedUnit, transaction: ObservedTransaction) -> None: ...

class SessionArgs(TypedDict, total=False):
    autobegin: bool
    autoflush: bool
    binds: dict[type[Any] | Mapper[Any] | Table | str, AsyncEngine | AsyncConnection]
    class_: type[AsyncSession]
    close_resets_only: bool
    enable_baked_queries: bool
    execution_options: Mapping[str, object]
    expire_on_commit: bool
    info: dict[Any, Any]
    join_transaction_mode: Literal[
        "conditional_savepoint", "rollback_only", "control_fully", "create_savepoint"
    ]
    query_cls: type[Query[Any]]
    sync_session_class: type[Session]
    twophase: bool

# A class of models that are both: the first overload tells which, the second what they must be.
class _Entity(Protocol[_M_co, _B_co]):
    @overload
    def __call__(self, *args: Any, **kwargs: Any) -> _M_co: ...
    @overload
    def __call__(self, *args: Any, **kwargs: Any) -> _B_co: ...  # type: ignore[overload-cannot-match]  # pyright: ignore[reportOverlappingOverload]  # on purpose

# Each method takes less than SQLAlchemy's does, on purpose: hence the ignores. What is generic in `self` is
# compatible to pyright, also where SQLModel's session class is the second base.
class ModelSession(AsyncSession, Generic[_B_contra]):
    @overload  # type: ignore[override]
    def add(self: ModelSession[_B], instance: _B, *, _warn: bool = True) -> None: ...
    @overload
    def add(self: ModelSession[_B], instance: _B, _warn: bool = True) -> None: ...  # SQLAlchemy 2.0's
    def add_all(self: ModelSession[_B], instances: Iterable[_B]) -> None: ...  # type: ignore[override]
    async def delete(self: ModelSession[_B], instance: _B) -> None: ...  # type: ignore[override]
    async def refresh(  # type: ignore[override]
        self: ModelSession[_B],
        instance: _B,
        attribute_names: Iterable[str] | None = None,
        with_for_update: ForUpdateParameter = None,
    ) -> None: ...
    def expunge(self: ModelSession[_B], instance: _B) -> None: ...  # type: ignore[override]
    def expire(  # type: ignore[override]
        self: ModelSession[_B], instance: _B, attribute_names: Iterable[str] | None = None
    ) -> None: ...
    async def get(  # type: ignore[override]
        self: ModelSession[_B],
        entity: _Entity[_M, _B] | Mapper[_M],
        ident: Any,
        *,
        options: Sequence[ORMOption] | None = None,
        populate_existing: bool | None = ...,
        with_for_update: ForUpdateParameter = None,
        identity_token: Any | None = None,
        execution_options: Mapping[str, Any] = ...,
    ) -> _M | None: ...
    async def get_one(  # type: ignore[override]
        self: ModelSession[_B],
        entity: _Entity[_M, _B] | Mapper[_M],
        ident: Any,
        *,
        options: Sequence[ORMOption] | None = None,
        populate_existing: bool | None = ...,
        with_for_update: ForUpdateParameter = None,
        identity_token: Any | None = None,
        execution_options: Mapping[str, Any] = ...,
    ) -> _M: ...

class PoolStatus(Mapping[str, str | int | float | None]):
    def __init__(
        self,
        *,
        pool_class: str,
        size: int | None = None,
        max_overflow: int | None = None,
        capacity: int | None = None,
        checked_in: int | None = None,
        checked_out: int | None = None,
        available: int | None = None,
        saturation: float | None = None,
    ) -> None: ...
    @property
    def pool_class(self) -> str: ...
    @property
    def size(self) -> int | None: ...
    @property
    def max_overflow(self) -> int | None: ...
    @property
    def capacity(self) -> int | None: ...
    @property
    def checked_in(self) -> int | None: ...
    @property
    def checked_out(self) -> int | None: ...
    @property
    def available(self) -> int | None: ...
    @property
    def saturation(self) -> float | None: ...
    def __getitem__(self, name: str) -> str | int | float | None: ...
    def __iter__(self) -> Iterator[str]: ...
    def __len__(self) -> int: ...

class UnitTaskGroup(Generic[_S_co]):
    def __init__(self, made_by_the_library: Never, /) -> None: ...
    async def __aenter__(self) -> Self: ...
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def create_task(
        self, coroutine: Coroutine[Any, Any, _T], *, name: str | None = None
    ) -> asyncio.Task[_T]: ...

class UnitOfWork(Generic[_S_co]):
    def __init__(self, made_by_the_library: Never, /) -> None: ...
    @property
    def opened(self) -> _S_co | None: ...
    @property
    def closed(self) -> bool: ...
    @property
    def session(self) -> _S_co: ...
    @property
    def info(self) -> dict[str, Any]: ...
    @property
    def stats(self) -> UnitStats: ...
    async def commit(self) -> None: ...
    async def rollback(self) -> None: ...
    def savepoint(self) -> AsyncSessionTransaction: ...
    def on_commit(self, hook: Hook) -> None: ...
    def on_rollback(self, hook: Hook) -> None: ...
    def before_commit(self, hook: Hook) -> None: ...
    def on_begin(self, hook: BeginHook) -> None: ...
    def set_rollback_only(self) -> None: ...

class SessionProxy(Generic[_S_co]):
    def __init__(self, made_by_the_library: Never, /) -> None: ...
    @property
    def session(self) -> _S_co: ...
    @property
    def unit(self) -> UnitOfWork[_S_co]: ...
    @property
    def engine(self) -> AsyncEngine: ...
    def __call__(
        self,
        session_args: SessionArgs | None = None,
        commit_on_exit: bool | None = None,
        *,
        propagation: Propagation = "requires_new",
        read_only: bool | None = None,
        isolation_level: IsolationLevel | None = None,
        deferrable: bool | None = None,
        begin: Begin | None = None,
        multi_sessions: bool = False,
        max_concurrent: int | None = None,
        pool_timeout: float | None = None,
    ) -> AbstractAsyncContextManager[UnitOfWork[_S_co], None]: ...
    def begin(
        self,
        *,
        session_args: SessionArgs | None = None,
        propagation: Propagation = "requires_new",
        read_only: bool | None = None,
        isolation_level: IsolationLevel | None = None,
        deferrable: bool | None = None,
        begin: Begin | None = None,
        pool_timeout: float | None = None,
    ) -> AbstractAsyncContextManager[UnitOfWork[_S_co], None]: ...
    def per_task(
        self,
        *,
        max_concurrent: int | None = None,
        commit_on_exit: bool | None = None,
        session_args: SessionArgs | None = None,
        read_only: bool | None = None,
        isolation_level: IsolationLevel | None = None,
        deferrable: bool | None = None,
        begin: Begin | None = None,
        pool_timeout: float | None = None,
    ) -> AbstractAsyncContextManager[UnitOfWork[_S_co], None]: ...
    def after(
        self,
        position: WalPosition,
        *,
        timeout: float = 1.0,
        fallback: SessionProxy[AsyncSession] | None = None,
        session_args: SessionArgs | None = None,
        isolation_level: IsolationLevel | None = None,
        pool_timeout: float | None = None,
    ) -> AbstractAsyncContextManager[UnitOfWork[_S_co], None]: ...
    async def commit_position(self) -> WalPosition: ...
    def connection(
        self, *, timeout: float | None = None, commit_on_exit: bool | None = None
    ) -> AbstractAsyncContextManager[_S_co, None]: ...
    @overload
    def gather(  # type: ignore[overload-overlap]  # pyright: ignore[reportOverlappingOverload]  # a call by *list gives a list
        self,
        coroutine1: Coroutine[Any, Any, _T1],
        /,
        *,
        return_exceptions: Literal[False] = False,
        max_concurrent: int | None = None,
        commit_on_exit: bool | None = None,
        session_args: SessionArgs | None = None,
    ) -> Coroutine[None, None, tuple[_T1]]: ...
    @overload
    def gather(  # type: ignore[overload-overlap]  # a call by *list gives a list
        self,
        coroutine1: Coroutine[Any, Any, _T1],
        coroutine2: Coroutine[Any, Any, _T2],
        /,
        *,
        return_exceptions: Literal[False] = False,
        max_concurrent: int | None = None,
        commit_on_exit: bool | None = None,
        session_args: SessionArgs | None = None,
    ) -> Coroutine[None, None, tuple[_T1, _T2]]: ...
    @overload
    def gather(  # type: ignore[overload-overlap]  # a call by *list gives a list
        self,
        coroutine1: Coroutine[Any, Any, _T1],
        coroutine2: Coroutine[Any, Any, _T2],
        coroutine3: Coroutine[Any, Any, _T3],
        /,
        *,
        return_exceptions: Literal[False] = False,
        max_concurrent: int | None = None,
        commit_on_exit: bool | None = None,
        session_args: SessionArgs | None = None,
    ) -> Coroutine[None, None, tuple[_T1, _T2, _T3]]: ...
    @overload
    def gather(  # type: ignore[overload-overlap]  # a call by *list gives a list
        self,
        coroutine1: Coroutine[Any, Any, _T1],
        coroutine2: Coroutine[Any, Any, _T2],
        coroutine3: Coroutine[Any, Any, _T3],
        coroutine4: Coroutine[Any, Any, _T4],
        /,
        *,
        return_exceptions: Literal[False] = False,
        max_concurrent: int | None = None,
        commit_on_exit: bool | None = None,
        session_args: SessionArgs | None = None,
    ) -> Coroutine[None, None, tuple[_T1, _T2, _T3, _T4]]: ...
    @overload
    def gather(  # type: ignore[overload-overlap]  # a call by *list gives a list
        self,
        coroutine1: Coroutine[Any, Any, _T1],
        coroutine2: Coroutine[Any, Any, _T2],
        coroutine3: Coroutine[Any, Any, _T3],
        coroutine4: Coroutine[Any, Any, _T4],
        coroutine5: Coroutine[Any, Any, _T5],
        /,
        *,
        return_exceptions: Literal[False] = False,
        max_concurrent: int | None = None,
        commit_on_exit: bool | None = None,
        session_args: SessionArgs | None = None,
    ) -> Coroutine[None, None, tuple[_T1, _T2, _T3, _T4, _T5]]: ...
    @overload
    def gather(  # type: ignore[overload-overlap]  # a call by *list gives a list
        self,
        coroutine1: Coroutine[Any, Any, _T1],
        coroutine2: Coroutine[Any, Any, _T2],
        coroutine3: Coroutine[Any, Any, _T3],
        coroutine4: Coroutine[Any, Any, _T4],
        coroutine5: Coroutine[Any, Any, _T5],
        coroutine6: Coroutine[Any, Any, _T6],
        /,
        *,
        return_exceptions: Literal[False] = False,
        max_concurrent: int | None = None,
        commit_on_exit: bool | None = None,
        session_args: SessionArgs | None = None,
    ) -> Coroutine[None, None, tuple[_T1, _T2, _T3, _T4, _T5, _T6]]: ...
    @overload
    def gather(  # pyright: ignore[reportOverlappingOverload]  # as above
        self,
        coroutine1: Coroutine[Any, Any, _T1],
        /,
        *,
        return_exceptions: bool,
        max_concurrent: int | None = None,
        commit_on_exit: bool | None = None,
        session_args: SessionArgs | None = None,
    ) -> Coroutine[None, None, tuple[_T1 | BaseException]]: ...
    @overload
    def gather(
        self,
        coroutine1: Coroutine[Any, Any, _T1],
        coroutine2: Coroutine[Any, Any, _T2],
        /,
        *,
        return_exceptions: bool,
        max_concurrent: int | None = None,
        commit_on_exit: bool | None = None,
        session_args: SessionArgs | None = None,
    ) -> Coroutine[None, None, tuple[_T1 | BaseException, _T2 | BaseException]]: ...
    @overload
    def gather(
        self,
        coroutine1: Coroutine[Any, Any, _T1],
        coroutine2: Coroutine[Any, Any, _T2],
        coroutine3: Coroutine[Any, Any, _T3],
        /,
        *,
        return_exceptions: bool,
        max_concurrent: int | None = None,
        commit_on_exit: bool | None = None,
        session_args: SessionArgs | None = None,
    ) -> Coroutine[None, None, tuple[_T1 | BaseException, _T2 | BaseException, _T3 | BaseException]]: ...
    @overload
    def gather(
        self,
        coroutine1: Coroutine[Any, Any, _T1],
        coroutine2: Coroutine[Any, Any, _T2],
        coroutine3: Coroutine[Any, Any, _T3],
        coroutine4: Coroutine[Any, Any, _T4],
        /,
        *,
        return_exceptions: bool,
        max_concurrent: int | None = None,
        commit_on_exit: bool | None = None,
        session_args: SessionArgs | None = None,
    ) -> Coroutine[
        None,
        None,
        tuple[
            _T1 | BaseException,
            _T2 | BaseException,
            _T3 | BaseException,
            _T4 | BaseException,
        ],
    ]: ...
    @overload
    def gather(
        self,
        coroutine1: Coroutine[Any, Any, _T1],
        coroutine2: Coroutine[Any, Any, _T2],
        coroutine3: Coroutine[Any, Any, _T3],
        coroutine4: Coroutine[Any, Any, _T4],
        coroutine5: Coroutine[Any, Any, _T5],
        /,
        *,
        return_exceptions: bool,
        max_concurrent: int | None = None,
        commit_on_exit: bool | None = None,
        session_args: SessionArgs | None = None,
    ) -> Coroutine[
        None,
        None,
        tuple[
            _T1 | BaseException,
            _T2 | BaseException,
            _T3 | BaseException,
            _T4 | BaseException,
            _T5 | BaseException,
        ],
    ]: ...
    @overload
    def gather(
        self,
        coroutine1: Coroutine[Any, Any, _T1],
        coroutine2: Coroutine[Any, Any, _T2],
        coroutine3: Coroutine[Any, Any, _T3],
        coroutine4: Coroutine[Any, Any, _T4],
        coroutine5: Coroutine[Any, Any, _T5],
        coroutine6: Coroutine[Any, Any, _T6],
        /,
        *,
        return_exceptions: bool,
        max_concurrent: int | None = None,
        commit_on_exit: bool | None = None,
        session_args: SessionArgs | None = None,
    ) -> Coroutine[
        None,
        None,
        tuple[
            _T1 | BaseException,
            _T2 | BaseException,
            _T3 | BaseException,
            _T4 | BaseException,
            _T5 | BaseException,
            _T6 | BaseException,
        ],
    ]: ...
    @overload
    def gather(
        self,
        *coroutines: Coroutine[Any, Any, _T],
        return_exceptions: Literal[False] = False,
        max_concurrent: int | None = None,
        commit_on_exit: bool | None = None,
        session_args: SessionArgs | None = None,
    ) -> Coroutine[None, None, list[_T]]: ...
    @overload
    def gather(
        self,
        *coroutines: Coroutine[Any, Any, _T],
        return_exceptions: bool,
        max_concurrent: int | None = None,
        commit_on_exit: bool | None = None,
        session_args: SessionArgs | None = None,
    ) -> Coroutine[None, None, list[_T | BaseException]]: ...
    def task_group(
        self,
        *,
        max_concurrent: int | None = None,
        commit_on_exit: bool | None = None,
        session_args: SessionArgs | None = None,
    ) -> UnitTaskGroup[_S_co]: ...
    @overload
    def transactional(self, function: _F, /) -> _F: ...
    @overload
    def transactional(
        self,
        function: None = None,
        /,
        *,
        propagation: Propagation = "required",
        read_only: bool | None = None,
        isolation_level: IsolationLevel | None = None,
        deferrable: bool | None = None,
        retries: int = 0,
    ) -> Callable[[_F], _F]: ...
    async def dependency(self, connection: HTTPConnection = ...) -> _S_co: ...
    async def unit_dependency(self, connection: HTTPConnection = ...) -> UnitOfWork[_S_co]: ...
    async def create_all(self, metadata: MetaData) -> None: ...
    async def drop_all(self, metadata: MetaData) -> None: ...
    def pool_status(self) -> PoolStatus: ...
    async def ping(self, *, timeout: float = 5.0) -> None: ...  # noqa: ASYNC109  # for each of its two parts
    def connect(
        self,
        url: str | URL | AsyncEngine,
        *,
        engine_args: EngineArgs | None = None,
        session_args: SessionArgs | None = None,
        commit_on_exit: bool | None = None,
        begin: Begin | None = None,
        pool_warm_up: int | None = None,
        observers: Iterable[Observer] | None = None,
    ) -> AbstractAsyncContextManager[SessionProxy[_S_co], None]: ...
    def on_open(self, callback: Callable[[UnitOfWork[_S_co]], object]) -> None: ...
    def bind(self, engine: AsyncEngine, *, session_args: SessionArgs | None = None) -> None: ...
    def unbind(self) -> None: ...

DBSessionMeta = SessionProxy
