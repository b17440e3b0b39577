"""The outbox of the guide loses nothing, however often its relay dies, and repeats nothing undisturbed."""

import json
import re
from collections import Counter
from contextlib import AbstractContextManager
from typing import Any

import pytest
from httpx2 import AsyncClient

REASON = "requirements/guides.in is not in the lowest row"
pytest.importorskip("taskiq", reason=REASON)
pytest.importorskip("faststream_outbox", reason=REASON)

from fastapi_async_sqlalchemy import db
from tests.support.queues import PAUSED, Shop, Worker, Workers, until
from tests.support.serving import asgi_client

STREAM = "taskiq"
MESSAGES = 200
BATCH = 50


@pytest.fixture
async def orders(shop: Shop, redis: Any) -> list[int]:
    """The numbers of two hundred orders by the outbox, between some that COMMIT refused."""
    from examples.task_queues.app import create_app  # noqa: PLC0415  # it reads the environment

    numbers: list[int] = []
    async with asgi_client(create_app(shop.url)) as client:
        for _ in range(MESSAGES):
            numbers.append(await order(client, "pen"))
            if len(numbers) % 20 == 0:
                await order(client, "no such thing")
    return numbers


@pytest.fixture
def with_faststream(queue_url: str) -> Any:
    """The module of the tasks by faststream-outbox, which adds a table to the shop's."""
    from examples.task_queues import with_faststream  # noqa: PLC0415  # it reads the environment

    return with_faststream


async def order(client: AsyncClient, product: str) -> int:
    """Post an order; return its number, 0 for none."""
    response = await client.post("/orders/by-outbox", json={"product": product, "quantity": 1})
    assert response.status_code == (201 if product == "pen" else 409)
    return int(response.json()) if response.is_success else 0


def relay(workers: Workers) -> AbstractContextManager[Worker]:
    """Start a relay."""
    return workers.run("examples.task_queues.relay")


async def left(shop: Shop) -> object:
    """Return how many messages are in the outbox."""
    return await shop.judge.scalar("SELECT count(*) FROM outbox_message")


async def delivered(redis: Any) -> Counter[int]:
    """Return how often each order's task was enqueued."""
    return Counter(json.loads(entry[b"data"])["args"][0] for _, entry in await redis.xrange(STREAM))


@pytest.mark.slow
async def test_relay_that_is_killed(shop: Shop, redis: Any, workers: Workers, orders: list[int]) -> None:
    """A relay killed before, amid and after its sending loses nothing, and repeats one batch."""
    with relay(workers) as worker:
        async with shop.locked("LOCK TABLE outbox_message IN EXCLUSIVE MODE"):
            await until(shop.waiting)  # before it has read anything
            worker.kill()
    assert (await left(shop), await redis.xlen(STREAM)) == (MESSAGES, 0)

    with relay(workers) as worker:
        async with shop.locked("LOCK TABLE outbox_message IN SHARE MODE"):
            await until(shop.waiting)  # it has sent a batch, and cannot delete it
            worker.kill()
    assert (await left(shop), await redis.xlen(STREAM)) == (MESSAGES, BATCH)

    with relay(workers) as worker:
        async with shop.locked("LOCK TABLE outbox_message IN EXCLUSIVE MODE"):
            await until(shop.waiting)
            await redis.client_pause(PAUSED, all=False)
        await until(lambda: in_transaction(shop))  # it has the messages, and cannot send them
        worker.kill()
    await redis.client_unpause()
    assert (await left(shop), await redis.xlen(STREAM)) == (MESSAGES, BATCH)

    with relay(workers):
        await until(lambda: is_empty(shop))
    assert await delivered(redis) == Counter(orders) + Counter(orders[:BATCH])


async def in_transaction(shop: Shop) -> bool:
    """Whether a relay is in the middle of a batch."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = :state"
    return await shop.judge.scalar(query, state="idle in transaction") == 1


async def is_empty(shop: Shop) -> bool:
    """Whether each message has been relayed."""
    return await left(shop) == 0


async def test_relay_passes_by_what_is_locked(
    shop: Shop, redis: Any, workers: Workers, orders: list[int]
) -> None:
    """A message that somebody else has does not hold up the others."""
    first = "SELECT FROM outbox_message ORDER BY id LIMIT 1 FOR UPDATE"
    async with shop.locked(first) as lock:
        with relay(workers):
            await until(lambda: one_is_left(shop))
            assert await delivered(redis) == Counter(orders[1:])
            await lock.rollback()
            await until(lambda: is_empty(shop))
    assert await delivered(redis) == Counter(orders)


async def one_is_left(shop: Shop) -> bool:
    """Whether each message but one has been relayed."""
    return await left(shop) == 1


async def test_two_relays(shop: Shop, redis: Any, workers: Workers, orders: list[int]) -> None:
    """Two relays that begin at the same moment share the messages, and each message is enqueued once."""
    with relay(workers) as first, relay(workers) as second:
        async with shop.locked("LOCK TABLE outbox_message IN EXCLUSIVE MODE"):
            await until(lambda: shop.waiting_are(2))
        await until(lambda: is_empty(shop))
        counts = [int(re.findall(r"relayed (\d+)", worker.stop())[0]) for worker in (first, second)]
    assert await delivered(redis) == Counter(orders)
    assert sum(counts) == MESSAGES
    assert min(counts) > 0


@pytest.mark.filterwarnings("ignore:(?s).*session.exec:DeprecationWarning")  # SQLModel, of its own execute()
@pytest.mark.slow
async def test_faststream_outbox(with_faststream: Any, shop: Shop, workers: Workers) -> None:
    """A message is stored with its order, or not at all; its task is done once, though workers are killed."""
    from examples.task_queues.shop import Order  # noqa: PLC0415  # it reads the environment

    async with db.connect(shop.url):
        for is_kept in (True, False):
            async with db.begin() as unit:
                order = Order(product="pen", quantity=3)
                unit.session.add(order)
                await unit.session.flush()
                await with_faststream.enqueue(order.id)
                if not is_kept:
                    await unit.rollback()
    assert await shop.judge.scalar("SELECT count(*) FROM task_outbox") == 1

    command = "examples.task_queues.with_faststream"
    with workers.run(command, LEASE_SECONDS="1") as worker:
        async with shop.locked():
            await until(shop.waiting)
            worker.kill()
    assert (await shop.stock(), await shop.judge.scalar("SELECT count(*) FROM task_outbox")) == (1000, 1)
    with workers.run(command, LEASE_SECONDS="1") as worker:
        async with shop.locked() as lock:
            await until(shop.waiting)
            async with shop.locked("LOCK TABLE task_outbox IN SHARE MODE"):
                await lock.rollback()
                await until(shop.reserved)  # committed, while the message cannot be deleted
                worker.kill()
    assert (await shop.stock(), await shop.judge.scalar("SELECT count(*) FROM task_outbox")) == (997, 1)
    with workers.run(command, LEASE_SECONDS="1"):
        await until(lambda: is_done(shop))
    assert (await shop.stock(), await shop.reserved()) == (997, 1)


async def is_done(shop: Shop) -> bool:
    """Whether the message has been deleted."""
    return await shop.judge.scalar("SELECT count(*) FROM task_outbox") == 0
