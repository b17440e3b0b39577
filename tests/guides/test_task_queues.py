"""The guide to task queues is true: its workers run, and are killed at the worst moments."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from subprocess import PIPE
from typing import Any

import pytest
from fastapi import FastAPI
from httpx2 import AsyncClient
from sqlalchemy.exc import NoResultFound

REASON = "requirements/guides.in is not in the lowest row"
pytest.importorskip("taskiq", reason=REASON)

from redis.asyncio import Redis

from fastapi_async_sqlalchemy import SQLAlchemyMiddleware
from tests.support.databases import JudgeFor
from tests.support.queues import PATIENCE, PAUSED, ROOT, Shop, Worker, Workers, until
from tests.support.redis import own_redis
from tests.support.serving import asgi_client

STREAM = "taskiq"
PEN: dict[str, str | int] = {"product": "pen", "quantity": 3}


@pytest.fixture
async def client(shop: Shop, redis: Any) -> AsyncIterator[AsyncClient]:
    """A client of the application."""
    from examples.task_queues.app import create_app  # noqa: PLC0415  # it reads the environment

    async with asgi_client(create_app(shop.url)) as client:
        yield client


@pytest.fixture
async def taskiq(redis: Any) -> AsyncIterator[Any]:
    """The module of the tasks, with its broker started."""
    from examples.task_queues import with_taskiq  # noqa: PLC0415  # it reads the environment

    await with_taskiq.broker.startup()
    yield with_taskiq
    await with_taskiq.broker.shutdown()


def taskiq_worker(workers: Workers, *, idle_ms: int = 600_000) -> AbstractContextManager[Worker]:
    """Start a worker of TaskIQ that takes over what nobody has acknowledged for so long."""
    broker = "examples.task_queues.with_taskiq:broker"
    return workers.run("taskiq", "worker", broker, "--workers", "1", TASK_IDLE_MS=f"{idle_ms}")


async def acknowledged(redis: Any) -> bool:
    """Whether TaskIQ's workers have acknowledged each message, and so deleted it."""
    return bool(await redis.xlen(STREAM) == 0)


@pytest.mark.slow
async def test_taskiq_task_whose_worker_is_killed(
    shop: Shop, redis: Any, taskiq: Any, workers: Workers
) -> None:
    """A task whose worker dies before COMMIT has done nothing, and the next worker does it."""
    order = await shop.order(3)
    with taskiq_worker(workers) as worker:
        async with shop.locked():
            await taskiq.reserve.kiq(order)
            await until(shop.waiting)
            worker.kill()
        assert await shop.stock() == 1000
        with taskiq_worker(workers, idle_ms=500):
            await until(lambda: acknowledged(redis))
    assert (await shop.stock(), await shop.reserved()) == (997, 1)


@pytest.mark.slow
async def test_taskiq_task_that_is_not_acknowledged(
    shop: Shop, redis: Any, taskiq: Any, workers: Workers
) -> None:
    """A task whose worker dies after COMMIT runs again, and its idempotency key prevents a second effect."""
    order = await shop.order(3)
    with taskiq_worker(workers) as worker:
        async with shop.locked():
            task = await taskiq.reserve.kiq(order)
            await until(shop.waiting)
            await redis.client_pause(PAUSED, all=False)
        await until(shop.reserved)  # committed, while the result and the acknowledgement wait
        worker.kill()
        await redis.client_unpause()
        assert not await acknowledged(redis)
        with taskiq_worker(workers, idle_ms=500):
            await until(lambda: acknowledged(redis))
            assert (await task.wait_result(timeout=PATIENCE)).return_value is False
    assert (await shop.stock(), await shop.reserved()) == (997, 1)


async def test_taskiq_repeats_conflicts(shop: Shop, redis: Any, taskiq: Any, workers: Workers) -> None:
    """Tasks that change the same row at a time all succeed; a dependency's unit reads what they wrote."""
    orders = [await shop.order() for _ in range(5)]
    with taskiq_worker(workers):
        async with shop.locked():
            tasks = [await taskiq.reserve.kiq(order) for order in orders]
            await until(lambda: shop.waiting_are(5))
        results = [await task.wait_result(timeout=PATIENCE) for task in tasks]
        assert [result.return_value for result in results] == [True] * 5
        left = await taskiq.stock.kiq("pen")
        assert (await left.wait_result(timeout=PATIENCE)).return_value == 995


