"""The shop's tasks with Celery: `celery -A examples.task_queues.with_celery worker --concurrency 2`."""

# Celery has no types:
# mypy: disable-error-code="import-untyped, untyped-decorator"
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUntypedFunctionDecorator=false

import os
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import ParamSpec, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal
from celery import Celery
from celery.signals import worker_process_init, worker_process_shutdown

from examples.task_queues import shop
from fastapi_async_sqlalchemy import db

P = ParamSpec("P")
R = TypeVar("R")

app = Celery("shop", broker=shop.REDIS_URL)
app.conf.update(
    task_acks_late=True,  # acknowledge after the task, not before it
    task_reject_on_worker_lost=True,  # requeue the task of a process that was killed
    worker_prefetch_multiplier=1,
    broker_transport_options={"visibility_timeout": int(os.environ.get("VISIBILITY_TIMEOUT", "3600"))},
)


class WorkerLoop:
    """A worker process's only event loop, which runs in a thread; the engine belongs to it."""

    def __init__(self) -> None:
        self._resources = ExitStack()
        self._portal: BlockingPortal

    def start(self, **_: object) -> None:
        """Start the loop and connect the pair, after the fork so that processes share no connection."""
        self._portal = self._resources.enter_context(start_blocking_portal())
        connected = db.connect(shop.DATABASE_URL, engine_args={"pool_size": 1})
        self._resources.enter_context(self._portal.wrap_async_context_manager(connected))

    def stop(self, **_: object) -> None:
        """Dispose the engine and end the loop."""
        self._resources.close()

    def run(self, function: Callable[P, Awaitable[R]], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a coroutine function in the loop; cancel it if a time limit interrupts the wait."""
        future = self._portal.start_task_soon(lambda: function(*args, **kwargs))
        try:
            return future.result()
        except BaseException:
            future.cancel()  # this rolls back, unless the function has ended
            raise


loop = WorkerLoop()
worker_process_init.connect(loop.start)
worker_process_shutdown.connect(loop.stop)


@db.transactional(isolation_level="REPEATABLE READ", retries=9)
async def reserve_in_unit(order_id: int) -> bool:
    """Reserve an order in one unit of work."""
    return await shop.reserve(order_id)


@app.task(soft_time_limit=60, time_limit=90)
def reserve(order_id: int) -> bool:
    """Reserve an order; its unit is committed before the message is acknowledged."""
    return loop.run(reserve_in_unit, order_id)
