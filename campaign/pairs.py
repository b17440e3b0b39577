"""The pairs of the campaign's application: each with a way of its own to come by its connections."""

from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from campaign.tables import Copy
from fastapi_async_sqlalchemy import create_middleware_and_session_proxy


class MainSession(AsyncSession):
    """The session of the main database."""


class LedgerSession(AsyncSession):
    """The session of the ledger."""


class ManualSession(AsyncSession):
    """The session of the main database where nothing is committed unasked."""


class Routing(Session):
    """Chooses the engine by what is mapped: the ledger's for copies."""

    def get_bind(self, mapper: Any = None, **arguments: Any) -> Any:
        """Return the engine."""
        if mapper is not None and mapper.class_ is Copy:
            away: AsyncEngine = self.info["away"]
            return away.sync_engine
        return super().get_bind(mapper, **arguments)


class RoutedSession(AsyncSession):
    """The session of both databases, on two engines."""

    sync_session_class = Routing


class SecondSession(AsyncSession):
    """The session of the main database by another driver."""


class JobSession(AsyncSession):
    """The session of jobs, each of which has an event loop of its own."""


MainMiddleware, main = create_middleware_and_session_proxy(MainSession)
LedgerMiddleware, ledger = create_middleware_and_session_proxy(LedgerSession)
ManualMiddleware, manual = create_middleware_and_session_proxy(ManualSession)
RoutedMiddleware, routed = create_middleware_and_session_proxy(RoutedSession)
SecondMiddleware, second = create_middleware_and_session_proxy(SecondSession)
_, jobs = create_middleware_and_session_proxy(JobSession)
