"""Applications whose endpoints ask for the session, with the pair's middleware and without any."""

import re
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated

import pytest
from attrs import define
from fastapi import Depends, HTTPException
from httpx2 import Response as Answer
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.support.serving import asgi_client
from tests.support.site import Site

FASTAPI = version("fastapi")
needs_function_scope = pytest.mark.skipif(
    tuple(int(part) for part in re.findall(r"\d+", FASTAPI)[:2]) < (0, 121),
    reason=f"FastAPI {FASTAPI} ends no dependency before the response: 0.121.0 is the first that does",
)
"""For tests without a middleware: FastAPI itself then opens the unit around the endpoint."""


class DomainError(Exception):
    """An error of the application's own."""


@define(eq=False)
class Watched:
    """Stands around an application and looks from outside at the moment when its response starts."""

    app: ASGIApp
    site: Site
    status: int | None = None
    notes: list[object] | None = None
    checked_out: int | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""

        async def watching(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.checked_out = self.site.checked_out()
                self.status = message["status"]
                self.notes = await self.site.notes()
            await send(message)

        await self.app(scope, receive, watching)

    async def get(self, path: str = "/") -> Answer:
        """Make one request; an error of the application answers 500."""
        async with asgi_client(self, raise_app_exceptions=False) as client:
            return await client.get(path)


def watched(site: Site) -> Watched:
    """Return a site's application, watched."""
    return Watched(site.app, site)


def add_routes(site: Site) -> None:
    """Add a route for each way to come by the session; each says whether it is the unit's own."""
    dependency = site.db.dependency

    async def wrapped(session: Annotated[AsyncSession, Depends(dependency)]) -> AsyncSession:
        return session

    def wrapped_in_a_thread(session: Annotated[AsyncSession, Depends(dependency)]) -> AsyncSession:
        assert session is site.db.session
        return session

    @site.app.get("/async")
    async def async_route(session: Annotated[AsyncSession, Depends(dependency)]) -> bool:
        return session is site.db.session is site.db.unit.session

    @site.app.get("/def")
    def def_route(session: Annotated[AsyncSession, Depends(dependency)]) -> bool:
        return session is site.db.session is site.db.unit.session

    @site.app.get("/nested")
    async def nested_route(
        first: Annotated[AsyncSession, Depends(wrapped)],
        second: Annotated[AsyncSession, Depends(wrapped_in_a_thread)],
        session: Annotated[AsyncSession, Depends(dependency)],
    ) -> bool:
        return first is second is session is site.db.session

    @site.app.get("/uncached")
    async def uncached_route(
        first: Annotated[AsyncSession, Depends(dependency, use_cache=False)],
        second: Annotated[AsyncSession, Depends(dependency, use_cache=False)],
        third: Annotated[AsyncSession, Depends(wrapped, use_cache=False)],
    ) -> bool:
        return first is second is third is site.db.session

    @site.app.get("/decorated", dependencies=[Depends(dependency)])
    async def decorated_route() -> bool:
        return site.db.session is site.db.unit.session


each_route = pytest.mark.parametrize("path", ["/async", "/def", "/nested", "/uncached", "/decorated"])


def as_http_exception() -> None:
    """Fail with an answer."""
    raise HTTPException(404)


def as_handled_error() -> None:
    """Fail with an error that a handler answers."""
    raise DomainError


def as_unknown_error() -> None:
    """Fail with an error that nobody handles."""
    message = "boom"
    raise RuntimeError(message)


Failure = Callable[[], None]
each_failure = pytest.mark.parametrize(
    ("failure", "status"), [(as_http_exception, 404), (as_handled_error, 200), (as_unknown_error, 500)]
)