@pytest.mark.parametrize("times", [1, 2])
async def test_tables_are_created(
    postgresql_url: str, judge_for: JudgeFor, workers: Workers, times: int
) -> None:
    """The command makes the tables and fills the stock, and a second time it changes nothing."""
    judge = await judge_for(postgresql_url)
    for _ in range(times):
        with workers.run("examples.task_queues.tables") as command:
            assert command.process.wait(PATIENCE) == 0, command.log.read_text()
    assert await judge.rows("SELECT name, stock FROM product") == [("pen", 1000)]
    assert await judge.scalar('SELECT count(*) FROM "order"') == 0


async def test_enqueued_after_commit(shop: Shop, redis: Any, client: AsyncClient, workers: Workers) -> None:
    """Nothing is enqueued while COMMIT is under way; the worker that gets the task finds the order."""
    async with shop.locked() as lock, asyncio.TaskGroup() as requests:
        request = requests.create_task(client.post("/orders", json=PEN))
        await until(shop.waiting)  # COMMIT checks the product
        assert await redis.xlen(STREAM) == 0
        await lock.rollback()
    assert request.result().status_code == 201
    assert await redis.xlen(STREAM) == 1
    with taskiq_worker(workers):
        await until(lambda: acknowledged(redis))
    assert (await shop.stock(), await shop.reserved()) == (997, 1)


@pytest.mark.parametrize("path", ["/orders", "/orders/by-outbox"])
async def test_failed_commit_enqueues_nothing(shop: Shop, redis: Any, client: AsyncClient, path: str) -> None:
    """An order that COMMIT refuses leaves no task, neither in the queue nor in the outbox."""
    response = await client.post(path, json={"product": "no such thing", "quantity": 1})
    assert response.status_code == 409
    assert await redis.xlen(STREAM) == 0
    assert await shop.judge.scalar("SELECT count(*) FROM outbox_message") == 0


async def test_enqueued_before_commit(shop: Shop, taskiq: Any, workers: Workers) -> None:
    """A task that the route enqueues itself runs before COMMIT, and does not find the order."""
    from examples.task_queues.app import NewOrder, store  # noqa: PLC0415  # it reads the environment

    app = FastAPI()
    app.add_middleware(SQLAlchemyMiddleware, db_url=shop.url, commit_on_exit=True)

    @app.post("/orders", status_code=201)
    async def order(product: str, quantity: int) -> str:
        task = await taskiq.reserve.kiq(await store(NewOrder(product=product, quantity=quantity)))
        result = await task.wait_result(timeout=PATIENCE)
        return type(result.error).__name__

    with taskiq_worker(workers):
        async with asgi_client(app) as client:
            response = await client.post("/orders", params=PEN)
    assert (response.status_code, response.json()) == (201, NoResultFound.__name__)
    assert await shop.judge.rows('SELECT state FROM "order"') == [("new",)]


ENQUEUES = """
import asyncio, os
from redis.asyncio import Redis
from examples.task_queues import shop, with_taskiq
from fastapi_async_sqlalchemy import db

async def lose_queue():
    async with Redis.from_url(shop.REDIS_URL) as redis:
        await redis.shutdown(nosave=True)

async def main():
    await with_taskiq.broker.startup()
    async with db.connect(shop.DATABASE_URL), db.begin() as unit:
        unit.on_commit({first})
        unit.on_commit(lambda: with_taskiq.reserve.kiq(1))
        unit.session.add(shop.Order(product="pen", quantity=3))

asyncio.run(main())
"""


@pytest.mark.parametrize(("first", "status"), [("lambda: os._exit(7)", 7), ("lose_queue", 0)])
async def test_task_that_its_hook_loses(shop: Shop, workers: Workers, first: str, status: int) -> None:
    """A process or a queue that dies between COMMIT and the hook leaves an order without its task."""
    with own_redis() as url:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", ENQUEUES.replace("{first}", first)),
            cwd=ROOT,
            env={**os.environ, **workers.environment, "REDIS_URL": url},
            stderr=PIPE,
        )
        _, errors = await process.communicate()
        if process.returncode:  # the queue is there
            client: Any = Redis.from_url(url)  # pyright: ignore[reportUnknownMemberType]  # its types have gaps
            async with client as redis:
                assert await redis.xlen(STREAM) == 0
        else:
            assert b"ConnectionError" in errors
    assert process.returncode == status
    assert await shop.judge.rows('SELECT state FROM "order"') == [("new",)]
