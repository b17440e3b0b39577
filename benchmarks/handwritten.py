"""The floor `handwritten`: what a good engineer writes by hand, one session per request, in pure ASGI."""

from contextvars import ContextVar, Token
from types import TracebackType

from attrs import define
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from starlette.types import ASGIApp, Message, Receive, Scope, Send


@define(eq=False)
class Holder:
    """What the variable holds: the session of one request, once there is one."""

    session: AsyncSession | None = None


class Db:
    """`db.session` and `async with db():` by hand."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.current: ContextVar[Holder] = ContextVar("handwritten")

    @property
    def session(self) -> AsyncSession:
        """The session of the current request or unit, made on first use."""
        holder = self.current.get()
        if holder.session is None:
            holder.session = AsyncSession(self.engine, expire_on_commit=False)
        return holder.session

    def __call__(self) -> "Unit":
        """Return a unit outside requests."""
        return Unit(self.current)


@define(eq=False)
class Unit:
    """Commits at the end of its block, or rolls back by closing."""

    current: ContextVar[Holder]
    holder: Holder | None = None
    token: Token[Holder] | None = None

    async def __aenter__(self) -> None:
        self.holder = Holder()
        self.token = self.current.set(self.holder)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.holder is not None
        assert self.token is not None
        self.current.reset(self.token)
        session = self.holder.session
        if session is not None:
            try:
                if error is None:
                    await session.commit()
            finally:
                await session.close()


class Middleware:
    """Commits before a response below 400 starts, rolls back any other, closes at the end."""

    def __init__(self, app: ASGIApp, db: Db) -> None:
        self.app = app
        self.db = db

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        holder = Holder()
        token = self.db.current.set(holder)

        async def settle_first(message: Message) -> None:
            if message["type"] == "http.response.start" and holder.session is not None:
                if message["status"] < 400:
                    await holder.session.commit()
                else:
                    await holder.session.rollback()
            await send(message)

        try:
            await self.app(scope, receive, settle_first)
        finally:
            self.db.current.reset(token)
            if holder.session is not None:
                await holder.session.close()
