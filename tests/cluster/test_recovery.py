"""What a crash leaves of atomic(): found, and finished as all or nothing, by recover() and by its command."""

import asyncio
import itertools
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from subprocess import PIPE
from typing import Any
from uuid import uuid4

import pytest
from attrs import frozen
from sqlalchemy import URL, Connection, NullPool, event, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.util import await_only

from fastapi_async_sqlalchemy import ConfigurationError, InDoubtError, UnexpectedRollbackError, atomic
from fastapi_async_sqlalchemy.recovery import recover
from tests.support.atomic import BROKEN, BROKEN_TEXT, STEPS, YOUNG, Group, Side, Step, open_group, urls_of
from tests.support.databases import Judge, JudgeFor
from tests.support.tables import Note

PAIRS = [
    ("postgresql", "postgresql"),
    ("postgresql", "mariadb"),
    ("mariadb", "postgresql"),
    ("mariadb", "mariadb"),
]
DRIVERS = [("postgresql", "psycopg"), ("psycopg", "mariadb")]
TRIPLES = [("postgresql", "mariadb", "postgresql"), ("mariadb", "postgresql", "mariadb")]
MIXED = PAIRS[1]
MODULE = "fastapi_async_sqlalchemy.recovery"


def each_group(groups: Sequence[tuple[str, ...]]) -> pytest.MarkDecorator:
    """Run a test on groups of databases."""
    return pytest.mark.parametrize("kinds", groups, ids=" ".join)


@pytest.fixture
async def group(
    request: pytest.FixtureRequest, kinds: tuple[str, ...], databases: ExitStack, judge_for: JudgeFor
) -> AsyncIterator[Group]:
    """The databases, in use without an application."""
    urls = await asyncio.to_thread(lambda: list(urls_of(kinds, databases, request.getfixturevalue)))
    async with open_group(urls, judge_for) as group:
        yield group


# A connection breaks.


@each_group([*PAIRS, *DRIVERS, *TRIPLES])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("done", [True, False])
async def test_connection_breaks(group: Group, step: Step, *, done: bool) -> None:
    """Whichever connection breaks at whichever step, recovery makes all or nothing of it, never a part."""
    places = range(len(group.sides))
    for place, victim in itertools.product(places, places):
        if done and victim != place:
            continue
        note = f"{place} {victim}"
        seen = list[str]()
        try:
            with group.killing(place, step, victim, done=done):
                async with atomic(*group.proxies):
                    await group.add(note)
                    for side in group.sides:
                        side.db.unit.on_commit(partial(seen.append, "commit"))
                        side.db.unit.on_rollback(partial(seen.append, "rollback"))
        except (InDoubtError, *BROKEN) as error:
            raised: Exception | None = error
        else:
            raised = None
        assert set(group.checked_out()) == {0}, note
        before = [note in notes for notes in await group.notes()]
        resolved = await group.recover()
        after = {note in notes for notes in await group.notes()}
        assert len(after) == 1, (note, raised, before, resolved)
        assert await group.prepared() == 0, note
        assert set(seen) <= {"commit" if after == {True} else "rollback"}, note
        if raised is None or any(before):
            assert after == {True}, note


@each_group([*PAIRS[:3], *DRIVERS])
@pytest.mark.parametrize("done", [True, False])
async def test_hooks_of_a_known_outcome(group: Group, *, done: bool) -> None:
    """Where the connection of one that is no witness breaks at PREPARE, all see the rollback that it is."""
    last = max(at for at, side in enumerate(group.sides) if side.is_postgresql)
    seen = list[int]()

    async def work() -> None:
        async with atomic(*group.proxies):
            await group.add("none")
            for at, side in enumerate(group.sides):
                side.db.unit.on_rollback(partial(seen.append, at))

    with (
        group.killing(1 - last, "prepare_twophase", 1 - last, done=done),
        pytest.raises(BROKEN, match=BROKEN_TEXT),
    ):
        await work()
    await group.recover()
    assert (await group.notes(), await group.prepared()) == (group.everywhere(), 0)
    assert sorted(seen) == [0, 1]


