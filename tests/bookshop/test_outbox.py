"""The outbox of the bookshop: each message is delivered, and what comes twice changes nothing."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from os import killpg

import pytest
from httpx2 import AsyncClient
from sqlalchemy import URL, NullPool

pytest.importorskip("alembic", reason="requirements/guides.in is not in the lowest row")

from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from examples.bookshop.app import create_app
from examples.bookshop.databases import reporting, shop
from examples.bookshop.deliveries import Deliveries
from examples.bookshop.models import Message, Order
from examples.bookshop.outbox import drain
from examples.bookshop.settings import Settings
from tests.support.bookshop import ISBN, OTHER, PATIENCE, fill, migrated, order, worker
from tests.support.databases import JudgeFor
from tests.support.serving import asgi_client

SOLD = [{"title": "Pride and Prejudice", "copies": 2, "cents": 1598}]


@pytest.fixture
def settings(
    postgresql_server: URL, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Settings]:
    """The settings of a shop that is there, and of a Redis."""
    with migrated(postgresql_server, tmp_path_factory.mktemp("mail"), redis_url) as settings:
        yield settings


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[AsyncClient]:
    """A client of the shop, which has ten copies of each title."""
    async with asgi_client(create_app(settings)) as client:
        await fill(10)
        yield client


def mails(settings: Settings) -> list[str]:
    """Return the text of all mails that were sent."""
    return [mail.read_text() for mail in sorted(settings.mail_folder.iterdir())]


async def test_message_is_delivered(client: AsyncClient, settings: Settings) -> None:
    """A confirmation is sent, the sale is counted, the outbox is empty; once more counts nothing twice."""
    await order(client, {ISBN: 2})
    kept: list[tuple[Message, Order]] = []

    async def deliver(message: Message, placed: Order) -> None:
        kept.append((message, placed))
        await Deliveries(settings.mail_folder).deliver(message, placed)

    assert await drain(deliver) == 2
    assert await drain(deliver) == 0
    for message, placed in kept:
        await Deliveries(settings.mail_folder).deliver(message, placed)
    [mail] = mails(settings)
    assert "To: ann@example.com" in mail
    assert "2 x Pride and Prejudice: 15.98" in mail
    assert (await client.get("/reports/sales")).json() == SOLD


async def test_message_that_another_worker_has(client: AsyncClient, settings: Settings) -> None:
    """A message that another worker has locked is passed by, and the next one is delivered."""
    await order(client, {ISBN: 2})
    deliver = Deliveries(settings.mail_folder).deliver
    async with create_async_engine(settings.shop_url, poolclass=NullPool).connect() as other:
        await other.execute(text("SELECT FROM outbox ORDER BY due_at, id LIMIT 1 FOR UPDATE"))
        async with asyncio.timeout(PATIENCE):
            assert await drain(deliver) == 1
    assert await drain(deliver) == 1


async def test_message_that_fails_waits(client: AsyncClient, settings: Settings, judge_for: JudgeFor) -> None:
    """A message that cannot be delivered is tried again later, and the others are not held up."""
    await order(client, {ISBN: 2})

    async def deliver(message: Message, placed: Order) -> None:
        if message.kind == "confirmation":
            message_of_the_server = "no mail server answers"
            raise ConnectionError(message_of_the_server)
        await Deliveries(settings.mail_folder).deliver(message, placed)

    assert await drain(deliver) == 2
    judge = await judge_for(settings.shop_url.render_as_string(hide_password=False))
    left = await judge.rows("SELECT kind, attempts, due_at > now(), last_error FROM outbox")
    assert left == [("confirmation", 1, True, "ConnectionError: no mail server answers")]
    await judge.execute("UPDATE outbox SET due_at = now()")
    assert await drain(Deliveries(settings.mail_folder).deliver) == 1
    assert len(mails(settings)) == 1
    assert (await client.get("/reports/sales")).json() == SOLD


async def test_reports_that_are_down(settings: Settings) -> None:
    """Without the reporting database orders are placed, and their sales wait in the outbox."""
    nowhere = settings.reporting_url.set(host="127.0.0.1", port=1, query={})
    async with asgi_client(create_app(settings.model_copy(update={"reporting_url": nowhere}))) as client:
        await fill(10)
        assert (await order(client, {ISBN: 1})).status_code == 201
        assert (await client.get("/reports/sales")).status_code == 503
        assert (await client.get("/health/ready")).status_code == 503
        assert await drain(Deliveries(settings.mail_folder).deliver) == 2
        assert len(mails(settings)) == 1
        async with shop() as unit:
            left = await unit.session.scalars(text("SELECT kind FROM outbox"))
            assert left.all() == ["sale"]


async def test_worker_without_redis(settings: Settings, judge_for: JudgeFor) -> None:
    """Without Redis an order is placed, and the sweep of a worker delivers its messages."""
    without = settings.model_copy(update={"redis_url": "redis://127.0.0.1:1", "sweep_seconds": 1})
    judge = await judge_for(settings.shop_url.render_as_string(hide_password=False))
    async with asgi_client(create_app(without)) as client, worker(without) as process:
        await fill(1)
        assert (await order(client, {ISBN: 1})).status_code == 201
        while await judge.scalar("SELECT count(*) FROM outbox"):
            assert process.returncode is None
        assert len(mails(settings)) == 1


@pytest.mark.slow
async def test_killed_worker_loses_nothing(
    client: AsyncClient, settings: Settings, judge_for: JudgeFor
) -> None:
    """A worker is killed in the middle of a message; the next one delivers it, and what it is told by Redis.

    The first one waits for a locked table when it is killed. The second one sweeps once, when it starts.
    """
    judge = await judge_for(settings.shop_url.render_as_string(hide_password=False))
    engine = create_async_engine(settings.shop_url, poolclass=NullPool)
    await order(client, {ISBN: 2})
    async with engine.connect() as locking, worker(settings) as killed:
        await locking.execute(text("LOCK TABLE order_line IN ACCESS EXCLUSIVE MODE"))
        while not await judge.scalar("SELECT count(*) FROM pg_locks WHERE NOT granted"):
            assert killed.returncode is None
        assert await judge.scalar("SELECT count(*) FROM outbox") == 2
        killpg(killed.pid, signal.SIGKILL)
        await killed.wait()
    assert mails(settings) == []
    async with worker(settings) as process:
        while await judge.scalar("SELECT count(*) FROM outbox"):
            assert process.returncode is None
        assert len(mails(settings)) == 1
        await order(client, {OTHER: 1}, customer="bob@example.com")
        while await judge.scalar("SELECT count(*) FROM outbox"):
            assert process.returncode is None
        process.terminate()
        assert await process.wait() == 0
    assert ["To: bob@example.com" in mail for mail in mails(settings)] == [False, True]
    async with reporting() as unit:
        assert await unit.session.scalar(text("SELECT count(*) FROM sale")) == 2
