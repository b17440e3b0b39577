"""The bookshop on real databases: customers who come at the same time, and a pool that is full."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from uuid import uuid4

import pytest
from httpx2 import AsyncClient
from sqlalchemy import URL

pytest.importorskip("alembic", reason="requirements/guides.in is not in the lowest row")

from examples.bookshop.app import create_app
from examples.bookshop.databases import replica, reporting, shop
from examples.bookshop.settings import Settings
from tests.support.bookshop import ISBN, OTHER, fill, migrated, order, stock_of
from tests.support.databases import JudgeFor
from tests.support.serving import serve
from tests.support.site import checked_out

CUSTOMERS = 20


async def wake() -> None:
    """Tell nobody: no worker runs."""


@pytest.fixture
def settings(postgresql_server: URL, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """The settings of a shop that is there."""
    with migrated(postgresql_server, tmp_path_factory.mktemp("mail")) as settings:
        yield settings


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[AsyncClient]:
    """A client of the shop, which has five copies of each title; no connection is out at its end."""
    async with AsyncClient(timeout=30) as client:
        async with serve(create_app(settings, wake=wake)) as address:
            await fill(5)
            client.base_url = address.url
            yield client
        assert [checked_out(pair.engine.pool) for pair in (shop, replica, reporting)] == [0, 0, 0]


async def test_last_copies(client: AsyncClient, settings: Settings, judge_for: JudgeFor) -> None:
    """Twenty customers want the last five copies: five have an order, and the others are told."""
    names = [f"{number}@example.com" for number in range(CUSTOMERS)]
    answers = await asyncio.gather(*(order(client, {ISBN: 1, OTHER: 1}, customer=name) for name in names))
    assert sorted(answer.status_code for answer in answers) == [201] * 5 + [409] * 15
    assert await stock_of(client, ISBN) == 0
    judge = await judge_for(settings.shop_url.render_as_string(hide_password=False))
    told = sorted(answer.json()["id"] for answer in answers if answer.status_code == 201)
    kept = await judge.rows("SELECT id FROM orders ORDER BY id")
    assert [number for (number,) in kept] == told
    assert await judge.scalar("SELECT count(*) FROM outbox") == 10


async def test_order_that_is_sent_at_once(client: AsyncClient) -> None:
    """A client that sends the same order five times at the same time has it once."""
    key = uuid4()
    answers = await asyncio.gather(*(order(client, {ISBN: 1}, key=key) for _ in range(5)))
    assert len({answer.text for answer in answers if answer.status_code == 201}) == 1
    assert {answer.status_code for answer in answers} <= {201, 409}
    assert await stock_of(client, ISBN) == 4


async def test_pool_that_is_full(settings: Settings) -> None:
    """Who gets no connection is told when to come back; the shop is alive, and not ready."""
    async with (
        serve(create_app(settings.model_copy(update={"pool_size": 1}), wake=wake)) as address,
        AsyncClient(base_url=address.url, timeout=30) as client,
        shop.connection(),
    ):
        ready = await client.get("/health/ready")
        assert (ready.status_code, ready.json()["detail"]) == (503, "the pool is full")
        assert (await client.get("/health/live")).status_code == 200
        busy = await order(client, {ISBN: 1})
        assert (busy.status_code, busy.headers["Retry-After"]) == (503, "3")
