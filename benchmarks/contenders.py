"""Who is measured: two floors, one of them twice to show the noise, and this package."""

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Protocol

from attrs import frozen
from sqlalchemy import URL, AsyncAdaptedQueuePool
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from starlette.applications import Starlette

from benchmarks import handwritten, lean
from fastapi_async_sqlalchemy import create_middleware_and_session_proxy

BARE = "bare"
LEAN = "lean"
HANDWRITTEN = "handwritten"
AGAIN = "again"
OURS = "ours"
POOL_SIZE = 10


class Db(Protocol):
    """Where a handler finds its session."""

    @property
    def session(self) -> AsyncSession:
        """The session of the current request or unit."""
        ...


@frozen(kw_only=True)
class Contender:
    """One way to give each request a session, on an engine of its own.

    An engine is not shared: the floors would pay for the listeners that this package adds to its own.
    """

    name: str
    engine: AsyncEngine
    db: Db
    unit: Callable[[], AbstractAsyncContextManager[object]]
    install: Callable[[Starlette], None]


def by_hand(name: str, engine: AsyncEngine) -> Contender:
    """Make the floor `handwritten`, or `again`."""
    db = handwritten.Db(engine)

    def install(app: Starlette) -> None:
        app.add_middleware(handwritten.Middleware, db=db)

    return Contender(name=name, engine=engine, db=db, unit=db, install=install)


def by_shortcuts(name: str, engine: AsyncEngine) -> Contender:
    """Make the floor `lean`."""
    db = lean.Db(engine)

    def install(app: Starlette) -> None:
        app.add_middleware(lean.Middleware, db=db)

    return Contender(name=name, engine=engine, db=db, unit=db, install=install)


def by_the_package(name: str, engine: AsyncEngine) -> Contender:
    """Make a pair of this package; sessions are SQLAlchemy's own, also where SQLModel is installed."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    db.bind(engine)

    def install(app: Starlette) -> None:
        app.add_middleware(middleware, custom_engine=engine, commit_on_exit=True)

    return Contender(name=name, engine=engine, db=db, unit=partial(db, commit_on_exit=True), install=install)


@asynccontextmanager
async def contenders(url: str | URL) -> AsyncGenerator[tuple[Contender, ...]]:
    """Make all of them on one database; their engines have the same settings, and are disposed on exit."""
    makers = {LEAN: by_shortcuts, HANDWRITTEN: by_hand, AGAIN: by_hand, OURS: by_the_package}
    async with AsyncExitStack() as engines:
        made: list[Contender] = []
        for name, make in makers.items():
            engine = create_async_engine(
                url, poolclass=AsyncAdaptedQueuePool, pool_size=POOL_SIZE, max_overflow=0
            )
            engines.push_async_callback(engine.dispose)
            made.append(make(name, engine))
        yield tuple(made)
