"""An application inside its own sandbox, for clients that run it in another event loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from .._unit.place import Handle
from ..exceptions import SandboxError
from ..middleware import SQLAlchemyMiddleware
from ._sandbox import sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from .._proxy import SessionProxy
    from .._unit.database import Database
    from ._record import Sandbox

_NOT_STARTED: Final = (
    "the application has not been started, or it has ended: write `with TestClient(...) as client:`, which "
    "runs its lifespan"
)


class SandboxedApp:
    """ASGI application that runs another one inside ``sandbox(*databases)``, from startup to shutdown.

    ``with TestClient(SandboxedApp(app, db)) as client:`` opens the sandbox in the event loop of the client.
    Startup raises ``SandboxError`` if the application has a pair that was left out.
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
        self._require_all()
        ended: list[Message] = []

        async def hold_end(message: Message) -> None:
            if message["type"] == "lifespan.shutdown.complete":
                ended.append(message)  # TestClient would see no error after it
            else:
                await send(message)

        async with sandbox(*self._databases, timeout=self._timeout) as self._box:
            self._running = True
            try:
                await self._app(scope, receive, hold_end)
            finally:
                self._running = False
        for message in ended:
            await send(message)

    def _require_all(self) -> None:
        """Refuse an application that would write past the sandbox, unless engines were given in its place."""
        named = [one._database for one in self._databases if isinstance(one, Handle)]
        for database in _databases_of(self._app):
            if database not in named and len(named) == len(self._databases):
                reason = (
                    f"the application has a middleware of {database.name}, whose writes would stay: give "
                    "SandboxedApp, or the fixture sandbox_databases, the proxy of each pair"
                )
                raise SandboxError(reason)


def _databases_of(app: object) -> Iterator[Database[Any]]:
    """Yield the databases of an application's middlewares, and of those of mounted applications."""
    stack: list[Any] = [app, *(one.cls for one in getattr(app, "user_middleware", ()))]
    inner: list[Any] = [app, *getattr(app, "routes", ())]
    for one in stack:
        kind: object = one if isinstance(one, type) else one.__class__
        if isinstance(kind, type) and issubclass(kind, SQLAlchemyMiddleware):
            found: Database[Any] = getattr(one, "_database")  # noqa: B009  # pyright narrows `one` to an unknown
            yield found
    for mounted in (getattr(one, "app", None) for one in inner):
        if hasattr(mounted, "user_middleware"):
            yield from _databases_of(mounted)