@each_group([*PAIRS, *DRIVERS])
async def test_connection_was_lost_before(group: Group) -> None:
    """A connection that is lost in the block's body, whichever it is, leaves nothing prepared."""

    async def work(side: Side) -> None:
        async with atomic(*group.proxies):
            for other in group.sides:
                other.db.session.add(Note(text="none"))
            connection = (await side.db.session.connection()).sync_connection
            assert connection is not None
            await side.kill(connection)

    for side in group.sides:
        with pytest.raises(BROKEN, match=BROKEN_TEXT):
            await work(side)
        assert (await group.notes(), await group.prepared()) == (group.everywhere(), 0)


@each_group([*PAIRS, *DRIVERS])
async def test_prepared_transaction_cannot_be_undone(group: Group) -> None:
    """Where one fails and the connection of a prepared one is gone, an error says what is left there."""
    last = max((at for at, side in enumerate(group.sides) if side.is_postgresql), default=1)
    lost = group.sides[1 - last]
    seen = list[int]()

    async def fail(connection: Connection) -> None:
        await lost.kill(connection)
        raise LookupError("mine")  # noqa: EM101  # the message is the test's

    async def work() -> None:
        async with atomic(*group.proxies):
            await group.add("none")
            connection = (await lost.db.session.connection()).sync_connection
            assert connection is not None
            group.sides[last].db.unit.before_commit(partial(fail, connection))
            for at, side in enumerate(group.sides):
                side.db.unit.on_rollback(partial(seen.append, at))

    with pytest.raises(InDoubtError, match="may be left prepared on") as raised:
        await work()
    assert isinstance(raised.value.__cause__, LookupError)
    assert (len(raised.value.in_doubt), raised.value.committed) == (1, ())
    assert lost.place in raised.value.in_doubt[0]
    assert sorted(seen) == [0, 1]
    assert [one.committed for one in await group.recover()] == [False]
    assert (await group.notes(), await group.prepared()) == (group.everywhere(), 0)


@each_group(PAIRS)
async def test_in_doubt_error_tells(group: Group) -> None:
    """The error names the transaction, what is committed and what is not, the command, and no password."""

    async def work() -> None:
        async with atomic(*group.proxies):
            await group.add("note")

    with (
        group.killing(1, "commit_twophase", 1),
        group.killing(0, "commit_twophase", 0),
        pytest.raises(InDoubtError, match=f"may be left prepared on .*run `python -m {MODULE}`") as raised,
    ):
        await work()
    error = raised.value
    assert isinstance(error.__cause__, BROKEN)
    assert len(error.in_doubt) == 2
    assert error.committed == ()
    for side in group.sides:
        await side.engine.dispose()
        (name,) = await side.prepared()
        assert error.transaction in str(name)
    resolved = await group.recover()
    assert {one.committed for one in resolved} == {True}
    assert len(resolved) == 2
    assert await group.notes() == group.everywhere("note")


@each_group([*PAIRS, *DRIVERS])
@pytest.mark.parametrize("done", [True, False])
async def test_one_database_used(group: Group, *, done: bool) -> None:
    """One database alone commits as every unit does: no hook says what became of a COMMIT that broke."""
    for place, side in enumerate(group.sides):
        seen = list[str]()

        async def work(side: Side = side, seen: list[str] = seen) -> None:
            async with atomic(*group.proxies):
                side.db.unit.on_commit(partial(seen.append, "commit"))
                side.db.unit.on_rollback(partial(seen.append, "rollback"))
                await side.add("note")

        with (
            group.on(place, "commit_twophase", partial(_break_commit, side, done))
            if side.is_postgresql
            else group.killing(place, "commit_twophase", place, done=done),
            pytest.raises(BROKEN, match=BROKEN_TEXT),
        ):
            await work()
        await group.recover()
        assert await group.prepared() == 0
        assert seen == [], place
        witness = side is group.sides[-1] and not any(one.is_postgresql for one in group.sides)
        assert await side.notes() == (["note"] if done or witness else []), place


def _break_commit(side: Side, done: bool, connection: Connection, *_: object) -> None:  # noqa: FBT001  # bound above
    """Kill a connection of PostgreSQL before its plain COMMIT, or after."""
    if done:
        connection.exec_driver_sql("COMMIT AND CHAIN")  # psycopg sends no COMMIT where nothing is open
    await_only(side.kill(connection))


