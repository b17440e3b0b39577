"""The fault campaign in its short form, and proof that it would find what it looks for."""

import asyncio
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
from asyncpg.exceptions import InternalClientError  # type: ignore[import-untyped]  # pyright: ignore[reportMissingTypeStubs]  # it has no types
from attrs import define, evolve, frozen
from sqlalchemy import URL, NullPool, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from campaign import report
from campaign.__main__ import INTERRUPTED, parse
from campaign.endpoints import ENDPOINTS
from campaign.promise import ROUTES, Answer, Seen
from campaign.proxy import CommitFault, Link, Proxy, Upstream
from campaign.run import QUIET, Plan, Result, run
from campaign.sabotage import SABOTAGE
from campaign.server import Mariadb, Postgresql, databases, own_postgresql
from campaign.tables import ACCOUNTS, BALANCE
from campaign.verdict import Rows, judge
from campaign.wire import MariadbWire, PostgresqlWire, Wire
from tests.support.databases import Judge
from tests.support.leftovers import Place, temporary_place

SHORT = Plan(seed=7, requests=500, seconds=2, patience=30)
"""The campaign of the test suite."""
SHORTER = Plan(seed=7, requests=60, seconds=5, concurrency=8, faults=False, sigterm=False, patience=0.5)
"""Enough to find an application guilty that is broken on purpose."""
COMMON_FAULTS = {
    "SIGTERM",
    "backend terminated",
    "connection cut",
    "connection stalled",
    "cut after COMMIT",
    "cut before COMMIT",
    "half closed to the client",
    "half closed to the server",
    "pool exhausted",
    "stall after COMMIT",
}
RESTS_ON = {
    "one engine": ("routed_aborted", "named_aborted", "sharded_aborted"),
    "listeners": ("listener",),
    "blocks": ("joined_task", "joined_too_long", "joined_by_hand"),
    "loops": ("other_loop", "job"),
    "children": ("child",),
    "statements": ("second_exposed",),
}
"""The routes that find out, by what is broken in the package."""
ROOT = Path(__file__).parent.parent.parent


def innocent(result: Result) -> None:
    """Hold that nothing was found, and show everything where something was."""
    shown = report.table(result)
    assert [str(finding) for finding in result.findings] == [], f"{shown}\n{result.log}"
    assert result.transfers
    assert f"the accounts hold 6000 of 6000 after {result.transfers} transfers" in shown
    assert f"when the faults had stopped: {QUIET} of {QUIET} requests" in shown
    for kind in ("connections checked out", "sessions idle in a transaction", "tasks"):
        assert f"{kind} at the end: 0" in shown


@pytest.mark.slow
def test_nothing_is_lost_on_postgresql() -> None:
    """Under every fault, a crash of the server too, what was acknowledged is there and no more."""
    with own_postgresql() as server:
        result = asyncio.run(run(server, evolve(SHORT, memory_requests=200)))
    innocent(result)
    assert set(result.faults) >= COMMON_FAULTS | {"server stopped and started"}
    assert Counter(answer.seen for answer in result.answers).keys() == {"acknowledged", "refused", "unknown"}


@pytest.mark.slow
def test_nothing_is_lost_on_mariadb(mariadb_server: URL) -> None:
    """Under every fault but a crash of the server, what was acknowledged is there and no more."""
    with databases(mariadb_server) as server:
        result = asyncio.run(run(server, SHORT))
    innocent(result)
    assert set(result.faults) >= COMMON_FAULTS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "kind"),
    [("late", "lost"), ("swallows", "lost"), ("anyway", "phantom"), ("leaks", "leak"), ("grows", "memory")],
)
def test_broken_application_is_found_guilty(broken: str, kind: str, postgresql_server: URL) -> None:
    """The same verdict finds each application guilty that is broken on purpose, and of what it does."""
    plan = evolve(SHORTER, broken=broken, memory_requests=200 if broken == "grows" else 0)
    if kind != "leak":  # what is not kept for good may take its time to go
        plan = evolve(plan, patience=SHORT.patience)
    with databases(postgresql_server) as server:
        result = asyncio.run(run(server, plan))
    assert report.by_kind(result)[kind] > 0, report.table(result)
    assert "GUILTY, seed 7" in report.table(result)
    assert report.as_json(result)["findings"]
    assert bool(result.left["connections checked out"]) is (kind == "leak")


