"""A primary and a hot standby: one reads one's own writes from the standby, or is told that one cannot."""

import asyncio
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, TypeAlias, assert_type

import pytest
from attrs import define
from sqlalchemy import NullPool, event, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from fastapi_async_sqlalchemy import (
    ConfigurationError,
    EngineArgs,
    IsolationLevel,
    PoolTimeoutError,
    ReadOnlyError,
    ReplicaLagError,
    SessionProxy,
    TransactionBegunError,
    UnitClosedError,
    UnitOfWork,
    WalPosition,
    create_middleware_and_session_proxy,
)
from tests.support.databases import Judge
from tests.support.replication import Server, caught_up, hot_standby, primary_server, replay_paused
from tests.support.site import checked_in, checked_out, complaints
from tests.support.tables import Note, create_tables

LONG = 20.0
"""Seconds to wait for what will happen."""
SHORT = 0.05
"""Seconds to wait for what will not."""
WRITERS = 30
ROUNDS = 3
DELAY = "1s"
"""How much later the standby shows a COMMIT: longer than it takes to ask, on a busy machine too."""

BLOCK, HEADER = 8192, 24
"""A block of the log in bytes, and what of it is its header."""
SEGMENT, SEGMENT_HEADER = 16 * 1024 * 1024, 40
"""A file of the log in bytes, and what of it is the header of its first block."""
MESSAGE = 55
"""A record of a message in bytes, but for its text of more than 255."""


class PrimarySession(AsyncSession):
    """The session of the primary."""


class ReplicaSession(AsyncSession):
    """The session of the standby."""


Servers: TypeAlias = tuple[Server, Server]
"""A primary and its standby."""


@define(eq=False)
class Shop:
    """The two pairs of an application, connected to the two servers."""

    primary: SessionProxy[PrimarySession]
    replica: SessionProxy[ReplicaSession]
    primary_server: Server
    standby: Server

    async def write(self, note: str) -> WalPosition:
        """Write a note by a unit of the primary, and return its position."""
        async with self.primary() as unit:
            unit.session.add(Note(text=note))
            await unit.commit()
            return await self.primary.commit_position()


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    """A primary and a standby with the tables."""
    with primary_server() as primary, hot_standby(primary) as standby:
        yield primary, standby


@asynccontextmanager
async def open_shop(servers: Servers, **replica_args: Any) -> AsyncGenerator[Shop]:
    """Connect two fresh pairs; on exit no connection may be out."""
    primary_server, standby = servers
    _, primary = create_middleware_and_session_proxy(PrimarySession)
    _, replica = create_middleware_and_session_proxy(ReplicaSession, read_only=True)
    engine = create_async_engine(standby.url, **replica_args)
    async with primary.connect(primary_server.url), replica.connect(engine):
        await create_tables(primary.engine)
        async with Judge(primary_server.url) as written, Judge(standby.url) as replayed:
            await caught_up(written, replayed)
        yield Shop(primary, replica, primary_server, standby)
        assert checked_out(primary.engine.pool) == 0
        assert replica.pool_status().checked_out in {0, None}
    await engine.dispose()


@pytest.fixture
def _slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A standby that answers is heard, however late: it is not taken for one that answers nothing."""
    monkeypatch.setattr("fastapi_async_sqlalchemy._cluster.replica._GRACE", LONG)


@pytest.fixture
async def shop(servers: Servers) -> AsyncIterator[Shop]:
    """Two pairs, the standby caught up."""
    async with open_shop(servers) as shop:
        yield shop


async def find(session: AsyncSession, note: str) -> str | None:
    """Return a note's text if the session sees it."""
    found: str | None = await session.scalar(select(Note.text).where(Note.text == note))
    return found


async def port_of(session: AsyncSession) -> int | None:
    """Return which server a session talks to."""
    port: int | None = await session.scalar(text("SELECT inet_server_port()"))
    return port


def place(position: str) -> int:
    """Return a position as a number of bytes."""
    high, _, low = position.partition("/")
    return (int(high, 16) << 32) + int(low, 16)


async def test_read_without_position_is_stale(shop: Shop) -> None:
    """A unit that waits for nothing reads what the standby has, which can be the state of before."""
    async with replay_paused(shop.standby):
        await shop.write("unseen")
        async with shop.replica() as unit:
            assert await find(unit.session, "unseen") is None