@each_group([("mariadb", "mariadb")])
async def test_witness_that_would_not_last(group: Group) -> None:
    """Without PostgreSQL the last database must be written to, or nothing is committed."""
    first, last = group.sides

    async def work() -> None:
        async with atomic(*group.proxies):
            await first.add("none")
            await last.db.session.execute(text("SELECT 1"))

    with pytest.raises(UnexpectedRollbackError, match=r"atomic\(\) last the database that is"):
        await work()
    assert (await group.notes(), await group.prepared()) == (group.everywhere(), 0)


@each_group([("mariadb", "postgresql", "mariadb")])
async def test_database_that_was_only_read(group: Group) -> None:
    """What was prepared and has written nothing is forgotten by MariaDB, and does not stop recovery."""
    first, middle, last = group.sides

    async def work() -> None:
        async with atomic(*group.proxies):
            await first.add("note")
            await middle.add("note")
            await last.db.session.execute(text("SELECT * FROM note"))

    with (
        group.killing(0, "commit_twophase", 0),
        pytest.raises(InDoubtError, match="may be left prepared"),
    ):
        await work()
    await group.recover()
    assert (await group.notes(), await group.prepared()) == ([["note"], ["note"], []], 0)


# recover().


async def leave_behind(group: Group, note: str = "note") -> int:
    """Leave a transaction behind of which all is prepared; return how much that is."""

    async def work() -> None:
        async with atomic(*group.proxies):
            await group.add(note)

    with (
        group.killing(0, "commit_twophase", 0),
        group.killing(1, "commit_twophase", 1),  # whichever comes first
        pytest.raises(InDoubtError, match="may be left prepared"),
    ):
        await work()
    for side in group.sides:
        await side.engine.dispose()
        await side.alone()
    return await group.prepared()


@each_group(PAIRS[:3])
async def test_dry_run_changes_nothing(group: Group) -> None:
    """A dry run tells what would be done, and does not do it."""
    assert await leave_behind(group) == 2
    told = await group.recover(dry_run=True)
    assert (await group.prepared(), await group.notes()) == (2, group.everywhere())
    assert await group.recover() == told
    assert {one.committed for one in told} == {True}
    assert {one.database for one in told} == {side.place for side in group.sides}
    assert await group.recover() == []


@each_group(PAIRS)
async def test_young_ones_are_left_alone(group: Group) -> None:
    """What began later than `older_than` may be under way, and is left alone, by default too."""
    assert await leave_behind(group) == 2
    assert await group.recover(older_than=3600.0) == []
    assert await recover(*(side.engine for side in group.sides)) == []
    assert await group.prepared() == 2