@pytest.mark.slow
@pytest.mark.parametrize("name", SABOTAGE)
def test_broken_package_is_found_guilty(name: str, postgresql_server: URL) -> None:
    """Each route that rests on a promise of the package finds it guilty when the promise is broken."""
    routes = RESTS_ON[name]
    plan = evolve(SHORTER, broken=name, routes=routes, seconds=2, deadline=2)
    with databases(postgresql_server) as server:
        result = asyncio.run(run(server, plan))
    by_number = {answer.number: answer.route for answer in result.answers}
    guilty = {by_number.get(found.number) for found in result.findings}
    assert guilty >= {*routes} or report.by_kind(result)["gone"], report.table(result)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--driver=asyncmy", "the driver of postgresql is one of asyncpg, psycopg"),
        ("--concurrency=0", "'concurrency' must be >= 1: 0"),
        ("--requests=0", "'requests' must be >= 1: 0"),
        ("--seconds=nan", "'seconds' must be > 0: nan"),
        ("--memory-requests=-1", "'memory_requests' must be >= 0: -1"),
    ],
)
def test_plan_of_nothing_is_refused(option: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A campaign that would try nothing cannot be asked for, nor say that nothing was lost."""
    with pytest.raises(SystemExit, match="2"):
        parse([option])
    assert said in capsys.readouterr().err


async def started(place: Place) -> None:
    """Wait until the campaign's PostgreSQL listens, while it is still being started."""
    while not list(place.path.glob("campaign-*/data/.s.PGSQL.5432")):
        pass


async def stormy(place: Place) -> None:
    """Wait until the campaign's application writes."""
    while True:
        for data in place.path.glob("campaign-*/data"):
            url = URL.create("postgresql+asyncpg", "postgres", database="main", query={"host": str(data)})
            with suppress(Exception):  # it is not there yet, or stopped without care: drivers have many words
                async with Judge(url) as judge:
                    if await judge.scalar("SELECT count(*) FROM entry"):
                        return
        await asyncio.sleep(0)


@pytest.mark.slow
@pytest.mark.usefixtures("postgresql_server")  # it has made the user of root's servers
@pytest.mark.parametrize("moment", [started, stormy])
async def test_sigterm_leaves_nothing(moment: Callable[[Place], Awaitable[None]]) -> None:
    """A campaign that is told to end by SIGTERM leaves no server and no folder behind."""
    with temporary_place() as place:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "ignore", "-m", "campaign"),
            cwd=ROOT,
            env={**os.environ, **place.environment},
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            await moment(place)
        finally:
            process.send_signal(signal.SIGTERM)
            _, said = await process.communicate()
        assert process.returncode == INTERRUPTED, said.decode()
        assert b"before the verdict" in said
        assert (place.servers(), place.data()) == ([], [])


@frozen
class Case:
    """What a client saw, what is there, and what the verdict must say."""

    route: str
    answer: Answer
    main: str
    ledger: str = ""
    found: str = ""


def seen(status: int, *, done: str = "", doubt: str = "", calm: bool = False) -> Answer:
    """Return an answer to request 1; status 0 is none."""
    kind: Seen = "unknown" if not status else "acknowledged" if status < 400 else "refused"
    names = frozenset(done.split()), frozenset(doubt.split())
    return Answer(1, "plain", kind, status, *names, calm=calm)


