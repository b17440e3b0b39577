"""An application inside a sandbox of its own, for clients that run it in another event loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..exceptions import SandboxError
from ._sandbox import sandbox

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
    from starlette.types import ASGIApp, Receive, Scope, Send

    from .._proxy import SessionProxy
    from ._record import Sandbox

_NOT_STARTED: Final = (
    "the application has not been started, or it has ended: write `with TestClient(...) as client:`, which "
    "runs its lifespan"
)


class SandboxedApp:
    """ASGI application that runs another one inside ``sandbox(*databases)``, from startup to shutdown.

    ``with TestClient(SandboxedApp(app, db)) as client:`` opens the sandbox in the event loop of the client.
    """

    def __init__(
        self, app: ASGIApp, *databases: SessionProxy[AsyncSession] | AsyncEngine, timeout: float = 5.0
    ) -> None:
        self._app = app
        self._databases = databases
        self._timeout = timeout
        self._box: Sandbox | None = None
        self._running = False
        sandbox(*databases, timeout=timeout)  # refuses wrong arguments now

    @property
    def box(self) -> Sandbox:
        """The sandbox; raises ``SandboxError`` before the application's startup."""
        if self._box is None:
            raise SandboxError(_NOT_STARTED)
        return self._box

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, or the lifespan."""
        if scope["type"] != "lifespan":
            if not self._running:
                raise SandboxError(_NOT_STARTED)
            await self._app(scope, receive, send)
            return
        async with sandbox(*self._databases, timeout=self._timeout) as self._box:
            self._running = True
            try:
                await self._app(scope, receive, send)
            finally:
                self._running = False