@each_group([*PAIRS, *DRIVERS])
async def test_clocks_of_machines(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """How old a transaction is, the servers' clocks say: neither the application's nor the command's."""
    monkeypatch.setattr(time, "time", partial(_clock, time.time, -3600))
    assert await leave_behind(group) == 2
    assert await recover(*(side.engine for side in group.sides)) == []
    monkeypatch.setattr(time, "time", partial(_clock, time.time, 7200))
    assert await recover(*(side.engine for side in group.sides)) == []
    assert await group.prepared() == 2
    monkeypatch.setattr(time, "time", partial(_clock, time.time, -7200))
    assert [one.committed for one in await group.recover()] == [True, True]


def _clock(clock: Callable[[], float], ahead: float) -> float:
    return clock() + ahead


@each_group([MIXED])
async def test_age_is_told_once(group: Group) -> None:
    """A transaction that comes of age while recovery looks around is not seen in parts."""
    assert await leave_behind(group) == 2
    for first, second in (group.sides, group.sides[::-1]):
        of_age = max([await side.age() for side in group.sides]) + 0.3

        def wait(*_: object, second: Side = second, of_age: float = of_age) -> None:
            while await_only(second.age()) < of_age:
                pass

        event.listen(second.engine.sync_engine, "checkout", wait)
        assert await recover(first.engine, second.engine, older_than=of_age) == []
        event.remove(second.engine.sync_engine, "checkout", wait)
    assert await group.prepared() == 2


@pytest.fixture
def refusing_port() -> Iterator[int]:
    """A port of 127.0.0.1 that is nobody else's, and where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@each_group(PAIRS)
async def test_one_that_cannot_be_asked(group: Group, refusing_port: int) -> None:
    """While one of the databases does not answer, nothing is decided on the others."""
    assert await leave_behind(group) == 2
    for side, other in (group.sides, group.sides[::-1]):
        url = other.engine.url.set(host="127.0.0.1", port=refusing_port).difference_update_query(["host"])
        away = create_async_engine(url)
        with pytest.raises((OSError, DBAPIError), match=r"(?i)connect"):
            await recover(side.engine, away, older_than=YOUNG)
        await away.dispose()
    assert await group.prepared() == 2


@each_group([MIXED])
async def test_others_are_left_alone(group: Group) -> None:
    """Prepared transactions of other names are not touched."""
    postgresql, mariadb = group.sides
    theirs = f"uow_1_{uuid4().hex}_0_1"  # of an older release, or of nobody's
    await postgresql.engine.dispose()
    async with postgresql.engine.connect() as connection:
        await connection.execute(text("INSERT INTO note (text) VALUES ('theirs')"))
        await connection.exec_driver_sql(f"PREPARE TRANSACTION '{theirs}'")
    async with mariadb.engine.connect() as connection:
        await connection.exec_driver_sql(f"XA BEGIN '{theirs}'")
        await connection.execute(text("INSERT INTO note (text) VALUES ('theirs')"))
        await connection.exec_driver_sql(f"XA END '{theirs}'")
        await connection.exec_driver_sql(f"XA PREPARE '{theirs}'")
        await connection.invalidate()
    mariadb.names.add(theirs)
    assert await group.recover() == []
    assert await group.prepared() == 2


@each_group([MIXED])
async def test_other_groups_are_left_alone(
    group: Group, mariadb_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A server's transactions that were made with other databases are theirs to finish; a warning says so."""
    assert await leave_behind(group) == 2
    postgresql, mariadb = group.sides
    stranger = create_async_engine(mariadb_url)
    for engine in (postgresql.engine, mariadb.engine):
        assert await recover(engine, stranger, older_than=YOUNG) == []
    await stranger.dispose()
    assert await group.prepared() == 2
    for side in group.sides:
        assert all(name in caplog.text for name in await side.prepared())
    assert "left alone" in caplog.text


@pytest.fixture
def mariadb_by_socket_server(mariadb_server: URL) -> URL:
    """The MariaDB by its socket, so that the port which is not named is its own, as far as one can see."""

    async def find() -> object:
        async with Judge(mariadb_server) as judge:
            return await judge.scalar("SELECT @@socket")

    path = Path(str(asyncio.run(find())))
    if not path.exists():  # another machine's
        return mariadb_server
    named = mariadb_server
    return URL.create(
        *(named.drivername, named.username, named.password, named.host), query={"unix_socket": str(path)}
    )


@pytest.mark.parametrize("kinds", [("postgresql", "mariadb_by_socket")], ids=["postgresql mariadb"])
async def test_default_port(group: Group) -> None:
    """A port that is the database's own may be named or left out: the databases are the same."""
    assert await leave_behind(group) == 2
    for side in group.sides:
        await side.engine.dispose()
        await side.alone()
    named = [
        create_async_engine(
            side.engine.url.set(port=5432 if side.is_postgresql else 3306), poolclass=NullPool
        )
        for side in group.sides
    ]
    assert {side.engine.url.port for side in group.sides} != {engine.url.port for engine in named}
    assert [one.committed for one in await recover(*named, older_than=YOUNG)] == [True, True]
    assert await group.notes() == group.everywhere("note")


@each_group([("postgresql", "postgresql")])
async def test_databases_that_have_moved(group: Group, caplog: pytest.LogCaptureFixture) -> None:
    """At other addresses they are others, which the command tells and fails; it takes their set's name."""
    assert await leave_behind(group) == 2
    for side in group.sides:
        await side.engine.dispose()
    moved = [
        make_url(side.url).update_query_dict({"port": "5432"}).render_as_string(hide_password=False)
        for side in group.sides
    ]
    engines = [create_async_engine(url, poolclass=NullPool) for url in moved]
    assert await recover(*engines, older_than=YOUNG) == []
    (name,) = {message.split("group=")[1][1:9] for message in caplog.messages if "group=" in message}
    assert [one.committed for one in await recover(*engines, older_than=YOUNG, dry_run=True, group=name)]
    refused = await run(MODULE, "--older-than", "0.000001", *moved)
    assert (refused.status, refused.out, refused.err.count("left alone")) == (1, "", 2)
    done = await run(MODULE, "--older-than", "0.000001", "--group", name, *moved)
    assert (done.status, len(done.out.splitlines())) == (0, 2), done.err
    assert await group.notes() == group.everywhere("note")


@each_group(PAIRS)
async def test_recovery_at_the_same_time(group: Group) -> None:
    """Of several that run at a time each takes what another has finished for done, and none fails."""
    for note in range(3):
        await leave_behind(group, f"{note}")
    engines = [create_async_engine(side.url, poolclass=NullPool) for _ in range(4) for side in group.sides]
    found = await asyncio.gather(
        *(recover(*engines[at : at + 2], older_than=YOUNG) for at in range(0, len(engines), 2))
    )
    assert len({one.name for resolved in found for one in resolved}) == sum(map(len, found)) == 6
    assert (await group.notes(), await group.prepared()) == (group.everywhere("0", "1", "2"), 0)


@each_group([MIXED])
async def test_not_to_be_had_yet(group: Group) -> None:
    """One that MariaDB still keeps with a connection is no other's: nothing is decided before it is free."""
    mariadb = group.sides[1]
    async with atomic(*group.proxies):
        await group.add("note")
    ours = mariadb.names.pop().split("_")[3]
    name = f"uow_1_{uuid4().hex}_{ours}_2"
    mariadb.names.add(name)
    async with mariadb.engine.connect() as holder:
        await holder.exec_driver_sql(f"XA BEGIN '{name}'")
        await holder.execute(text("INSERT INTO note (text) VALUES ('held')"))
        await holder.exec_driver_sql(f"XA END '{name}'")
        await holder.exec_driver_sql(f"XA PREPARE '{name}'")
        with pytest.raises(DBAPIError, match="XAER_NOTA") as raised:
            await recover(*(side.engine for side in group.sides))
        assert raised.value.__notes__ == [mariadb.place]
        await holder.invalidate()
    assert [one.committed for one in await group.recover()] == [False]


@each_group([MIXED])
async def test_wrong_arguments(group: Group, sqlite_url: str) -> None:
    """Too few databases, one twice, one that prepares nothing, and wrong values are refused."""
    first, second = (side.engine for side in group.sides)
    lite = create_async_engine(sqlite_url)
    for wrong in ([], [first], [first, first], [first, create_async_engine(first.url)]):
        with pytest.raises(ConfigurationError, match="all databases of the transactions, each once"):
            await recover(*wrong, older_than=YOUNG)
    wrong_group: Any
    for wrong_group in ("", "shop", "0123456G", 12345678):
        with pytest.raises(ConfigurationError, match="group must be the eight letters and digits"):
            await recover(first, second, group=wrong_group)
    with pytest.raises(ConfigurationError, match="sqlite has no prepared transactions: leave it out"):
        await recover(first, lite)
    await lite.dispose()
    older: Any
    for older in (0, -1.0, float("nan"), "600", None):
        with pytest.raises(ConfigurationError, match="older_than"):
            await recover(first, second, older_than=older)


# A process dies; the command.


@frozen
class Ran:
    """What became of a process."""

    status: int | None
    out: str
    err: str

    @property
    def expected(self) -> int:
        """The status of success: MariaDB lists what other test runs have prepared, too."""
        return int("left alone" in self.err)


async def run(module: str, *arguments: str, **environment: str) -> Ran:
    """Run a module in a process of its own, and wait for its end."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error::RuntimeWarning", "-m", module, *arguments),
        stdout=PIPE,
        stderr=PIPE,
        env={**os.environ, **environment},
    )
    out, err = await process.communicate()
    return Ran(process.returncode, out.decode(), err.decode())


def with_password(group: Group) -> list[str]:
    """Return URLs whose password must not be shown; the servers here ask for none."""
    urls = [make_url(side.url) for side in group.sides]
    return [
        url.set(password="hunter2").render_as_string(hide_password=False)  # noqa: S106  # nobody's
        if url.get_backend_name() == "postgresql"
        else url.render_as_string(hide_password=False)
        for url in urls
    ]


@pytest.mark.slow
@each_group([*PAIRS[:3], *DRIVERS, TRIPLES[0]])
async def test_process_dies(group: Group) -> None:
    """Where a process dies at any step on any database, the command makes all or nothing of each."""
    places = len(group.sides)
    urls = with_password(group)
    crashed = await run("tests.support.crash", *urls)
    assert (crashed.status, crashed.err) == (0, "")
    for side in group.sides:
        side.names.update(crashed.out.split())
        await side.engine.dispose()
        await side.alone()
    left = await group.prepared()
    assert left == sum(range(places)) + sum(range(1, places + 1))
    told = await run(MODULE, "--dry-run", "--older-than", "0.000001", *urls)
    assert (told.status, await group.prepared()) == (told.expected, left)
    done = await run(MODULE, "--older-than", "0.000001", *urls)
    assert (done.status, done.out) == (done.expected, told.out), done.err
    assert "hunter2" not in done.out + done.err  # which may name those of other test runs
    lines = [line.split() for line in done.out.splitlines()]
    assert len(lines) == left
    assert sum(line[0] == "commit" for line in lines) == sum(range(1, places + 1))
    assert sum(line[:2] == ["roll", "back"] for line in lines) == sum(range(places))
    committed = [f"{place}-commit_twophase" for place in range(places)]
    assert (await group.notes(), await group.prepared()) == (group.everywhere(*committed), 0)
    again = await run(MODULE, "--older-than", "0.000001", *urls)
    assert (again.status, again.out) == (again.expected, ""), again.err


@each_group([MIXED])
async def test_command_reads_the_environment(group: Group) -> None:
    """A URL may come from the environment, where no list of processes shows it; young ones are left alone."""
    assert await leave_behind(group) == 2
    urls = {f"URL{at}": side.url for at, side in enumerate(group.sides)}
    names = [f"env:{name}" for name in urls]
    young = await run(MODULE, *names, **urls)
    assert (young.status, young.out, await group.prepared()) == (young.expected, "", 2)
    done = await run(MODULE, "--older-than", "0.000001", *names, **urls)
    assert (done.status, len(done.out.splitlines())) == (done.expected, 2), done.err
    assert await group.notes() == group.everywhere("note")


@each_group([MIXED])
async def test_command_names_what_fails(group: Group, refusing_port: int) -> None:
    """A database that does not answer, or lets nobody in, is one line that names it, and status 1."""
    first, second = (side.engine.url for side in group.sides)
    for wrong in (second.set(port=refusing_port), second.set(password="hunter2")):  # noqa: S106  # nobody's
        urls = [url.render_as_string(hide_password=False) for url in (first, wrong)]
        failed = await run(MODULE, *urls)
        place = URL.create(wrong.drivername, host=wrong.host, port=wrong.port, database=wrong.database)
        assert (failed.status, failed.out) == (1, "")
        assert failed.err.startswith(f"{place}: ")
        assert failed.err.count("\n") == 1
        assert "hunter2" not in failed.err


@each_group([MIXED])
async def test_command_refuses(group: Group, sqlite_url: str) -> None:
    """Wrong arguments end with status 2 and one line that says why, without a password."""
    first = with_password(group)[0]
    for arguments, said in (
        ([first], "all databases of the transactions"),
        ([first, "env:NOWHERE"], "NOWHERE"),
        ([first, sqlite_url], "sqlite has no prepared transactions"),
        (["--older-than", "-1", first, group.sides[1].url], "older_than"),
        ([first, "nonsense://app:hunter2@localhost/shop"], "nonsense"),
    ):
        refused = await run(MODULE, *arguments)
        assert (refused.status, refused.out) == (2, ""), refused.err
        assert said in refused.err
        assert "Traceback" not in refused.err
        assert "hunter2" not in refused.err
