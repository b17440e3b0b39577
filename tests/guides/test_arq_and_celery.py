"""The guide's workers of arq and Celery do each task once, although they are killed in the middle of it."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

REASON = "requirements/guides.in is not in the lowest row"
pytest.importorskip("arq", reason=REASON)
pytest.importorskip("celery", reason=REASON)

from arq import ArqRedis, create_pool

from tests.support.queues import PAUSED, Shop, Worker, Workers, until


@pytest.fixture
async def queue(redis: Any) -> AsyncIterator[ArqRedis]:
    """The queue of arq."""
    from examples.task_queues.with_arq import REDIS  # noqa: PLC0415  # it reads the environment

    queue = await create_pool(REDIS)
    yield queue
    await queue.aclose()


def arq_worker(workers: Workers) -> AbstractContextManager[Worker]:
    """Start a worker of arq."""
    return workers.run("arq", "examples.task_queues.with_arq.WorkerSettings")


@pytest.mark.slow
async def test_arq_job_whose_worker_is_killed(
    shop: Shop, redis: Any, queue: ArqRedis, workers: Workers
) -> None:
    """A job is enqueued once for each order, and runs again after a crash, when its time is over."""
    from examples.task_queues.with_arq import enqueue  # noqa: PLC0415  # it reads the environment

    order = await shop.order(3)
    await enqueue(queue, order)
    await enqueue(queue, order)
    assert await redis.zcard("arq:queue") == 1
    with arq_worker(workers) as worker:
        async with shop.locked():
            await until(shop.waiting)
            worker.kill()
        assert (await shop.stock(), await shop.reserved()) == (1000, 0)
    key = f"arq:in-progress:reserve-{order}"
    assert 60_000 < await redis.pttl(key) <= 70_000  # the job's time and ten seconds more
    await redis.delete(key)  # so much time passes
    with arq_worker(workers) as worker:
        async with shop.locked():
            await until(shop.waiting)
            await redis.client_pause(PAUSED, all=False)
        await until(shop.reserved)  # committed, while the job cannot be removed
        worker.kill()
        await redis.client_unpause()
    await redis.delete(key)
    with arq_worker(workers):
        await until(lambda: redis.exists(f"arq:result:reserve-{order}"))
    assert (await shop.stock(), await shop.reserved()) == (997, 1)


async def test_arq_repeats_conflicts(shop: Shop, redis: Any, queue: ArqRedis, workers: Workers) -> None:
    """Jobs that change the same row at a time lose no change."""
    from examples.task_queues.with_arq import enqueue  # noqa: PLC0415  # it reads the environment

    orders = [await shop.order() for _ in range(5)]
    with arq_worker(workers):
        async with shop.locked():
            for order in orders:
                await enqueue(queue, order)
            await until(lambda: shop.waiting_are(5))
        await until(lambda: shop.reserved_are(5))
    assert await shop.stock() == 995


@pytest.fixture
def celery(queue_url: str) -> Iterator[Any]:
    """The module of the tasks by Celery."""
    from examples.task_queues import with_celery  # noqa: PLC0415  # it reads the environment

    yield with_celery
    with_celery.app.close()


def celery_worker(workers: Workers, *, visibility: int = 3600) -> AbstractContextManager[Worker]:
    """Start a worker of Celery with two processes, which takes over what is not acknowledged for so long."""
    command = (
        "celery",
        "-A",
        "examples.task_queues.with_celery",
        "worker",
        "-c",
        "2",
        "-l",
        "INFO",
        "--without-mingle",
    )
    return workers.run(*command, VISIBILITY_TIMEOUT=f"{visibility}")


def kill_children(worker: Worker) -> None:
    """Kill the processes of the pool, and not the one that watches over them."""
    pid = worker.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert len(children) >= 2
    for child in children:
        os.kill(int(child), signal.SIGKILL)


@pytest.mark.slow
async def test_celery_task_whose_process_is_killed(
    shop: Shop, redis: Any, celery: Any, workers: Workers
) -> None:
    """Two processes work at a time, each by its own engine; a killed one's task is done by the next."""
    orders = [await shop.order() for _ in range(2)]
    with celery_worker(workers) as worker:
        async with shop.locked():
            for order in orders:
                await asyncio.to_thread(celery.reserve.delay, order)
            await until(lambda: shop.waiting_are(2))
            kill_children(worker)
        await until(lambda: shop.reserved_are(2))
    assert await shop.stock() == 998


@pytest.mark.slow
async def test_celery_task_that_is_not_acknowledged(
    shop: Shop, redis: Any, celery: Any, workers: Workers
) -> None:
    """A task past its time limit is rolled back; one whose worker dies after COMMIT has no second effect."""
    late, order = await shop.order(), await shop.order(3)
    with celery_worker(workers) as worker:
        async with shop.locked():
            await asyncio.to_thread(celery.reserve.apply_async, (late,), soft_time_limit=1)
            await until(lambda: worker.says("raised unexpected: SoftTimeLimitExceeded"))
        await until(lambda: shop.waiting_are(0))
        async with shop.locked():
            await asyncio.to_thread(celery.reserve.delay, order)
            await until(shop.waiting)
            await redis.client_pause(PAUSED, all=False)
        await until(shop.reserved)  # committed, while the acknowledgement waits
        worker.kill()
        await redis.client_unpause()
    with celery_worker(workers, visibility=1) as worker:
        await until(lambda: worker.says("succeeded in .*: False"))
    assert (await shop.stock(), await shop.reserved()) == (997, 1)
