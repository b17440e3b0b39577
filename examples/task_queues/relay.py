"""The relay of the outbox, which enqueues stored messages: `python -m examples.task_queues.relay`."""

import asyncio
import logging
import signal
from contextlib import suppress

from redis.exceptions import RedisError
from sqlalchemy import delete, select
from sqlalchemy.exc import DBAPIError

from examples.task_queues import shop
from examples.task_queues.with_taskiq import broker, reserve
from fastapi_async_sqlalchemy import db

BATCH = 50
"""How many messages one transaction takes; this many may be enqueued twice after a crash."""
PAUSE = 0.5
"""Seconds between two queries of an empty outbox."""

logger = logging.getLogger(__name__)


async def relay_batch() -> int:
    """Enqueue and delete the oldest messages that no other relay has locked; return how many."""
    message = shop.OutboxMessage
    oldest = select(message).order_by(message.id).limit(BATCH).with_for_update(skip_locked=True)
    async with db.begin() as unit:
        messages = (await unit.session.scalars(oldest)).all()
        for found in messages:
            await reserve.kicker().with_task_id(f"outbox-{found.id}").kiq(found.order_id)
        await unit.session.execute(delete(message).where(message.id.in_([found.id for found in messages])))
    return len(messages)


async def relay(stopping: asyncio.Event) -> int:
    """Relay messages until `stopping` is set; return how many."""
    total = 0
    while not stopping.is_set():
        try:
            count = await relay_batch()
        except (RedisError, DBAPIError, OSError):
            logger.exception("The batch is rolled back and will be retried.")
            count = 0
        total += count
        if not count:
            with suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), PAUSE)
    return total


async def main() -> None:
    """Relay until SIGTERM or Ctrl-C, and finish the current batch."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    await broker.startup()
    async with db.connect(shop.DATABASE_URL, engine_args={"pool_size": 1}):
        logger.info("relayed %d", await relay(stopping))
    await broker.shutdown()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    asyncio.run(main())
