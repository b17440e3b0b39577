"""A standby is promoted while an application writes: what fails, what recovers, and what is kept."""

import asyncio
import itertools
import socket
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from time import monotonic
from typing import Any, TypeAlias, cast

import pytest
from attrs import Factory, define
from fastapi import FastAPI
from httpx2 import AsyncClient
from sqlalchemy import insert as insertion
from sqlalchemy import make_url, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from fastapi_async_sqlalchemy import SessionProxy, create_middleware_and_session_proxy
from tests.support.databases import Judge
from tests.support.replication import (
    Server,
    caught_up,
    documented,
    hot_standby,
    primary_server,
    replicate_synchronously,
)
from tests.support.serving import asgi_client
from tests.support.site import checked_out
from tests.support.tables import Note, create_tables

CLIENTS = 10
POOL_SIZE = 5
LONG = 20.0
"""Seconds to wait for what will happen."""
ROUND = 100
"""How many acknowledged writes are waited for before the failover, and again after it."""
BETWEEN_TRIES = 0.01
"""Seconds that a client waits after an error; one that did not would take the machine from the servers."""


NO_PRIMARY = "None of the hosts match the target attribute requirement"
"""What asyncpg says where no host will do; the error's class is asyncpg's own before SQLAlchemy 2.1."""

Servers: TypeAlias = tuple[Server, Server]
"""A primary and its standby."""


@pytest.fixture(scope="module")
def lasting_pair() -> Iterator[Servers]:
    """A primary and a standby for the tests that leave them as they are."""
    with primary_server() as primary, hot_standby(primary) as standby:
        yield primary, standby


@pytest.fixture
def pair(lasting_pair: Servers) -> Iterator[Servers]:
    """A primary and a standby of the test's own, which it may stop and promote."""
    origin, _ = lasting_pair
    with hot_standby(origin) as primary:  # a copy takes less time than a new one
        primary.promote()
        with hot_standby(primary) as standby:
            yield primary, standby