@pytest.mark.usefixtures("_slow_machine")
async def test_stale_read_is_refused(shop: Shop) -> None:
    """A standby that has not replayed the position in time lets nobody in, and says how far it is."""
    async with shop.replica() as unit:
        await unit.session.connection()  # to connect takes time, too
    async with replay_paused(shop.standby):
        position = await shop.write("late")
        with pytest.raises(ReplicaLagError, match=rf"had replayed \S+ and not {position} within") as raised:
            async with shop.replica.after(position, timeout=SHORT):
                pytest.fail("the unit was entered")
        assert checked_out(shop.replica.engine.pool) == 0
    error = raised.value
    assert isinstance(error, TimeoutError)
    assert (error.position, error.timeout) == (position, SHORT)
    assert error.replayed is not None
    assert place(error.replayed) < place(position)
    async with shop.replica.after(position, timeout=LONG) as unit:
        assert await find(unit.session, "late") == "late"


async def asks_for_position(standby: Server) -> None:
    """Wait until a session of the standby has asked how far it is, and is not answered as it wishes."""
    async with Judge(standby.url) as judge:
        asked = (
            "SELECT count(*) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
            " AND backend_type = 'client backend' AND query LIKE '%pg_last_wal_replay_lsn%'"
        )
        while not await judge.scalar(asked):
            pass


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ"])
async def test_read_waits_until_the_standby_is_there(shop: Shop, level: IsolationLevel) -> None:
    """A unit that waits goes on when replay does; its snapshot is taken after that, not before."""
    note = f"awaited in {level}"

    async def read(position: WalPosition) -> str | None:
        async with shop.replica.after(position, isolation_level=level, timeout=LONG) as unit:
            assert await port_of(unit.session) == shop.standby.port
            return await find(unit.session, note)

    async with replay_paused(shop.standby):
        reading = asyncio.create_task(read(await shop.write(note)))
        await asks_for_position(shop.standby)
        assert not reading.done()
    assert await reading == note


async def test_standby_has_no_serializable(shop: Shop) -> None:
    """PostgreSQL refuses SERIALIZABLE on a standby; the connection is given back."""
    position = await shop.write("serializable")
    with pytest.raises(DBAPIError, match="cannot use serializable mode in a hot standby"):
        await shop.replica.after(position, isolation_level="SERIALIZABLE", timeout=LONG).__aenter__()
    assert checked_out(shop.replica.engine.pool) == 0


