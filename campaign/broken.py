"""Applications that are broken on purpose, each in a way of its own: the verdict must find them guilty."""

import logging
from collections.abc import Callable
from typing import Any

from attrs import Factory, define
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from campaign.case import current
from campaign.pairs import main

logger = logging.getLogger("campaign")


@define(eq=False)
class CommitsLate:
    """Commits when the response has gone out."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        await self.app(scope, receive, send)
        if main.unit.opened is not None:
            await main.session.commit()


@define(eq=False)
class SwallowsErrors:
    """Commits before the response, and only logs an error of COMMIT."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""

        async def settle(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] < 400:
                try:
                    await main.session.commit()
                except Exception:
                    logger.exception("COMMIT failed")
                    await main.session.rollback()
            await send(message)

        await self.app(scope, receive, settle)


@define(eq=False)
class CommitsAnyway:
    """Commits whatever the status is."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""

        async def settle(message: Message) -> None:
            if message["type"] == "http.response.start" and main.unit.opened is not None:
                await main.session.commit()
            await send(message)

        await self.app(scope, receive, settle)


@define(eq=False)
class LosesConnections:
    """Is right about transactions, but keeps the connection of each fiftieth request."""

    app: ASGIApp
    kept: list[AsyncSession] = Factory(list[AsyncSession])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and current.get().number % 50 == 0 and not self.kept:
            session = AsyncSession(main.engine)
            await session.connection()
            self.kept.append(session)
        await self.app(scope, receive, send)


@define(eq=False)
class Grows:
    """Is right about transactions, but keeps something of each request."""

    app: ASGIApp
    kept: list[dict[str, Any]] = Factory(list[dict[str, Any]])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        self.kept.extend({f"{number}": object()} for number in range(100))
        await self.app(scope, receive, send)


BROKEN: dict[str, tuple[Callable[[ASGIApp], ASGIApp], bool]] = {
    "late": (CommitsLate, False),
    "swallows": (SwallowsErrors, False),
    "anyway": (CommitsAnyway, False),
    "leaks": (LosesConnections, True),
    "grows": (Grows, True),
}
"""By name: what goes inside the pair's own middleware, and whether that one still commits."""