CASES = [
    Case("plain", seen(200), "ab"),
    Case("plain", seen(200), "a", found="lost"),
    Case("plain", seen(200), "", found="lost"),
    Case("plain", seen(500), ""),
    Case("plain", seen(500), "ab", found="phantom"),
    Case("plain", seen(500, doubt="main"), "ab"),
    Case("plain", seen(500, doubt="main"), "a", found="torn"),
    Case("plain", seen(500, doubt="ledger"), "ab", found="phantom"),
    Case("plain", seen(0), "ab"),
    Case("plain", seen(0), ""),
    Case("plain", seen(0), "b", found="torn"),
    Case("plain", seen(200), "abx", found="phantom"),
    Case("refuse", seen(0), "a", found="phantom"),
    Case("refuse", seen(409), "a", found="phantom"),
    Case("refuse", seen(200), "", found="lost"),
    Case("forgiven", seen(200), "a", found="phantom"),
    Case("orphan", seen(200), "", found="lost"),
    Case("stream_write", seen(200), "a"),
    Case("stream_write", seen(200), "atu"),
    Case("stream_write", seen(200), "at", found="torn"),
    Case("stream_write", seen(200, calm=True), "a", found="lost"),
    Case("stream_write", seen(0), "tu", found="torn"),
    Case("stream_left", seen(200), "at", found="phantom"),
    Case("savepoint", seen(200), "abc", found="phantom"),
    Case("hand_refuses", seen(409, done="hand"), "a"),
    Case("hand_refuses", seen(409, done="hand"), "", found="lost"),
    Case("hand_refuses", seen(409), "a", found="phantom"),
    Case("hand", seen(0), "b", found="torn"),
    Case("hooked", seen(200), "ah"),
    Case("hooked", seen(200), "ar", found="torn"),
    Case("hooked", seen(0), "ar", found="torn"),
    Case("hooked", seen(0), "h", found="torn"),
    Case("hooked", seen(200), "ahx", found="phantom"),
    Case("hooked", seen(500), "r"),
    Case("hooked", seen(500, doubt="main"), "r", found="phantom"),
    Case("hooked", seen(500, doubt="main"), "ah", found="phantom"),
    Case("hooked_refuses", seen(409, calm=True), "", found="lost"),
    Case("hooked_refuses", seen(409), "r"),
    Case("hooked_refuses", seen(409), "ar", found="phantom"),
    Case("two", seen(200), "a", "l"),
    Case("two", seen(200), "a", "", found="lost"),
    Case("two", seen(500, done="response"), "a", ""),
    Case("two", seen(500, done="response"), "", "", found="lost"),
    Case("two", seen(500, done="response"), "a", "l", found="phantom"),
    Case("two", seen(500, done="response", doubt="ledger"), "a", "l"),
    Case("two", seen(0), "", "l", found="torn"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_verdict(case: Case) -> None:
    """Of each thing that a client can have seen, the verdict knows what may be there."""
    rows = Rows({("main", 1): set(case.main), ("ledger", 1): set(case.ledger)})
    rows.balances = dict.fromkeys(range(ACCOUNTS), BALANCE)
    answer = evolve(case.answer, route=case.route)
    assert {finding.kind for finding in judge([answer], rows)} == ({case.found} if case.found else set())


def test_verdict_of_accounts() -> None:
    """Money that is made, or moved without a transfer, or by a transfer of no request, is found."""
    balances = dict.fromkeys(range(ACCOUNTS), BALANCE)
    answer = evolve(seen(200), route="transfer")
    rows = Rows({("main", 1): {"a"}}, {**balances, 0: 990, 1: 1010}, [(1, 0, 1, 10)])
    assert judge([answer], rows) == []
    for wrong, kinds in [
        (evolve(rows, balances={**balances, 0: 990}), {"sum", "balance"}),
        (evolve(rows, balances=balances), {"balance"}),
        (evolve(rows, parts={}), {"lost", "torn"}),
    ]:
        assert {finding.kind for finding in judge([answer], wrong)} == kinds


def test_every_route_is_promised() -> None:
    """A route without a promise, or a promise without a route, would be judged by nobody."""
    assert {endpoint.__name__ for endpoint in ENDPOINTS} | {"manual"} == set(ROUTES)


SSL_REQUEST = bytes.fromhex("00000008 04d2162f")
STARTUP = bytes.fromhex("00000009 00030000 00")


@pytest.mark.parametrize(
    ("wire", "startup", "commit"),
    [
        (PostgresqlWire, SSL_REQUEST + STARTUP, b"Q" + (12).to_bytes(4) + b"COMMIT;\0"),
        (MariadbWire, b"\1\0\0\1\x0e", b"\7\0\0\0\3COMMIT"),
    ],
)
def test_wire_finds_commit(wire: Callable[[], Wire], startup: bytes, commit: bytes) -> None:
    """A COMMIT is found wherever the bytes are cut in two, and nothing is lost on the way."""
    sent = startup + commit + commit
    for at in range(len(sent)):
        between = wire()
        messages = between.split(sent[:at]) + between.split(sent[at:])
        assert b"".join(messages) == sent
        assert [between.is_commit(message) for message in messages[-2:]] == [True, True]
        assert not any(between.is_commit(message) for message in messages[:-2])


@pytest.fixture(params=["postgresql", "mariadb"])
def server(request: pytest.FixtureRequest) -> Iterator[Postgresql | Mariadb]:
    """Two databases on each of the two servers in turn."""
    url: URL = request.getfixturevalue(f"{request.param}_server")
    with databases(url) as made:
        yield made


@define(eq=False)
class Between:
    """A connection through a proxy, in a transaction that has written, and a judge beside it."""

    proxy: Proxy
    connection: AsyncConnection
    judge: Judge

    async def written(self) -> bool:
        """Whether the transaction is committed."""
        return await self.judge.scalar("SELECT count(*) FROM anchor") == 2

    async def ask(self) -> object:
        """Run a statement."""
        return await self.connection.scalar(text("SELECT 1"))


@pytest.fixture
async def between(server: Postgresql | Mariadb) -> AsyncIterator[Between]:
    """A transaction that has written, through a proxy whose stalls last longer than the test."""
    async with server.proxy(3600) as proxy, Judge(server.urls["main"]) as judge:
        url, arguments = server.proxied("main", proxy.port)
        engine = create_async_engine(url, connect_args=arguments, poolclass=NullPool)
        async with engine.connect() as connection:
            await connection.execute(text("INSERT INTO anchor VALUES (2)"))
            yield Between(proxy, connection, judge)
        await engine.dispose()


@pytest.mark.parametrize(("fault", "written"), [("cut before COMMIT", False), ("cut after COMMIT", True)])
async def test_proxy_cuts_around_commit(between: Between, fault: CommitFault, *, written: bool) -> None:
    """A client cannot tell a COMMIT that never arrived from one that was done: the proxy makes both."""
    between.proxy.arm(fault)
    with pytest.raises(DBAPIError, match=r"closed|Lost connection") as caught:
        await between.connection.commit()
    assert caught.value.connection_invalidated
    assert await between.written() is written
    assert between.proxy.met == {fault: 1}


async def test_proxy_withholds_the_answer_to_commit(between: Between) -> None:
    """The transaction is committed while its client still waits, and goes on when the proxy lets it."""
    between.proxy.arm("stall after COMMIT")
    committing = asyncio.create_task(between.connection.commit())
    while not await between.written():
        assert not committing.done()
    while not committing.done():
        between.proxy.disarm()
        await asyncio.sleep(0)
    await committing


def half_close_to_client(link: Link) -> None:
    """Tell the application that the server will say nothing more."""
    link.half_close("client")


def half_close_to_server(link: Link) -> None:
    """Tell the server that the application will say nothing more."""
    link.half_close("server")


@pytest.mark.parametrize(
    "act",
    [Link.cut, half_close_to_client, half_close_to_server],
)
async def test_proxy_breaks_a_connection(between: Between, act: Callable[[Link], None]) -> None:
    """A connection that was cut or half closed serves no statement, and its transaction is rolled back."""
    (link,) = between.proxy.links
    act(link)
    with pytest.raises(DBAPIError, match=r"closed|Lost connection|gone away|another operation"):
        await between.ask()
    assert not await between.written()


async def test_proxy_stalls_a_connection(between: Between) -> None:
    """A stalled connection goes on, with nothing lost, when it is released."""
    (link,) = between.proxy.links
    link.stall()
    asking = asyncio.create_task(between.ask())
    await between.written()  # a whole statement beside it has been answered meanwhile
    assert not asking.done()
    link.release()
    assert await asking == 1


async def test_proxy_of_a_server_that_is_down() -> None:
    """A client is refused by a reset where the server behind does not listen."""
    async with Proxy(Upstream("/nonexistent/socket"), PostgresqlWire) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        with pytest.raises(ConnectionResetError, match="reset"):
            await reader.readexactly(1)
        writer.close()
        with suppress(ConnectionResetError):
            await writer.wait_closed()
        assert proxy.links == []


async def test_terminated_connection(server: Postgresql | Mariadb) -> None:
    """The server ends a connection of the application's, and says that none is idle in a transaction."""
    async with server.proxy(1) as proxy:
        url, arguments = server.proxied("main", proxy.port)
        engine = create_async_engine(url, connect_args=arguments, poolclass=NullPool)
        async with engine.connect() as connection:
            await connection.execute(text("INSERT INTO anchor VALUES (2)"))
            while await server.idle_in_transaction() != 1:
                pass  # MariaDB answers a statement a moment before it says that it has nothing to do
            rng = Random(1)  # noqa: S311  # no secret
            assert await server.terminate(rng)
            broken = (DBAPIError, InternalClientError)  # SQLAlchemy 2.0 does not wrap asyncpg's own
            told = r"terminat|closed|another operation|Lost connection|gone away|killed"
            with pytest.raises(broken, match=told):
                await connection.scalar(text("SELECT 1"))
        await engine.dispose()
        while await server.terminate(rng):  # until the server has forgotten it
            pass
        assert await server.idle_in_transaction() == 0
