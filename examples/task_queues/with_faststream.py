"""The shop's tasks with faststream-outbox, no Redis: `python -m examples.task_queues.with_faststream`."""

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from faststream import FastStream
from faststream_outbox import ExponentialRetry, OutboxBroker, make_outbox_table
from sqlalchemy.ext.asyncio import create_async_engine

from examples.task_queues import shop
from fastapi_async_sqlalchemy import db

WORKERS = 4

engine = create_async_engine(shop.DATABASE_URL, pool_size=2 * WORKERS + 1)  # the broker keeps WORKERS + 1
broker = OutboxBroker(engine, outbox_table=make_outbox_table(shop.Base.metadata, "task_outbox"))


@broker.subscriber(
    "reserve",
    max_workers=WORKERS,
    lease_ttl_seconds=float(os.environ.get("LEASE_SECONDS", "60")),  # longer than any task takes
    retry_strategy=ExponentialRetry(initial_delay_seconds=1, max_delay_seconds=60, max_attempts=10),
)
@db.transactional(isolation_level="REPEATABLE READ", retries=9)
async def reserve(order_id: int) -> None:
    """Reserve an order in one unit of work, which is committed before the message is deleted."""
    await shop.reserve(order_id)


async def enqueue(order_id: int) -> None:
    """Store the message in the current transaction; PostgreSQL notifies the worker at COMMIT."""
    await broker.publish(order_id, queue="reserve", session=db.session)


@asynccontextmanager
async def lifespan() -> AsyncGenerator[None]:
    """Bind the broker's engine to the pair while the worker runs, and create the table of messages."""
    async with db.connect(engine):
        await db.create_all(shop.Base.metadata)
        yield
    await engine.dispose()


app = FastStream(broker, lifespan=lifespan)

if __name__ == "__main__":
    asyncio.run(app.run())
