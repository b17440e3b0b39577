"""The web application: `uvicorn --factory examples.bookshop.app:from_environment`."""

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.trace import TracerProvider

from examples.bookshop.admin import add_admin
from examples.bookshop.databases import (
    ReplicaMiddleware,
    ReportingMiddleware,
    ShopMiddleware,
    engine_args,
    observers_of,
)
from examples.bookshop.errors import add_error_handlers
from examples.bookshop.health import LIVE, READY, health
from examples.bookshop.orders import Wake
from examples.bookshop.routes import router
from examples.bookshop.settings import Settings
from examples.bookshop.telemetry import print_spans
from examples.bookshop.worker import queue


def from_environment() -> FastAPI:
    """Create the application with the settings of the environment."""
    settings = Settings.from_environment()
    if settings.telemetry:
        print_spans()
    return create_app(settings)


def create_app(
    settings: Settings, *, wake: Wake | None = None, tracer_provider: TracerProvider | None = None
) -> FastAPI:
    """Create the application; a test may pass `wake` instead of the queue, and a `tracer_provider`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        async with AsyncExitStack() as exits:
            app.state.wake = wake or await exits.enter_async_context(queue(settings.redis_url))
            yield

    app = FastAPI(title="Bookshop", lifespan=lifespan)
    add_admin(app, settings)
    app.include_router(router)
    app.include_router(health)
    add_error_handlers(app)
    add_databases(app, settings, tracer_provider)
    return app


def add_databases(app: FastAPI, settings: Settings, tracer_provider: TracerProvider | None) -> None:
    """Give each request a unit of each database; the last middleware added is the outermost.

    Without a replica, a second read-only pool on the primary takes its place.
    """
    observers = observers_of(settings, tracer_provider)
    if settings.telemetry:
        FastAPIInstrumentor.instrument_app(
            app, tracer_provider=tracer_provider, exclude_spans=["receive", "send"]
        )
    pool, apart = engine_args(settings.pool_size), [LIVE, READY]
    app.add_middleware(
        ReportingMiddleware,
        db_url=settings.reporting_url,
        engine_args=pool,
        exclude_paths=apart,
        observers=observers,
    )
    app.add_middleware(
        ReplicaMiddleware,
        db_url=settings.replica_url or settings.shop_url,
        engine_args=pool,
        exclude_paths=apart,
        observers=observers,
    )
    app.add_middleware(
        ShopMiddleware,
        db_url=settings.shop_url,
        engine_args=pool,
        exclude_paths=apart,
        observers=observers,
        max_concurrent_requests=2 * settings.pool_size,
        request_queue_timeout=3,
    )
