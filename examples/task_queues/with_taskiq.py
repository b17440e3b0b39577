"""The shop's tasks with TaskIQ: `taskiq worker examples.task_queues.with_taskiq:broker`."""

import os
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from functools import partial
from typing import Annotated, Any

from redis.asyncio import Redis
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from taskiq import AckableMessage, TaskiqDepends, TaskiqEvents, TaskiqState
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

from examples.task_queues import shop
from fastapi_async_sqlalchemy import UnitOfWork, db


class TaskBroker(RedisStreamBroker):
    """A stream that redelivers unacknowledged messages after `idle_timeout`, and deletes acknowledged ones.

    taskiq-redis 1.0.9 takes messages over under a lock, which a killed worker may never release.
    """

    async def listen(self) -> AsyncGenerator[AckableMessage]:
        """Yield messages one at a time: those of a dead worker first, then new ones."""
        group, consumer = self.consumer_group_name, self.consumer_name
        client: Any = Redis(connection_pool=self.connection_pool)
        async with client as redis:
            while True:
                left = await redis.xautoclaim(self.queue_name, group, consumer, self.idle_timeout, count=1)
                messages: Any = left[1]
                if not messages:
                    new = await redis.xreadgroup(group, consumer, {self.queue_name: ">"}, 1, self.block)
                    messages = new[0][1] if new else []
                for number, fields in messages:
                    yield AckableMessage(data=fields[b"data"], ack=partial(self._acknowledge, number))

    async def _acknowledge(self, number: bytes) -> None:
        """Acknowledge a message and delete it."""
        client: Any = Redis(connection_pool=self.connection_pool)
        async with client as redis, redis.pipeline() as pipeline:
            pipeline.xack(self.queue_name, self.consumer_group_name, number)
            pipeline.xdel(self.queue_name, number)
            await pipeline.execute()


broker = TaskBroker(
    shop.REDIS_URL,
    consumer_id="0",  # the default, "$", skips what was enqueued before the first worker started
    idle_timeout=int(os.environ.get("TASK_IDLE_MS", "600000")),  # longer than any task takes
).with_result_backend(RedisAsyncResultBackend(shop.REDIS_URL, result_ex_time=3600))


@broker.on_event(TaskiqEvents.WORKER_STARTUP)
async def connect(state: TaskiqState) -> None:
    """Connect the pair once per worker process, in the event loop that runs the tasks."""
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
    left: int | None = await unit.session.scalar(
        select(shop.Product.stock).where(shop.Product.name == product)
    )
    return left