@define(eq=False)
class Load:
    """Clients that write one note after another, whatever the answer, and know what they were told."""

    client: AsyncClient
    statuses: Counter[int] = Factory(Counter[int])
    acknowledged: set[str] = Factory(set[str])
    _told: asyncio.Queue[str] = Factory(asyncio.Queue[str])
    _ended: bool = False

    async def _run(self, name: int) -> None:
        for number in itertools.count():
            if self._ended:
                return
            note = f"{name}-{number}"
            response = await self.client.post(f"/notes/{note}")
            self.statuses[response.status_code] += 1
            if response.status_code == 201:
                self.acknowledged.add(note)
                self._told.put_nowait(note)
            else:
                await asyncio.sleep(BETWEEN_TRIES)

    async def more(self, count: int) -> None:
        """Wait until so many more writes are acknowledged than were when this was called."""
        while not self._told.empty():
            self._told.get_nowait()
        for _ in range(count):
            await self._told.get()

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Run the clients; on exit each hears the answer to its last request."""
        async with asyncio.TaskGroup() as clients:
            for name in range(CLIENTS):
                clients.create_task(self._run(name))
            yield
            self._ended = True


@define(eq=False)
class Shop:
    """An application on the documented DSN."""

    app: FastAPI
    db: SessionProxy[AsyncSession]
    flushed: asyncio.Event = Factory(asyncio.Event)
    """Set when `/held` has written and not committed."""
    released: asyncio.Event = Factory(asyncio.Event)
    """What `/held` waits for then."""

    def client(self) -> AbstractAsyncContextManager[AsyncClient]:
        """Call the application in process; its errors are answered by 500."""
        return asgi_client(self.app, raise_app_exceptions=False)

    def checked_out(self) -> int:
        """Return how many connections are out of the pool."""
        return checked_out(self.db.engine.pool)


def open_shop(servers: Servers) -> Shop:
    """Make the application for these two servers, with the settings that the documentation shows."""
    settings = documented(*servers)
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    shop = Shop(FastAPI(), db)
    shop.app.add_middleware(
        cast("Any", middleware),
        db_url=settings.primary,
        engine_args={**settings.engine_args, "pool_size": POOL_SIZE},
        commit_on_exit=True,
    )

    @shop.app.post("/notes/{note}", status_code=201)
    async def write(note: str) -> None:
        db.session.add(Note(text=note))

    @shop.app.post("/held/{note}", status_code=201)
    async def write_and_wait(note: str) -> None:
        db.session.add(Note(text=note))
        await db.session.flush()
        shop.flushed.set()
        await shop.released.wait()

    @shop.app.post("/slow/{note}", status_code=201)
    async def write_slowly(note: str) -> None:
        db.session.add(Note(text=note))
        await db.session.flush()
        await db.session.execute(text("SELECT pg_sleep(50)"))

    return shop


async def notes(server: Server) -> set[object]:
    """Return what is committed there."""
    async with Judge(server.url) as judge:
        return {note for (note,) in await judge.rows("SELECT text FROM note")}


async def waiting(server: Server, event: str) -> None:
    """Wait until a session of the server waits for an event."""
    async with Judge(server.url) as judge:
        listed = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = :event"
        while not await judge.scalar(listed, event=event):
            pass


async def agree(primary: Server, standby: Server) -> None:
    """Wait until the standby has all that the primary has."""
    async with Judge(primary.url) as written, Judge(standby.url) as replayed:
        await caught_up(written, replayed)


async def fail_over(primary: Server, standby: Server) -> None:
    """Let the primary crash, and promote the standby."""
    await asyncio.to_thread(primary.stop, "immediate")
    await asyncio.to_thread(standby.promote)


async def test_promotion_under_load(pair: Servers) -> None:
    """What is in flight fails, later requests reach the new primary, and no acknowledged write is lost."""
    primary, standby = pair
    await replicate_synchronously(primary)
    shop = open_shop(pair)
    async with shop.client() as client:
        await create_tables(shop.db.engine)
        load = Load(client)
        async with load.running():
            await load.more(ROUND)
            held = asyncio.create_task(client.post("/held/held"))
            slow = asyncio.create_task(client.post("/slow/slow"))
            await shop.flushed.wait()
            await waiting(primary, "PgSleep")
            told_before = len(load.acknowledged)
            stopped = monotonic()
            await asyncio.to_thread(primary.stop, "immediate")
            shop.released.set()
            assert [(await held).status_code, (await slow).status_code] == [500, 500]
            begun = monotonic()
            promotion = asyncio.create_task(asyncio.to_thread(standby.promote))
            await load.more(1)
            first = monotonic()
            await promotion
            await load.more(ROUND)
        assert shop.checked_out() == 0
    rows = await notes(standby)
    assert load.acknowledged - rows == set()
    assert rows & {"held", "slow"} == set()
    assert set(load.statuses) == {201, 500}
    print(  # noqa: T201  # to quote; pytest -rP shows it
        f"failed {load.statuses[500] + 2}, succeeded {load.statuses[201]} ({told_before} before), "
        f"acknowledged rows lost {len(load.acknowledged - rows)}, "
        f"unacknowledged rows there {len(rows - load.acknowledged)}; "
        f"first success {first - begun:.3f} s after pg_ctl promote was called, "
        f"{first - stopped:.3f} s after the primary was stopped"
    )


async def test_asynchronous_replication_loses_acknowledged_writes(pair: Servers) -> None:
    """What the standby had not received is lost, though its client was told, and its position is reached."""
    primary, standby = pair
    shop = open_shop(pair)
    _, replica = create_middleware_and_session_proxy(AsyncSession, read_only=True)
    async with shop.client() as client, replica.connect(documented(*pair).replica):
        await create_tables(shop.db.engine)
        assert (await client.post("/notes/received")).status_code == 201
        await agree(primary, standby)
        await asyncio.to_thread(standby.stop)
        assert (await client.post("/notes/lost")).status_code == 201
        lost = await shop.db.commit_position()
        await asyncio.to_thread(primary.stop, "immediate")
        await asyncio.to_thread(standby.start)
        await asyncio.to_thread(standby.promote)
        assert (await client.post("/notes/later")).status_code == 201
        async with Judge(standby.url) as judge:
            await judge.execute("SELECT pg_switch_wal()")  # the new log is soon as long as the old one was
        async with replica.after(lost, timeout=LONG) as unit:
            assert set(await unit.session.scalars(select(Note.text))) == {"received", "later"}
        assert shop.checked_out() == 0


async def test_synchronous_commit_is_not_acknowledged_without_its_standby(pair: Servers) -> None:
    """A COMMIT waits for the standby, and fails with the primary: nobody was told of what is lost."""
    primary, standby = pair
    shop = open_shop(pair)
    async with shop.client() as client:
        await create_tables(shop.db.engine)
        await replicate_synchronously(primary)
        assert (await client.post("/notes/received")).status_code == 201
        await asyncio.to_thread(standby.stop)
        request = asyncio.create_task(client.post("/notes/lost"))
        await waiting(primary, "SyncRep")
        await asyncio.to_thread(primary.stop, "immediate")
        assert (await request).status_code == 500
        await asyncio.to_thread(standby.start)
        await asyncio.to_thread(standby.promote)
        assert (await client.post("/notes/later")).status_code == 201
        assert shop.checked_out() == 0
    assert await notes(standby) == {"received", "later"}


async def test_replica_pair_on_a_promoted_server(pair: Servers) -> None:
    """Its connections live through the promotion, find new positions, and still do not write."""
    settings = documented(*pair)
    _, db = create_middleware_and_session_proxy(AsyncSession)
    _, replica = create_middleware_and_session_proxy(AsyncSession, read_only=True)
    async with (
        db.connect(settings.primary, engine_args=settings.engine_args),
        replica.connect(settings.replica, engine_args={"pool_size": 1, "max_overflow": 0}),
    ):
        await create_tables(db.engine)
        await agree(*pair)
        backend = await backend_of(replica)
        await fail_over(*pair)
        async with db() as unit:
            unit.session.add(Note(text="new"))
            await unit.commit()
            position = await db.commit_position()
        async with replica.after(position, timeout=LONG) as unit:
            assert await unit.session.scalar(select(Note.text)) == "new"
        assert await backend_of(replica) == backend
        with pytest.raises(DBAPIError, match="cannot execute INSERT in a read-only transaction"):
            await write_by(replica)


async def backend_of(db: SessionProxy[AsyncSession]) -> int | None:
    """Return which process of the server serves the pool's only connection."""
    async with db() as unit:
        backend: int | None = await unit.session.scalar(text("SELECT pg_backend_pid()"))
    return backend