@pytest.mark.usefixtures("_slow_machine")
async def test_fallback_reads_from_the_primary(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """With a fallback the same unit reads the row on the primary, and a WARNING says why."""
    async with replay_paused(shop.standby):
        position = await shop.write("urgent")
        async with shop.replica.after(position, timeout=SHORT, fallback=shop.primary) as unit:
            assert_type(unit, UnitOfWork[ReplicaSession])
            assert_type(shop.replica.session, ReplicaSession)
            assert shop.replica.session is unit.session
            assert type(unit.session) is ReplicaSession
            assert await find(unit.session, "urgent") == "urgent"
            assert await port_of(unit.session) == shop.primary_server.port
            assert checked_out(shop.replica.engine.pool) == 0
    (warning,) = complaints(caplog)
    assert warning.startswith("WARNING: ReplicaSession")
    assert f"and not {position} within" in warning


async def test_fallback_is_not_used_without_need(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """A standby that is far enough in time is read from, fallback or not."""
    position = await shop.write("replayed")
    async with shop.replica.after(position, timeout=LONG, fallback=shop.primary) as unit:
        assert await port_of(unit.session) == shop.standby.port
        assert await find(unit.session, "replayed") == "replayed"
    assert complaints(caplog) == []


async def test_fallback_stays_read_only(shop: Shop) -> None:
    """On the primary too the unit writes nothing: a flush is refused here, and SQL by the database."""
    async with replay_paused(shop.standby):
        position = await shop.write("guarded")
        for refused, match in ((flush, "1 changed object of"), (insert_by_sql, "read-only transaction")):
            unit = shop.replica.after(position, timeout=SHORT, fallback=shop.primary)
            with pytest.raises((ReadOnlyError, DBAPIError), match=match):  # leaving raises, too
                async with unit as on_primary:
                    await refused(on_primary.session)


async def flush(session: AsyncSession) -> None:
    """Try to write by the unit of work pattern."""
    session.add(Note(text="refused"))
    await session.flush()


async def insert_by_sql(session: AsyncSession) -> None:
    """Try to write by a statement."""
    await session.execute(insert(Note).values(text="refused"))


async def test_unreachable_replica(servers: Servers, caplog: pytest.LogCaptureFixture) -> None:
    """Where nobody listens the connection's error is raised; with a fallback the primary answers."""
    primary_server, standby = servers
    nobody = Server(standby.data, 1)
    _, replica = create_middleware_and_session_proxy(ReplicaSession, read_only=True)
    async with open_shop(servers) as shop, replica.connect(nobody.url):
        position = await shop.write("unreachable")
        with pytest.raises(OSError, match="Connect call failed"):
            async with replica.after(position, timeout=LONG):
                pytest.fail("the unit was entered")
        async with replica.after(position, timeout=LONG, fallback=shop.primary) as unit:
            assert await port_of(unit.session) == primary_server.port
            assert await find(unit.session, "unreachable") == "unreachable"
    assert [line for line in complaints(caplog) if "Connect call failed" in line and "WARNING" in line]


async def test_no_server_is_a_standby(servers: Servers, caplog: pytest.LogCaptureFixture) -> None:
    """Where hosts answer and none of them will do, the primary answers, as where none can be reached."""
    primary_server, _ = servers
    _, replica = create_middleware_and_session_proxy(ReplicaSession, read_only=True)
    async with (
        open_shop(servers) as shop,
        replica.connect(f"{primary_server.url}?target_session_attrs=standby"),
    ):
        position = await shop.write("no standby")
        async with replica.after(position, timeout=LONG, fallback=shop.primary) as unit:
            assert await find(unit.session, "no standby") == "no standby"
    assert [line for line in complaints(caplog) if "None of the hosts match" in line]


async def test_replica_that_answers_nothing(servers: Servers, caplog: pytest.LogCaptureFixture) -> None:
    """A replica that takes the connection and then says nothing is given up after the timeout, too."""
    primary_server, standby = servers
    _, replica = create_middleware_and_session_proxy(ReplicaSession, read_only=True)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silence = Server(standby.data, silent.getsockname()[1])
        async with open_shop(servers) as shop, replica.connect(silence.url), asyncio.timeout(LONG):
            position = await shop.write("unanswered")
            async with replica.after(position, timeout=SHORT, fallback=shop.primary) as unit:
                assert await port_of(unit.session) == primary_server.port
    assert complaints(caplog) != []


async def test_full_pool_is_no_lag(servers: Servers, caplog: pytest.LogCaptureFixture) -> None:
    """A unit that comes to no connection says so, and not that the replica is late; a fallback serves."""
    async with open_shop(servers, pool_size=1, max_overflow=0) as shop:
        position = await shop.write("full")
        async with shop.replica() as holder:
            await holder.session.connection()
            with pytest.raises(
                PoolTimeoutError, match=r"had no free connection .*\(1 of 1 are checked out\)"
            ):
                await shop.replica.after(position, timeout=SHORT).__aenter__()
            async with shop.replica.after(position, timeout=SHORT, fallback=shop.primary) as unit:
                assert await find(unit.session, "full") == "full"
    assert [line for line in complaints(caplog) if "had no free connection" in line]


async def test_unit_is_for_one_use(shop: Shop) -> None:
    """A unit that waits is entered once, as any other; the one outside is current again afterwards."""
    position = await shop.write("once")
    unit = shop.replica.after(position, timeout=LONG)
    async with shop.replica() as outer:
        async with unit as inner:
            assert shop.replica.session is inner.session
        assert shop.replica.unit is outer
        with pytest.raises(UnitClosedError, match="ReplicaSession"):
            await unit.__aenter__()
        assert shop.replica.unit is outer


async def test_refused_unit_leaves_the_outer_one_current(shop: Shop) -> None:
    """After a unit that was not entered, and after a fallback, the unit around it goes on."""
    async with replay_paused(shop.standby), shop.replica() as outer:
        position = await shop.write("inside")
        with pytest.raises(ReplicaLagError, match=position):
            await shop.replica.after(position, timeout=SHORT).__aenter__()
        assert shop.replica.unit is outer
        async with shop.replica.after(position, timeout=SHORT, fallback=shop.primary) as on_primary:
            assert shop.replica.unit is on_primary
        assert shop.replica.unit is outer
        assert await find(outer.session, "inside") is None


async def test_cancelled_wait_gives_its_connection_back(shop: Shop) -> None:
    """A task that is cancelled while it waits leaves neither a connection nor a unit behind."""

    async def read(position: WalPosition) -> None:
        async with shop.replica.after(position, timeout=LONG, fallback=shop.primary):
            pytest.fail("the unit was entered")

    async with replay_paused(shop.standby):
        reading = asyncio.create_task(read(await shop.write("given up")))
        await asks_for_position(shop.standby)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError, match=r"^$"):
            await reading
        assert checked_out(shop.replica.engine.pool) == 0
        assert checked_out(shop.primary.engine.pool) == 0
    async with shop.replica.after(await shop.write("not given up"), timeout=LONG) as unit:
        assert await find(unit.session, "not given up") == "not given up"


@asynccontextmanager
async def replay_delayed(standby: Server) -> AsyncGenerator[None]:
    """Let the standby show every COMMIT late, until exit."""
    async with Judge(standby.url) as judge:

        async def delay(change: str, shown: str) -> None:
            await judge.execute(f"ALTER SYSTEM {change}")
            await judge.execute("SELECT pg_reload_conf()")
            while await judge.scalar("SHOW recovery_min_apply_delay") != shown:
                pass

        await delay(f"SET recovery_min_apply_delay = '{DELAY}'", DELAY)
        try:
            yield
        finally:
            await delay("RESET recovery_min_apply_delay", "0")


async def test_writers_read_their_own_writes(servers: Servers) -> None:
    """Of many writers at once each finds its write on a late standby; without waiting many would not."""
    found: list[bool] = []
    without: list[bool] = []

    async def write_and_read(shop: Shop, writer: int) -> None:
        for number in range(ROUNDS):
            note = f"{writer}-{number}"
            position = await shop.write(note)
            async with shop.replica() as unit:
                without.append(await find(unit.session, note) is not None)
            async with shop.replica.after(position, timeout=LONG) as unit:
                assert await port_of(unit.session) == shop.standby.port
                found.append(await find(unit.session, note) is not None)

    # A connection each: nobody who asks at once waits for those who wait for the standby.
    async with (
        open_shop(servers, pool_size=WRITERS) as shop,
        replay_delayed(shop.standby),
        asyncio.TaskGroup() as writers,
    ):
        for writer in range(WRITERS):
            writers.create_task(write_and_read(shop, writer))
    assert found == [True] * WRITERS * ROUNDS
    assert without.count(False) > 0
    print(  # noqa: T201  # to quote; pytest -rP shows it
        f"{len(found)} writes: {without.count(False)} not found without waiting, {found.count(False)} with"
    )


@pytest.mark.usefixtures("_slow_machine")
async def test_every_transaction_of_the_unit_waits(servers: Servers) -> None:
    """The position is checked on the connection that is used, and again on the next transaction's."""
    primary_server, standby = servers
    async with open_shop(servers, poolclass=NullPool) as shop, replay_paused(standby):
        position = await shop.write("checked twice")
        ports = iter([primary_server.port, standby.port])

        @event.listens_for(shop.replica.engine.sync_engine, "do_connect")
        def lead(_dialect: object, _record: object, _args: object, arguments: dict[str, Any]) -> None:
            arguments["port"] = next(ports)

        async with shop.replica.after(position, timeout=SHORT) as unit:
            assert await port_of(unit.session) == primary_server.port
            assert await find(unit.session, "checked twice") == "checked twice"
            await unit.commit()
            with pytest.raises(ReplicaLagError, match=f"and not {position} within"):
                await unit.session.execute(text("SELECT 1"))


@pytest.mark.parametrize(
    "position",
    ["", "now", "0/", "/0", "0/0/0", "0/1;", "0/1\n", " 0/1", "0/123456789", "0/-1", "0/\u0661", b"0/1", 1],
)
async def test_malformed_position_is_refused(shop: Shop, position: Any) -> None:
    """What cannot be a position is refused when the unit is asked for, and never sent."""
    with pytest.raises(ConfigurationError, match=r"position must be a position from `await primary\.commit"):
        shop.replica.after(position)
    assert checked_in(shop.replica.engine.pool) == 0


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"timeout": 0}, "timeout must be a finite number above 0, not 0"),
        ({"timeout": float("nan")}, "timeout must be a finite number above 0, not nan"),
        ({"fallback": "primary"}, "fallback must be the primary's proxy"),
        ({"isolation_level": "CHAOS"}, "isolation_level must be one of READ UNCOMMITTED"),
        ({"pool_timeout": 0}, "pool_timeout must be a finite number above 0, not 0"),
    ],
)
async def test_wrong_arguments_beside_a_position(shop: Shop, arguments: dict[str, Any], match: str) -> None:
    """What does not go with a position is refused when the unit is asked for."""
    with pytest.raises(ConfigurationError, match=match):
        shop.replica.after(WalPosition("0/1"), **arguments)


