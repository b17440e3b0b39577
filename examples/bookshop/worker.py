"""The queue and its worker: `taskiq worker examples.bookshop.worker:create_worker`.

A task only signals that the outbox has messages. If Redis loses a task, the messages wait a few seconds until
the next sweep; a duplicate task finds nothing to do.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

from attrs import define, field
from redis.exceptions import RedisError
from taskiq import AsyncBroker, TaskiqEvents, TaskiqState
from taskiq.kicker import AsyncKicker
from taskiq_redis import ListQueueBroker

from examples.bookshop.databases import engine_args, observers_of, reporting, shop
from examples.bookshop.deliveries import Deliveries
from examples.bookshop.orders import Wake
from examples.bookshop.outbox import drain
from examples.bookshop.settings import Settings
from examples.bookshop.telemetry import print_spans

QUEUE, TASK = "bookshop", "drain"

logger = logging.getLogger(__name__)


class PatientBroker(ListQueueBroker):
    """A broker that retries while Redis is unavailable; plain taskiq-redis 1.0 would end the process."""

    async def listen(self) -> AsyncGenerator[bytes, None]:
        """Yield the tasks."""
        while True:
            try:
                async for message in super().listen():
                    yield message
            except RedisError as error:
                logger.warning("Redis cannot be reached: %s", error)
            await asyncio.sleep(1)


def create_worker() -> AsyncBroker:
    """Create the worker's broker with the settings of the environment."""
    worker = Worker(Settings.from_environment())
    if worker.settings.telemetry:
        print_spans()
    broker = PatientBroker(worker.settings.redis_url, queue_name=QUEUE)

    @broker.task(task_name=TASK)
    async def empty() -> None:
        await worker.drain()

    broker.add_event_handler(TaskiqEvents.WORKER_STARTUP, worker.start)
    broker.add_event_handler(TaskiqEvents.WORKER_SHUTDOWN, worker.stop)
    return broker


@define
class Worker:
    """Empties the outbox when a task arrives, and every few seconds."""

    settings: Settings
    _exits: AsyncExitStack = field(factory=AsyncExitStack, init=False)

    async def start(self, _: TaskiqState) -> None:
        """Connect to the databases, and start the sweep."""
        settings, pool = self.settings, engine_args(self.settings.pool_size)
        observers = observers_of(settings)
        for connected in (
            shop.connect(settings.shop_url, engine_args=pool, observers=observers),
            reporting.connect(settings.reporting_url, engine_args=pool, observers=observers),
        ):
            await self._exits.enter_async_context(connected)
        self._exits.push_async_callback(cancel, asyncio.create_task(self.sweep(), name="sweep"))

    async def stop(self, _: TaskiqState) -> None:
        """Stop the sweep and close the connections; unfinished work is rolled back and retried later."""
        await self._exits.aclose()

    async def drain(self) -> None:
        """Deliver all messages that are due."""
        await drain(Deliveries(self.settings.mail_folder).deliver)

    async def sweep(self) -> None:
        """Regularly deliver messages that had no task or have failed before."""
        while True:
            try:
                await self.drain()
            except Exception:
                logger.exception("The outbox was not emptied")
            await asyncio.sleep(self.settings.sweep_seconds)


async def cancel(task: asyncio.Task[None]) -> None:
    """Cancel a task, and wait for its end."""
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


@asynccontextmanager
async def queue(redis_url: str) -> AsyncGenerator[Wake]:
    """Connect the sending end of the queue, and yield the function that makes a worker check the outbox.

    If Redis does not answer, it delays a response by a second at most.
    """
    broker = ListQueueBroker(redis_url, queue_name=QUEUE, socket_connect_timeout=1, socket_timeout=1)
    await broker.startup()

    async def wake() -> None:
        await AsyncKicker[[], None](task_name=TASK, broker=broker, labels={}).kiq()

    try:
        yield wake
    finally:
        await broker.shutdown()
