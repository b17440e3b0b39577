"""The application under test: its middlewares, a mounted application that commits by hand, and handlers."""

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, Self

from attrs import asdict, frozen
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from starlette.types import ASGIApp

from campaign import listeners
from campaign.broken import BROKEN
from campaign.case import Witness, current, follow
from campaign.endpoints import routers
from campaign.observing import Unreliable
from campaign.pairs import (
    LedgerMiddleware,
    MainMiddleware,
    ManualMiddleware,
    RoutedMiddleware,
    SecondMiddleware,
    jobs,
)
from campaign.routes import DomainError, ForgivenError
from campaign.sabotage import SABOTAGE
from campaign.watch import Watch
from fastapi_async_sqlalchemy import Begin, FastAPIAsyncSQLAlchemyError, PoolTimeoutError

POOL_SIZE = 5
POOLS = {
    "main": ("main", POOL_SIZE),
    "ledger": ("ledger", POOL_SIZE),
    "manual": ("main", 2),
    "routed": ("main", 3),
    "away": ("ledger", 3),
    "second": ("second", 3),
    "jobs": ("main", 1),
}
"""The engines, each with the connection that it has and its size; `away` is no pair's."""
CONFLICT, BROKEN_CONNECTION = 409, 502
CONFLICTS = {"40001", "40P01", "1213", "1205", "1020"}
"""Serialization failures and deadlocks, as the two servers number them."""


@frozen
class Settings:
    """What the application's process is told when it starts."""

    urls: dict[str, str]
    """Of both databases, and of the first by the second driver."""
    connect_args: dict[str, dict[str, Any]]
    pre_ping: bool = False
    broken: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `text()` wrote."""
        return cls(**json.loads(text))

    def text(self) -> str:
        """Return the settings as text."""
        return json.dumps(asdict(self))

    def engine(self, name: str) -> AsyncEngine:
        """Make an engine with a small pool."""
        url, size = POOLS[name]
        return create_async_engine(
            self.urls[url],
            connect_args=self.connect_args[url],
            pool_size=size,
            max_overflow=0,
            pool_timeout=0.3,
            pool_pre_ping=self.pre_ping,
        )


def build(settings: Settings) -> tuple[ASGIApp, Watch]:
    """Make the application, and what watches it."""
    listeners.listen()
    if settings.broken in SABOTAGE:
        SABOTAGE[settings.broken]()
    engines = {name: settings.engine(name) for name in POOLS}
    for name, engine in engines.items():
        follow("ledger" if POOLS[name][0] == "ledger" else "main", engine)
    jobs.bind(engines["jobs"])
    watch = Watch(engines)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        watch.begin()
        yield
        for engine in engines.values():
            await engine.dispose()

    app, by_hand = FastAPI(lifespan=lifespan), FastAPI()
    router, manual_router = routers()
    by_hand.include_router(manual_router)
    begin: Begin | None = "on_first_write" if settings.urls["main"].startswith("postgresql") else None
    by_hand.add_middleware(ManualMiddleware, custom_engine=engines["manual"], begin=begin)
    app.include_router(router)
    app.mount("/manual", by_hand)
    app.state.away = engines["away"]
    commits = True
    if settings.broken in BROKEN:
        inside, commits = BROKEN[settings.broken]
        app.add_middleware(inside)
    app.add_middleware(MainMiddleware, custom_engine=engines["main"], commit_on_exit=commits)
    observers, second = [Unreliable(1)], engines["second"]
    app.add_middleware(
        LedgerMiddleware, custom_engine=engines["ledger"], commit_on_exit=True, observers=observers
    )
    app.add_middleware(SecondMiddleware, custom_engine=second, commit_on_exit=True, begin=begin)
    info = {"info": {"away": engines["away"]}}
    app.add_middleware(
        RoutedMiddleware,
        custom_engine=engines["routed"],
        session_args=info,
        commit_on_exit=True,
        observers=observers,
    )
    for each in (app, by_hand):
        for kind in (SQLAlchemyError, FastAPIAsyncSQLAlchemyError, OSError, Exception):
            each.add_exception_handler(kind, answer)
    app.add_exception_handler(DomainError, conflict)
    app.add_exception_handler(ForgivenError, forgive)
    return Witness(app, watch), watch


async def conflict(_: Request, error: Exception) -> JSONResponse:
    """Answer 409 for an error of the domain."""
    return JSONResponse({"error": type(error).__name__}, CONFLICT)


async def forgive(_: Request, error: Exception) -> JSONResponse:
    """Answer 200 for an error of the domain."""
    return JSONResponse({"error": type(error).__name__})


async def answer(_: Request, error: Exception) -> JSONResponse:
    """Answer for a failure, and say whether it leaves a COMMIT in doubt."""
    current.get().failed(error)
    return JSONResponse({"error": f"{type(error).__name__}: {error}"[:300]}, _status(error))


def _status(error: Exception) -> int:
    if isinstance(error, PoolTimeoutError):
        return 503
    if isinstance(error, IntegrityError):
        return CONFLICT
    if isinstance(error, DBAPIError) and error.orig is not None:
        code = getattr(error.orig, "sqlstate", None) or (error.orig.args or ("",))[0]
        if str(code) in CONFLICTS:
            return CONFLICT
        if error.connection_invalidated:
            return BROKEN_CONNECTION
    return error.status_code if isinstance(error, HTTPException) else 500