async def test_replica_has_no_position(shop: Shop) -> None:
    """A read-only pair is not asked for a position: the primary's proxy is the one to ask."""
    with pytest.raises(ConfigurationError, match=r"primary's proxy, .*ReplicaSession.* only reads"):
        await shop.replica.commit_position()


async def test_fallback_to_itself_is_refused(shop: Shop) -> None:
    """A replica is not its own primary."""
    with pytest.raises(ConfigurationError, match="fallback must be the primary's proxy"):
        shop.replica.after(WalPosition("0/1"), fallback=shop.replica)


async def test_positions_are_postgresqls(sqlite_url: str) -> None:
    """Another database has no positions, to ask for or to wait for."""
    _, other = create_middleware_and_session_proxy(AsyncSession)
    async with other.connect(sqlite_url):
        with pytest.raises(ConfigurationError, match=r"commit_position\(\) is PostgreSQL's alone"):
            await other.commit_position()
        with pytest.raises(ConfigurationError, match=r"after\(\) is PostgreSQL's alone"):
            other.after(WalPosition("0/1"))


@pytest.mark.parametrize("write", [flush, insert_by_sql])
async def test_uncommitted_writes_have_no_position(
    shop: Shop, write: Callable[[AsyncSession], Awaitable[None]]
) -> None:
    """In a unit that has written, the position is to be had after its commit or rollback only."""
    async with shop.primary() as unit:
        await write(unit.session)
        with pytest.raises(
            TransactionBegunError, match=r"commit_position\(\) when `await db\.unit\.commit\(\)`"
        ):
            await shop.primary.commit_position()
        await unit.rollback()
        assert place(await shop.primary.commit_position()) > 0


