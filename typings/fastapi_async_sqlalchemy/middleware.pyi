from collections.abc import Iterable, Mapping
from typing import Generic, Literal

from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send
from typing_extensions import TypeVar

from . import Begin, CommitWhen, EngineArgs, Observer, SessionArgs, SessionProxy

_S_co = TypeVar("_S_co", bound=AsyncSession, covariant=True, default=AsyncSession)

__all__ = ["SQLAlchemyMiddleware", "add_pool_timeout_handler", "create_middleware_and_session_proxy", "db"]

class SQLAlchemyMiddleware(Generic[_S_co]):
    app: ASGIApp
    def __init__(
        self,
        app: ASGIApp,
        db_url: str | URL | None = None,
        custom_engine: AsyncEngine | None = None,
        engine_args: EngineArgs | Mapping[str, object] | None = None,
        session_args: SessionArgs | Mapping[str, object] | None = None,
        commit_on_exit: bool | None = None,
        *,
        exclude_paths: Iterable[str] | None = None,
        commit_when: CommitWhen | None = None,
        max_concurrent_requests: int | None = None,
        request_queue_timeout: float | None = None,
        pool_warn_threshold: float | None = None,
        pool_warn_interval: float = 60.0,
        begin: Begin | None = None,
        pool_warm_up: int | None = None,
        observers: Iterable[Observer] | None = None,
        server_timing: bool = False,
        concurrent_use: Literal["refuse", "wait"] | None = None,
    ) -> None: ...
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...

def add_pool_timeout_handler(app: Starlette) -> None: ...
def create_middleware_and_session_proxy(
    session_class: type[_S_co] | None = None,
    *,
    read_only: bool = False,
    commit_on_exit: bool = False,
    begin: Begin | None = None,
    concurrent_use: Literal["refuse", "wait"] = "refuse",
    observers: Iterable[Observer] | None = None,
) -> tuple[type[SQLAlchemyMiddleware[_S_co]], SessionProxy[_S_co]]: ...

db: SessionProxy[AsyncSession]
