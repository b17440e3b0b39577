"""The quickstart keeps its promises on PostgreSQL under load."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager

import pytest
from httpx2 import AsyncClient, HTTPError
from sqlalchemy import AsyncAdaptedQueuePool

from examples.quickstart import create_app
from fastapi_async_sqlalchemy import db
from fastapi_async_sqlalchemy.testing import SandboxedApp
from tests.support.databases import Judge, JudgeFor
from tests.support.serving import asgi_client, serve

NAMES = ("alice", "bob", "carol")
CLIENTS = 20
UNTOUCHED = [("alice", 100), ("bob", 100), ("carol", 100)]

Acknowledged = asyncio.Queue[int]
"""The numbers of the transfers that clients were told of, as they are told."""


@asynccontextmanager
async def bank(url: str) -> AsyncGenerator[AsyncClient]:
    """Serve the quickstart by uvicorn and yield a client; all connections are back when the server stops."""
    async with AsyncClient(timeout=30) as client:
        async with serve(create_app(url)) as address:
            client.base_url = address.url
            yield client
        pool = db.engine.pool
        assert isinstance(pool, AsyncAdaptedQueuePool)
        assert pool.checkedout() == 0


async def transfer(client: AsyncClient, sender: str, receiver: str, amount: int) -> int | None:
    """Ask for a transfer: its number if the bank acknowledged it, None if it was refused."""
    order = {"sender": sender, "receiver": receiver, "amount": amount}
    response = await client.post("/transfers", json=order)
    if response.status_code == 409:
        return None
    assert response.status_code == 201, response.text
    number: int = response.json()
    return number


async def send_around(client: AsyncClient, turns: Iterable[int], acknowledged: Acknowledged) -> None:
    """Be one client: send money around, until the turns or the server come to an end."""
    for turn in turns:
        sender, receiver = NAMES[turn % 3], NAMES[(turn + 1 + turn // 3 % 2) % 3]
        try:
            number = await transfer(client, sender, receiver, 1 + turn * 7 % 40)
        except HTTPError:
            return
        if number is not None:
            acknowledged.put_nowait(number)


def take_all(acknowledged: Acknowledged) -> set[int]:
    """Return the numbers that were told so far and not taken yet."""
    return {acknowledged.get_nowait() for _ in range(acknowledged.qsize())}


async def assert_books_agree(judge: Judge, told: set[int]) -> None:
    """Assert that no money came or went, that transfers explain the balances, and that all told are kept."""
    assert await judge.scalar("SELECT sum(balance) FROM account") == 300
    unexplained = await judge.rows(
        "SELECT name FROM account WHERE balance <> 100"
        " + (SELECT coalesce(sum(amount), 0) FROM transfer WHERE receiver = name)"
        " - (SELECT coalesce(sum(amount), 0) FROM transfer WHERE sender = name)"
    )
    assert unexplained == []
    assert told <= {number for (number,) in await judge.rows("SELECT id FROM transfer")}


async def test_concurrent_writers_keep_the_sum(postgresql_url: str, judge_for: JudgeFor) -> None:
    """Twenty clients write at once: the acknowledged transfers are there, no other is, the sum stays."""
    acknowledged = Acknowledged()
    async with bank(postgresql_url) as client, asyncio.TaskGroup() as clients:
        for number in range(CLIENTS):
            clients.create_task(send_around(client, range(number, number + 10), acknowledged))
    told = take_all(acknowledged)
    assert len(told) > CLIENTS
    judge = await judge_for(postgresql_url)
    await assert_books_agree(judge, told)
    assert await judge.scalar("SELECT count(*) FROM transfer") == len(told)


async def test_refused_transfers_leave_nothing(postgresql_url: str, judge_for: JudgeFor) -> None:
    """COMMIT fails for an unknown receiver, a statement for an overdraft: 409, and nothing is written."""
    async with bank(postgresql_url) as client:
        assert await transfer(client, "alice", "zoe", 30) is None
        assert await transfer(client, "carol", "bob", 999) is None
        judge = await judge_for(postgresql_url)
        assert await judge.rows("SELECT name, balance FROM account ORDER BY name") == UNTOUCHED
        assert await judge.scalar("SELECT count(*) FROM transfer") == 0
        assert await transfer(client, "alice", "bob", 30) is not None


@pytest.mark.filterwarnings("ignore:(?s).*session.exec:DeprecationWarning")  # SQLModel, of its own execute()
async def test_sandboxed_bank_is_the_deployed_one(deferring_url: str, judge_for: JudgeFor) -> None:
    """In a sandbox COMMIT is refused as above, a transfer moves the money, and not even a table stays."""
    sandboxed = SandboxedApp(create_app(deferring_url), db)
    async with asgi_client(sandboxed) as client:
        assert await transfer(client, "alice", "zoe", 30) is None
        assert await transfer(client, "carol", "bob", 999) is None
        assert await transfer(client, "alice", "bob", 30) is not None
        sandboxed.box.fail_commit()
        assert await transfer(client, "alice", "bob", 30) is None
        accounts = (await client.get("/accounts")).json()
        assert {one["name"]: one["balance"] for one in accounts} == {"alice": 70, "bob": 130, "carol": 100}
    judge = await judge_for(deferring_url)
    tables = "sqlite_master" if "sqlite" in deferring_url else "pg_tables WHERE schemaname = 'public'"
    assert await judge.rows(f"SELECT * FROM {tables}") == []


async def test_acknowledged_transfers_survive_a_restart(postgresql_url: str, judge_for: JudgeFor) -> None:
    """The server stops in the middle of the load and starts again: all that it acknowledged is there."""
    acknowledged = Acknowledged()
    told: set[int] = set()
    judge = await judge_for(postgresql_url)
    for _ in range(2):
        async with asyncio.TaskGroup() as clients, bank(postgresql_url) as client:
            for number in range(CLIENTS):
                clients.create_task(send_around(client, itertools.count(number), acknowledged))
            told |= {await acknowledged.get() for _ in range(50)}
        told |= take_all(acknowledged)
        await assert_books_agree(judge, told)
    assert len(told) >= 100
