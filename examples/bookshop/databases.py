"""The pairs: the shop, its replica, and the reporting database, each with a session type of its own."""

from typing import Annotated, TypeAlias

from fastapi import Depends

from examples.bookshop.models import ReportingBase, ShopBase
from fastapi_async_sqlalchemy import (
    EngineArgs,
    ModelSession,
    UnitOfWork,
    create_middleware_and_session_proxy,
)


class ShopSession(ModelSession[ShopBase]):
    """A session that reads and writes the shop's models."""


class ReplicaSession(ModelSession[ShopBase]):
    """A session that only reads them; services that write do not take it."""


class ReportingSession(ModelSession[ReportingBase]):
    """A session of the reporting database's models."""


ShopMiddleware, shop = create_middleware_and_session_proxy(ShopSession, commit_on_exit=True)
ReplicaMiddleware, replica = create_middleware_and_session_proxy(ReplicaSession, read_only=True)
ReportingMiddleware, reporting = create_middleware_and_session_proxy(ReportingSession)

ReadingSession: TypeAlias = ModelSession[ShopBase]
"""What a service takes that only reads the shop: either of its sessions."""
ShopUnit = Annotated[UnitOfWork[ShopSession], Depends(shop.unit_dependency)]
Reporting = Annotated[ReportingSession, Depends(reporting.dependency)]


def engine_args(pool_size: int) -> EngineArgs:
    """Return the arguments of an engine: a client waits seconds for what does not answer, not minutes."""
    return {
        "pool_size": pool_size,
        "max_overflow": 0,
        "pool_timeout": 3,
        "pool_pre_ping": True,
        "connect_args": {"timeout": 5, "command_timeout": 30},
    }
