"""The pairs: the shop, its replica, and the reporting database, each with a separate session type."""

from typing import Annotated, TypeAlias

from fastapi import Depends
from opentelemetry.trace import TracerProvider

from examples.bookshop.models import ReportingBase, ShopBase
from examples.bookshop.settings import Settings
from fastapi_async_sqlalchemy import (
    EngineArgs,
    LongHoldWarning,
    ModelSession,
    Observer,
    UnitOfWork,
    create_middleware_and_session_proxy,
)
from fastapi_async_sqlalchemy.opentelemetry import OpenTelemetryObserver


class ShopSession(ModelSession[ShopBase]):
    """A session that reads and writes the shop's models."""


class ReplicaSession(ModelSession[ShopBase]):
    """A session that only reads the shop's models; services that write do not accept it."""


class ReportingSession(ModelSession[ReportingBase]):
    """A session of the reporting database's models."""


ShopMiddleware, shop = create_middleware_and_session_proxy(ShopSession, commit_on_exit=True)
ReplicaMiddleware, replica = create_middleware_and_session_proxy(ReplicaSession, read_only=True)
ReportingMiddleware, reporting = create_middleware_and_session_proxy(ReportingSession)

ReadingSession: TypeAlias = ModelSession[ShopBase]
"""Either session of the shop, for services that only read."""
ShopUnit = Annotated[UnitOfWork[ShopSession], Depends(shop.unit_dependency)]
Reporting = Annotated[ReportingSession, Depends(reporting.dependency)]


def observers_of(settings: Settings, tracer_provider: TracerProvider | None = None) -> list[Observer]:
    """Return the observers of the units in the web server and in the worker."""
    patience = LongHoldWarning(10)
    if not settings.telemetry:
        return [patience]
    return [patience, OpenTelemetryObserver(tracer_provider=tracer_provider)]


def engine_args(pool_size: int) -> EngineArgs:
    """Return an engine's arguments, with timeouts so that clients wait for seconds and not for minutes."""
    return {
        "pool_size": pool_size,
        "max_overflow": 0,
        "pool_timeout": 3,
        "pool_pre_ping": True,
        "connect_args": {"timeout": 5, "command_timeout": 30},
    }
