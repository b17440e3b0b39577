"""The shop's tasks with arq: `arq examples.task_queues.with_arq.WorkerSettings`."""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any, ClassVar

from arq import ArqRedis
from arq.connections import RedisSettings
from arq.typing import StartupShutdown, WorkerCoroutine

from examples.task_queues import shop
from fastapi_async_sqlalchemy import db

REDIS = RedisSettings.from_dsn(shop.REDIS_URL)


async def startup(ctx: dict[Any, Any]) -> None:
    """Connect the pair while the worker runs."""
    ctx["resources"] = AsyncExitStack()
    await ctx["resources"].enter_async_context(db.connect(shop.DATABASE_URL, engine_args={"pool_size": 10}))


async def shutdown(ctx: dict[Any, Any]) -> None:
    """Dispose the engine."""
    await ctx["resources"].aclose()


@db.transactional(isolation_level="REPEATABLE READ", retries=9)
async def reserve(ctx: dict[Any, Any], order_id: int) -> bool:  # noqa: ARG001  # arq passes it
    """Reserve an order in one unit of work, which is committed before the job is removed."""
    return await shop.reserve(order_id)


async def enqueue(queue: ArqRedis, order_id: int) -> None:
    """Enqueue a reservation, unless the same one is waiting or running, or its result is still stored."""
    await queue.enqueue_job("reserve", order_id, _job_id=f"reserve-{order_id}")


class WorkerSettings:
    """The worker's settings."""

    functions: ClassVar[Sequence[WorkerCoroutine]] = [reserve]
    on_startup: ClassVar[StartupShutdown] = startup
    on_shutdown: ClassVar[StartupShutdown] = shutdown
    redis_settings = REDIS
    max_jobs = 10  # at most the size of the pool
    job_timeout = 60  # a job runs again this many seconds plus ten after a crash
