from contextlib import AbstractAsyncContextManager
from typing import Literal, Never, TypeAlias

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from starlette.types import ASGIApp, Receive, Scope, Send

from .. import SessionProxy
from ..exceptions import SandboxError

__all__ = ["CommitFailure", "Sandbox", "SandboxError", "SandboxedApp", "sandbox"]

CommitFailure: TypeAlias = Literal["constraint", "conflict", "lost", "lost_after_commit"]

class Sandbox:
    def __init__(self, made_by_the_library: Never, /) -> None: ...
    @property
    def statements(self) -> list[str]: ...
    @property
    def commits(self) -> int: ...
    @property
    def rollbacks(self) -> int: ...
    @property
    def hooks_run(self) -> int: ...
    def assert_statements(self, *, at_most: int) -> None: ...
    def reset(self) -> None: ...
    def fail_commit(
        self,
        failure: CommitFailure = "constraint",
        *,
        constraint: str | None = None,
        on: SessionProxy[AsyncSession] | None = None,
    ) -> None: ...
    def lose_connection(self, *, on: SessionProxy[AsyncSession] | None = None) -> None: ...

def sandbox(
    *databases: SessionProxy[AsyncSession] | AsyncEngine, timeout: float = 5.0
) -> AbstractAsyncContextManager[Sandbox, None]: ...

class SandboxedApp:
    def __init__(
        self, app: ASGIApp, *databases: SessionProxy[AsyncSession] | AsyncEngine, timeout: float = 5.0
    ) -> None: ...
    @property
    def box(self) -> Sandbox: ...
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...