async def test_position_is_not_before_the_commit(shop: Shop) -> None:
    """Positions of commits one after the other grow."""
    positions = [place(await shop.write(f"growing-{number}")) for number in range(5)]
    assert positions == sorted(set(positions))


async def test_position_of_a_unit_that_reads(servers: Servers) -> None:
    """A unit that has a connection out needs no second one to ask for the position."""
    _, primary = create_middleware_and_session_proxy(PrimarySession)
    one = EngineArgs(pool_size=1, max_overflow=0, pool_timeout=SHORT)
    async with primary.connect(servers[0].url, engine_args=one), primary() as unit:
        await unit.session.execute(text("SELECT 1"))
        assert place(await primary.commit_position()) > 0


async def test_commits_that_do_not_wait_for_the_disk(servers: Servers) -> None:
    """With `synchronous_commit = off` the position covers the COMMIT nevertheless."""
    fast = EngineArgs(connect_args={"server_settings": {"synchronous_commit": "off"}})
    _, primary = create_middleware_and_session_proxy(PrimarySession)
    async with open_shop(servers) as shop, primary.connect(servers[0].url, engine_args=fast):
        quick = Shop(primary, shop.replica, shop.primary_server, shop.standby)
        for number in range(3):
            position = await quick.write(f"quick-{number}")
            async with shop.replica.after(position, timeout=LONG) as unit:
                assert await find(unit.session, f"quick-{number}") is not None


@pytest.mark.parametrize(
    ("beyond", "header"), [(0, HEADER), (16, 0)], ids=["at its end", "16 bytes into the next"]
)
async def test_position_around_a_block_boundary(shop: Shop, beyond: int, header: int) -> None:
    """A record that ends with a block, or just behind the next one's header, can be waited for."""
    async with Judge(shop.primary_server.url) as judge:
        while (
            (written := await next_record(judge)) % BLOCK != HEADER + beyond
            or written % SEGMENT < BLOCK  # where the header is another
        ):
            length = BLOCK - written % BLOCK + beyond - MESSAGE
            message = f"pg_logical_emit_message(false, 'x', repeat('x', {max(length, 500)}))"
            await judge.execute(f"SELECT {message}")
        position = await shop.primary.commit_position()
    assert place(position) >= written - header
    async with shop.replica.after(position, timeout=LONG / 4) as unit:
        assert await port_of(unit.session) == shop.standby.port


async def test_position_at_the_start_of_a_segment(shop: Shop) -> None:
    """Where the log's next file is still empty, what the last one holds can be waited for."""
    async with Judge(shop.primary_server.url) as judge:
        while (written := await next_record(judge)) % SEGMENT != SEGMENT_HEADER:
            await judge.execute("SELECT pg_switch_wal()")
        position = await shop.primary.commit_position()
    assert place(position) >= written - SEGMENT_HEADER
    async with shop.replica.after(position, timeout=LONG / 4) as unit:
        assert await port_of(unit.session) == shop.standby.port


async def next_record(judge: Judge) -> int:
    """Return where the primary will write its next record."""
    sql = "SELECT CAST(pg_current_wal_insert_lsn() - '0/0' AS bigint)"
    found = await judge.scalar(sql)
    assert isinstance(found, int)
    return found
