"""A site: an application, the database that it writes to, and the judge who looks at it from outside."""

from collections.abc import AsyncGenerator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol, cast

import pytest
from attrs import define
from fastapi import FastAPI
from httpx2 import AsyncClient, Response
from sqlalchemy import Pool, QueuePool
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from starlette.middleware import Middleware

from fastapi_async_sqlalchemy import SessionProxy, create_middleware_and_session_proxy
from tests.support.databases import Judge, JudgeFor
from tests.support.serving import asgi_client
from tests.support.tables import engine_with_tables


@define(eq=False)
class Site:
    """An application without routes yet, whose fresh pair serves an engine of the test's own."""

    app: FastAPI
    db: SessionProxy[AsyncSession]
    engine: AsyncEngine
    judge: Judge

    def client(self, *, raise_app_exceptions: bool = True) -> AbstractAsyncContextManager[AsyncClient]:
        """Call the application in process."""
        return asgi_client(self.app, raise_app_exceptions=raise_app_exceptions)

    async def get(self, path: str = "/", *, raise_app_exceptions: bool = True) -> Response:
        """Start the application, make one request, stop the application."""
        async with self.client(raise_app_exceptions=raise_app_exceptions) as client:
            return await client.get(path)

    async def notes(self) -> list[object]:
        """Return the texts of the notes that are committed, in order."""
        return [text for (text,) in await self.judge.rows("SELECT text FROM note ORDER BY text")]

    def checked_out(self) -> int:
        """Return how many connections are out of the pool."""
        return checked_out(self.engine.pool)


def checked_out(pool: Pool) -> int:
    """Return how many connections are out of a pool."""
    return cast("QueuePool", pool).checkedout()


def checked_in(pool: Pool) -> int:
    """Return how many connections lie in a pool."""
    return cast("QueuePool", pool).checkedin()


class MakeSite(Protocol):
    """What the fixture `make_site` gives: `site = await make_site(url, commit_on_exit=True)`.

    `outside` and `inside` are middlewares around the pair's own and below it; the rest are its arguments.
    """

    async def __call__(  # noqa: D102  # see above
        self,
        url: str,
        *,
        outside: Iterable[Middleware] = (),
        inside: Iterable[Middleware] = (),
        **options: Any,
    ) -> Site: ...


@asynccontextmanager
async def open_site(
    url: str,
    judge_for: JudgeFor,
    outside: Iterable[Middleware] = (),
    inside: Iterable[Middleware] = (),
    **options: Any,
) -> AsyncGenerator[Site]:
    """Make a site; on exit no connection may be out of the pool, whatever the test did."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    async with engine_with_tables(url) as engine:
        ours = Middleware(cast("Any", middleware), custom_engine=engine, **options)
        app = FastAPI(middleware=[*outside, ours, *inside])
        site = Site(app, db, engine, await judge_for(url))
        yield site
        assert site.checked_out() == 0


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what this package has logged from WARNING on, as `LEVEL: message`."""
    return [
        f"{record.levelname}: {record.getMessage()}"
        for record in caplog.records
        if record.name == "fastapi_async_sqlalchemy"
    ]