async def write_by(db: SessionProxy[AsyncSession]) -> None:
    """Try to write by a statement."""
    async with db() as unit:
        await unit.session.execute(insertion(Note).values(text="refused"))


@asynccontextmanager
async def filled_pool(url: str, **engine_args: Any) -> AsyncGenerator[AsyncEngine]:
    """Make an engine whose pool is full of connections that have been used."""
    engine = create_async_engine(url, pool_size=POOL_SIZE, **engine_args)
    try:
        connections = [await engine.connect() for _ in range(POOL_SIZE)]
        for connection in connections:
            await connection.execute(text("SELECT 1"))
            await connection.close()
        yield engine
    finally:
        await engine.dispose()


async def insert(engine: AsyncEngine, note: str) -> None:
    """Write a note and commit."""
    async with engine.begin() as connection:
        await connection.execute(insertion(Note).values(text=note))


async def outcomes(engine: AsyncEngine, name: str) -> list[str]:
    """Write as often as the pool has connections, one after the other; name what came of each."""
    found: list[str] = []
    for number in range(POOL_SIZE):
        try:
            await insert(engine, f"{name}-{number}")
        except (DBAPIError, OSError) as error:
            found.append(type(error).__name__)
        else:
            found.append("written")
    return found


async def test_one_request_pays_for_a_pool_without_ping(pair: Servers) -> None:
    """The first broken connection empties the pool of all; `pool_pre_ping` spares even that error."""
    settings = documented(*pair)
    async with (
        filled_pool(settings.primary) as plain,
        filled_pool(settings.primary, pool_pre_ping=True) as pinging,
    ):
        await create_tables(plain)
        await agree(*pair)
        await fail_over(*pair)
        assert await outcomes(plain, "plain") == ["InterfaceError", *["written"] * (POOL_SIZE - 1)]
        assert await outcomes(pinging, "pinging") == ["written"] * POOL_SIZE
        assert [checked_out(plain.pool), checked_out(pinging.pool)] == [0, 0]


