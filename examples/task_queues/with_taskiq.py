"""The shop's tasks by TaskIQ: `taskiq worker examples.task_queues.with_taskiq:broker`."""

import os
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Annotated

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from taskiq import TaskiqDepends, TaskiqEvents, TaskiqState
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

from examples.task_queues import shop
from fastapi_async_sqlalchemy import UnitOfWork, db

broker = RedisStreamBroker(
    shop.REDIS_URL,
    consumer_id="0",  # the default, "$", skips what was enqueued before the first worker started
    idle_timeout=int(os.environ.get("TASK_IDLE_MS", "600000")),  # longer than any task takes
    maxlen=1_000_000,  # acknowledged messages stay in the stream until it is trimmed
).with_result_backend(RedisAsyncResultBackend(shop.REDIS_URL, result_ex_time=3600))


@broker.on_event(TaskiqEvents.WORKER_STARTUP)
async def connect(state: TaskiqState) -> None:
    """Connect the pair: once for each worker process, in the event loop that runs the tasks."""
    state.resources = AsyncExitStack()
    await state.resources.enter_async_context(db.connect(shop.DATABASE_URL, engine_args={"pool_size": 10}))


@broker.on_event(TaskiqEvents.WORKER_SHUTDOWN)
async def disconnect(state: TaskiqState) -> None:
    """Dispose the engine."""
    await state.resources.aclose()


@broker.task(timeout=60)
@db.transactional(isolation_level="REPEATABLE READ", retries=9)
async def reserve(order_id: int) -> bool:
    """Reserve an order in one unit of work, which is committed before the message is acknowledged."""
    return await shop.reserve(order_id)


async def reading() -> AsyncGenerator[UnitOfWork[AsyncSession]]:
    """Open a unit for a task that only reads."""
    async with db(read_only=True) as unit:
        yield unit


@broker.task
async def stock(
    product: str, unit: Annotated[UnitOfWork[AsyncSession], TaskiqDepends(reading)]
) -> int | None:
    """Return how many of a product are left."""
    return await unit.session.scalar(select(shop.Product.stock).where(shop.Product.name == product))
