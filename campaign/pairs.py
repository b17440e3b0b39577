"""The pairs of the campaign's application: two databases, and a third pair that commits by hand."""

from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_async_sqlalchemy import create_middleware_and_session_proxy


class MainSession(AsyncSession):
    """The session of the main database."""


class LedgerSession(AsyncSession):
    """The session of the ledger."""


class ManualSession(AsyncSession):
    """The session of the main database where nothing is committed unasked."""


MainMiddleware, main = create_middleware_and_session_proxy(MainSession)
LedgerMiddleware, ledger = create_middleware_and_session_proxy(LedgerSession)
ManualMiddleware, manual = create_middleware_and_session_proxy(ManualSession)