@pytest.mark.parametrize("reverse", [False, True], ids=["primary first", "standby first"])
async def test_documented_urls_find_their_server_in_any_order(lasting_pair: Servers, reverse: bool) -> None:  # noqa: FBT001  # a parameter of the test
    """Whichever host is named first, one URL leads to the primary and the other to the standby."""
    primary, standby = lasting_pair
    settings = documented(*(reversed(lasting_pair) if reverse else lasting_pair))
    for url, port, in_recovery in (
        (settings.primary, primary.port, False),
        (settings.replica, standby.port, True),
    ):
        async with filled_pool(url, **settings.engine_args) as engine, engine.connect() as connection:
            found = await connection.execute(text("SELECT inet_server_port(), pg_is_in_recovery()"))
            assert found.one() == (port, in_recovery)


async def test_attribute_in_connect_args(lasting_pair: Servers) -> None:
    """`target_session_attrs` may stand in `connect_args` as well as in the URL."""
    url = make_url(documented(*reversed(lasting_pair)).primary).difference_update_query(
        ["target_session_attrs"]
    )
    engine = create_async_engine(url, connect_args={"target_session_attrs": "read-write"})
    async with engine.connect() as connection:
        assert await connection.scalar(text("SELECT pg_is_in_recovery()")) is False
    await engine.dispose()


async def test_no_primary_is_an_error(lasting_pair: Servers) -> None:
    """Where no host takes writes the connection fails, and says what was looked for."""
    _, standby = lasting_pair
    engine = create_async_engine(documented(standby, standby).primary)
    with pytest.raises(Exception, match=NO_PRIMARY):
        await engine.connect()
    assert checked_out(engine.pool) == 0


async def test_silent_host_uses_up_the_timeout(lasting_pair: Servers) -> None:
    """The timeout is for all hosts together: one that answers nothing keeps asyncpg from the next."""
    primary, _ = lasting_pair
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silence = Server(primary.data, silent.getsockname()[1])
        engine = create_async_engine(documented(silence, primary).primary, connect_args={"timeout": 0.5})
        with pytest.raises(TimeoutError, match=r"^$"):
            await engine.connect()
        assert checked_out(engine.pool) == 0


@asynccontextmanager
async def fenced(server: Server) -> AsyncGenerator[Judge]:
    """Let a server refuse writes until exit; connections stay open."""
    async with Judge(server.url) as judge:
        await judge.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        await judge.execute("SELECT pg_reload_conf()")
        try:
            while await judge.scalar("SHOW default_transaction_read_only") != "on":
                pass
            yield judge
        finally:
            await judge.execute("ALTER SYSTEM RESET default_transaction_read_only")
            await judge.execute("SELECT pg_reload_conf()")
            while await judge.scalar("SHOW default_transaction_read_only") != "off":
                pass


async def told_of_the_fence(engine: AsyncEngine) -> None:
    """Wait until each connection of the pool has heard of it: the server tells one after the other."""
    connections = [await engine.connect() for _ in range(POOL_SIZE)]
    for connection in connections:
        while await connection.scalar(text("SHOW default_transaction_read_only")) != "on":
            pass
        await connection.close()


async def write_nothing(engine: AsyncEngine) -> None:
    """Do what only a server that takes writes allows, and leave nothing for the other tests."""
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TEMPORARY TABLE written () ON COMMIT DROP"))


async def test_pool_does_not_notice_a_fence_that_leaves_connections_open(lasting_pair: Servers) -> None:
    """Which server takes writes is asked when a connection is made: a fence must cut those that are open."""
    primary, _ = lasting_pair
    settings = documented(*lasting_pair)
    async with filled_pool(settings.primary, **settings.engine_args) as engine:
        async with fenced(primary) as judge:
            await told_of_the_fence(engine)
            for _ in range(POOL_SIZE):
                with pytest.raises(DBAPIError, match="cannot execute CREATE TABLE in a read-only"):
                    await write_nothing(engine)
            await judge.execute(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
                "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )
            with pytest.raises(Exception, match=NO_PRIMARY):
                await write_nothing(engine)
        await write_nothing(engine)
        assert checked_out(engine.pool) == 0
