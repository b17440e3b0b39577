"""The floor `lean`: the same promises as `handwritten`, by every shortcut that is known.

No closure per request, no coroutine per message, no work for a request that takes no session, no greenlet
to close a session without a transaction, which is every session that has been settled.
"""

from collections.abc import Awaitable, Callable
from contextvars import ContextVar, Token
from types import TracebackType

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Holder:
    """The session of one request, and the way of its messages."""

    __slots__ = ("send", "session")

    def __init__(self, send: Send | None = None) -> None:
        self.send = send
        self.session: AsyncSession | None = None

    def forward(self, message: Message) -> Awaitable[None]:
        """Settle before the response starts."""
        assert self.send is not None
        if self.session is not None and message["type"] == "http.response.start":
            return self.start(message)
        return self.send(message)

    async def start(self, message: Message) -> None:
        """Settle, then forward."""
        assert self.session is not None
        assert self.send is not None
        if self.session.sync_session.in_transaction():
            if message["status"] < 400:
                await self.session.commit()
            else:
                await self.session.rollback()
        await self.send(message)

    async def close(self) -> None:
        """Close what is left."""
        assert self.session is not None
        session = self.session.sync_session
        if session.in_transaction():
            await self.session.close()
        else:
            session.close()


class Db:
    """`db.session` and `async with db():` by hand."""

    __slots__ = ("current", "engine", "get")

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.current: ContextVar[Holder] = ContextVar("lean")
        self.get: Callable[[], Holder] = self.current.get

    @property
    def session(self) -> AsyncSession:
        """The session of the current request or unit, made on first use."""
        holder = self.get()
        session = holder.session
        if session is None:
            session = holder.session = AsyncSession(self.engine, expire_on_commit=False)
        return session

    def __call__(self) -> "Unit":
        """Return a unit outside requests."""
        return Unit(self.current)


class Unit:
    """Commits at the end of its block, or rolls back by closing."""

    __slots__ = ("current", "holder", "token")

    holder: Holder
    token: Token[Holder]

    def __init__(self, current: ContextVar[Holder]) -> None:
        self.current = current

    async def __aenter__(self) -> None:
        self.holder = Holder()
        self.token = self.current.set(self.holder)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.current.reset(self.token)
        session = self.holder.session
        if session is None:
            return
        try:
            if error is None and session.sync_session.in_transaction():
                await session.commit()
        finally:
            await self.holder.close()


class Middleware:
    """Commits before a response below 400 starts, rolls back any other, closes at the end."""

    def __init__(self, app: ASGIApp, db: Db) -> None:
        self.app = app
        self.current = db.current

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        holder = Holder(send)
        token = self.current.set(holder)
        try:
            await self.app(scope, receive, holder.forward)
        finally:
            self.current.reset(token)
            if holder.session is not None:
                await holder.close()
