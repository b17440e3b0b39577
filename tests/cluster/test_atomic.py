"""Units of several databases that commit together, or not at all."""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import event, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from starlette.middleware import Middleware

from fastapi_async_sqlalchemy import (
    ConfigurationError,
    PoolTimeoutError,
    SessionNotInitialisedError,
    TransactionBegunError,
    UnexpectedRollbackError,
    UnitClosedError,
    atomic,
    create_middleware_and_session_proxy,
)
from tests.support.atomic import Group, Side, ended, open_group, urls_of
from tests.support.databases import JudgeFor
from tests.support.gate import closed, gate_of, passing
from tests.support.interruption import Interrupted, Moment
from tests.support.serving import asgi_client
from tests.support.site import complaints
from tests.support.tables import ORPHAN, Note, Reply
from tests.support.versions import survives_cancellation

PAIRS = [("postgresql", "postgresql"), ("postgresql", "mariadb"), ("mariadb", "postgresql")]
TRIPLE = ("postgresql", "mariadb", "postgresql")
BY_PSYCOPG = ("psycopg", "mariadb")
GROUPS = [*PAIRS, TRIPLE, ("mariadb", "mariadb"), BY_PSYCOPG]
MIXED = PAIRS[1]


def each_group(groups: Sequence[tuple[str, ...]]) -> pytest.MarkDecorator:
    """Run a test on groups of databases."""
    return pytest.mark.parametrize("kinds", groups, ids=" ".join)


every_group = each_group(GROUPS)
by_hand = pytest.mark.parametrize("way", ["session", "unit", "begin"])


@pytest.fixture
async def group(
    request: pytest.FixtureRequest, kinds: tuple[str, ...], databases: ExitStack, judge_for: JudgeFor
) -> AsyncIterator[Group]:
    """The databases, in use without an application."""
    urls = await asyncio.to_thread(lambda: list(urls_of(kinds, databases, request.getfixturevalue)))
    async with open_group(urls, judge_for) as group:
        yield group


# All of them, or none.


@every_group
async def test_all_commit(group: Group) -> None:
    """Leaving the block commits what was written to each, and leaves nothing prepared."""
    async with atomic(*group.proxies):
        await group.add("all")
        assert await group.notes() == group.everywhere()
    assert await group.notes() == group.everywhere("all")
    assert await group.prepared() == 0


@every_group
async def test_an_error_rolls_all_back(group: Group) -> None:
    """An error that leaves the block goes on, and nothing is committed."""

    async def work() -> None:
        async with atomic(*group.proxies):
            await group.add("none")
            raise LookupError("mine")  # noqa: EM101  # the message is the test's

    with pytest.raises(LookupError, match=r"^mine$"):
        await work()
    assert (await group.notes(), await group.prepared()) == (group.everywhere(), 0)


@pytest.mark.parametrize(
    ("kinds", "place"),
    [
        (kinds, place)
        for kinds in [*GROUPS, ("postgresql", "psycopg")]
        for place, kind in enumerate(kinds)
        if kind != "mariadb"
    ],
)
async def test_prepare_fails(group: Group, place: int) -> None:
    """A constraint that is checked when one is prepared, first or last, rolls all back."""

    async def work() -> None:
        async with atomic(*group.proxies):
            await group.add("none")
            group.sides[place].db.session.add(Reply(**ORPHAN))

    with pytest.raises(IntegrityError, match=r"(?i)foreign key"):
        await work()
    assert (await group.notes(), await group.prepared()) == (group.everywhere(), 0)
    async with atomic(*group.proxies):
        await group.add("next")
    assert await group.notes() == group.everywhere("next")


@pytest.mark.parametrize(
    ("kinds", "place"), [(kinds, place) for kinds in GROUPS for place in range(len(kinds))]
)
async def test_swallowed_statement_error(group: Group, place: int) -> None:
    """PREPARE of a transaction that PostgreSQL has given up raises; MariaDB's is whole, and is committed."""
    side = group.sides[place]

    async def work() -> None:
        async with atomic(*group.proxies):
            await group.add("note")
            with pytest.raises(DBAPIError, match="nowhere"):
                await side.db.session.execute(text("INSERT INTO nowhere VALUES (1)"))

    if side.is_postgresql:
        with pytest.raises(UnexpectedRollbackError, match="a statement in it failed"):
            await work()
    else:
        await work()
    expected = group.everywhere() if side.is_postgresql else group.everywhere("note")
    assert (await group.notes(), await group.prepared()) == (expected, 0)


@pytest.mark.parametrize(
    ("kinds", "used"),
    [
        (kinds, used)
        for kinds in GROUPS
        for count in range(len(kinds))
        for used in itertools.combinations(range(len(kinds)), count)
    ],
)
async def test_some_are_used(group: Group, used: tuple[int, ...]) -> None:
    """Where one is not used, the others commit; one alone, and none, ask nothing of the unused."""
    begun = Counter[int]()
    for at, side in enumerate(group.sides):
        event.listen(side.engine.sync_engine, "begin_twophase", partial(_count, begun, at))
    async with atomic(*group.proxies):
        for at in used:
            await group.sides[at].add("mine")
    witness = {len(group.sides) - 1} if len(used) > 1 else set[int]()
    assert begun == Counter({*used, *witness})
    assert await group.notes() == [["mine"] if at in used else [] for at in range(len(group.sides))]
    assert await group.prepared() == 0


def _count(begun: Counter[int], at: int, *_: object) -> None:
    begun[at] += 1


@every_group
async def test_unflushed_objects_are_written(group: Group) -> None:
    """Objects that were only added are written when their database is prepared."""
    async with atomic(*group.proxies):
        for side in group.sides:
            side.db.session.add(Note(text="added"))
    assert await group.notes() == group.everywhere("added")


@every_group
async def test_transaction_without_a_statement(group: Group) -> None:
    """A transaction that was begun and sent nothing commits with the others."""
    async with atomic(*group.proxies):
        await group.sides[0].add("mine")
        await group.sides[1].add("mine")
        last = group.sides[-1].db.session
        note = Note(text="never")
        last.add(note)
        last.expunge(note)
    expected = [["mine"], ["mine"], []][: len(group.sides)]
    expected[-1] = ["mine"] if len(group.sides) == 2 else []
    assert (await group.notes(), await group.prepared()) == (expected, 0)


@every_group
async def test_nothing_was_written(group: Group) -> None:
    """A block that has only read ends well, whichever databases it has read, and leaves nothing prepared."""
    seen = list[int]()
    async with atomic(*group.proxies):
        for at, side in enumerate(group.sides):
            side.db.unit.on_commit(partial(seen.append, at))
            assert list(await side.db.session.scalars(select(Note.text))) == []
    assert (seen, await group.prepared()) == (list(range(len(group.sides))), 0)


@each_group([("mariadb", "mariadb")])
async def test_hooks_may_write(group: Group) -> None:
    """A block that has only read, and has before_commit hooks, is not taken for one that writes nothing."""

    async def work() -> None:
        async with atomic(*group.proxies):
            for side in group.sides:
                assert list(await side.db.session.scalars(select(Note.text))) == []
                side.db.unit.before_commit(partial(side.add, "hook"))

    with pytest.raises(UnexpectedRollbackError, match="nothing was written to the last database"):
        await work()
    assert (await group.notes(), await group.prepared()) == (group.everywhere(), 0)


@every_group
async def test_savepoint_left_open(group: Group) -> None:
    """A savepoint that nobody has ended is released, as by every commit."""
    async with atomic(*group.proxies):
        await group.add("before")
        for side in group.sides:
            await side.db.session.begin_nested()
        await group.add("inside")
    assert await group.notes() == group.everywhere("before", "inside")


# What belongs to the block is not the caller's.


@every_group
@by_hand
async def test_commit_by_hand(group: Group, way: str) -> None:
    """To commit one by hand raises, whoever asks, and nothing is committed."""

    async def work(side: Side) -> None:
        async with atomic(*group.proxies):
            if way == "begin":
                async with side.db.session.begin():
                    await group.add("none")
            await group.add("none")
            await (side.db.unit.commit() if way == "unit" else side.db.session.commit())

    for side in group.sides:
        with pytest.raises(TransactionBegunError, match=r"atomic\(\) commits it with those of the other"):
            await work(side)
    assert (await group.notes(), await group.prepared()) == (group.everywhere(), 0)


@every_group
@pytest.mark.parametrize("way", ["session", "unit"])
async def test_roll_back_by_hand(group: Group, way: str) -> None:
    """A rollback by hand undoes what that database has; what it writes then commits with the rest."""
    for number, side in enumerate(group.sides):
        async with atomic(*group.proxies):
            await group.add(f"{number} early")
            await (side.db.unit.rollback() if way == "unit" else side.db.session.rollback())
            await group.add(f"{number} late")
    notes = await group.notes()
    for number, found in enumerate(notes):
        assert f"{number} early" not in found
        assert len(found) == 2 * len(group.sides) - 1
    assert await group.prepared() == 0


@every_group
async def test_set_rollback_only(group: Group, caplog: pytest.LogCaptureFixture) -> None:
    """One that was given up rolls all back without a word, and the hooks see a rollback."""
    seen = list[int]()
    for place, side in enumerate(group.sides):
        async with atomic(*group.proxies):
            await group.add("none")
            for at, other in enumerate(group.sides):
                other.db.unit.on_commit(lambda: seen.append(-1))
                other.db.unit.on_rollback(partial(seen.append, at))
            side.db.unit.set_rollback_only()
        assert sorted(seen) == list(range(len(group.sides))), place
        seen.clear()
    assert (await group.notes(), await group.prepared()) == (group.everywhere(), 0)
    assert complaints(caplog) == []


# Hooks.


@every_group
async def test_on_commit_runs_after_all(group: Group) -> None:
    """The on_commit hooks run in order when all have committed, with no connection held."""
    seen = list[tuple[int, list[list[object]], list[int]]]()

    async def look(at: int) -> None:
        seen.append((at, await group.notes(), group.checked_out()))

    async with atomic(*group.proxies):
        for at, side in reversed(list(enumerate(group.sides))):
            side.db.unit.on_commit(partial(look, at))
            side.db.unit.on_rollback(partial(look, -1))
        await group.add("all")
    nothing = [0] * len(group.sides)
    assert seen == [(at, group.everywhere("all"), nothing) for at in range(len(group.sides))]


@every_group
async def test_on_rollback_runs_for_all(group: Group) -> None:
    """Where the last cannot be prepared, the on_rollback hooks of all run, each once."""
    seen = Counter[int]()

    async def work() -> None:
        async with atomic(*group.proxies):
            for at, side in enumerate(group.sides):
                side.db.unit.on_commit(partial(seen.update, [-1]))
                side.db.unit.on_rollback(partial(seen.update, [at]))
            await group.add("none")

    with (
        group.on(-1, "prepare_twophase", _refuse),
        pytest.raises(LookupError, match="refused"),
    ):
        await work()
    assert seen == Counter(range(len(group.sides)))
    assert (await group.notes(), await group.prepared()) == (group.everywhere(), 0)


def _refuse(*_: object) -> None:
    raise LookupError("refused")  # noqa: EM101  # the message is the test's


@every_group
@pytest.mark.parametrize("written", [True, False])
async def test_before_commit_writes(group: Group, written: bool) -> None:  # noqa: FBT001  # a parameter
    """What before_commit writes is committed with the rest, also in a unit that had written nothing."""
    async with atomic(*group.proxies):
        for side in group.sides:
            if written:
                await side.add("body")
            side.db.unit.before_commit(partial(side.add, "hook"))
    assert await group.notes() == group.everywhere(*(["body", "hook"] if written else ["hook"]))


@every_group
@pytest.mark.parametrize("written", [True, False])
async def test_before_commit_fails(group: Group, written: bool) -> None:  # noqa: FBT001  # a parameter
    """An error in before_commit, of the first or of the last, rolls all back."""

    async def fail() -> None:
        raise LookupError("in the hook")  # noqa: EM101, TRY003  # the message is the test's

    for side in (group.sides[0], group.sides[-1]):

        async def work(side: Side = side) -> None:
            async with atomic(*group.proxies):
                side.db.unit.before_commit(fail)
                for other in group.sides:
                    if written or other is not side:
                        await other.add("none")

        with pytest.raises(LookupError, match="in the hook"):
            await work()
        assert (await group.notes(), await group.prepared()) == (group.everywhere(), 0)


# Blocks inside.


@each_group([MIXED])
@pytest.mark.parametrize("propagation", ["required", "mandatory", "nested"])
async def test_joined_block(group: Group, propagation: Any) -> None:
    """A block that joins one of the units shares its outcome."""
    async with atomic(*group.proxies):
        for side in group.sides:
            async with side.db(propagation=propagation):
                await side.add("joined")
    assert await group.notes() == group.everywhere("joined")


@each_group([MIXED])
async def test_joined_block_fails(group: Group) -> None:
    """A joined block whose error was swallowed lets nothing commit."""
    for side in group.sides:

        async def work(side: Side = side) -> None:
            async with atomic(*group.proxies):
                await group.add("none")
                try:
                    async with side.db(propagation="required"):
                        raise LookupError  # noqa: TRY301  # it is the block's error
                except LookupError:
                    pass

        with pytest.raises(UnexpectedRollbackError, match="a block that had joined it failed"):
            await work()
        assert (await group.notes(), await group.prepared()) == (group.everywhere(), 0)


@each_group([MIXED])
async def test_savepoint_that_fails(group: Group) -> None:
    """A savepoint inside is undone alone."""
    async with atomic(*group.proxies):
        await group.add("kept")
        for side in group.sides:
            with pytest.raises(IntegrityError, match=r"(?i)duplicate"):
                async with side.db.unit.savepoint():
                    await side.db.session.execute(text("INSERT INTO note (text) VALUES ('kept')"))
    assert await group.notes() == group.everywhere("kept")


@each_group([MIXED])
async def test_independent_block(group: Group) -> None:
    """A unit of its own inside commits by itself, whatever becomes of the units around it."""

    async def work() -> None:
        async with atomic(*group.proxies):
            await group.add("outside")
            for side in group.sides:
                async with side.db(commit_on_exit=True):
                    await side.add("inside")
            raise LookupError("outside")  # noqa: EM101  # the message is the test's

    with pytest.raises(LookupError, match="outside"):
        await work()
    assert await group.notes() == group.everywhere("inside")


@every_group
async def test_atomic_inside_atomic(group: Group) -> None:
    """A block inside has an outcome of its own; the names of the one around stay one transaction's."""
    async with atomic(*group.proxies):
        await group.sides[0].add("outer")
        async with atomic(*group.proxies):
            await group.add("inner")
        assert await group.notes() == group.everywhere("inner")
        for side in group.sides[1:]:
            await side.add("outer")
    assert await group.notes() == group.everywhere("inner", "outer")
    counted = Counter(name.split("_")[2] for side in group.sides for name in side.names)
    assert set(counted.values()) == {len(group.sides)}


@every_group
async def test_gather_inside(group: Group) -> None:
    """The units of gather() inside are ordinary ones: each commits by itself."""
    for side in group.sides:
        names = len(side.names)
        async with atomic(*group.proxies):
            await group.sides[0].add(f"{group.sides.index(side)} outer")
            jobs = [side.add(f"{group.sides.index(side)} child {number}") for number in range(3)]
            await side.db.gather(*jobs, commit_on_exit=True)
        assert len(side.names) - names <= 1
    for number, notes in enumerate(await group.notes()):
        children = [f"{number} child {child}" for child in range(3)]
        assert [note for note in notes if "child" in str(note)] == children
    assert await group.prepared() == 0


# In an application.


def transferring_app(group: Group, *middlewares: Middleware) -> FastAPI:
    """Make an application that writes to all, and fails where it is asked to."""
    app = FastAPI(middleware=list(middlewares))

    @app.post("/{note}")
    async def write(note: str) -> str:
        async with atomic(*group.proxies):
            await group.add(note)
            if note == "fail":
                raise LookupError(note)
        return note

    return app


@each_group([*PAIRS])
@pytest.mark.parametrize("mounted", [True, False])
@pytest.mark.parametrize("commits", [True, False])
async def test_in_a_request(group: Group, *, mounted: bool, commits: bool) -> None:
    """A request may use it, with the middlewares and without them; the request's own units are apart."""
    middlewares = [
        Middleware(side.middleware, custom_engine=side.engine, commit_on_exit=commits) for side in group.sides
    ]
    app = transferring_app(group, *(middlewares if mounted else []))

    @app.get("/")
    async def both() -> list[list[str]]:
        if mounted:
            await group.add("request")
        async with atomic(*group.proxies):
            await group.add("atomic")
        return [list(await side.db.session.scalars(select(Note.text))) for side in group.sides if mounted]

    async with asgi_client(app, raise_app_exceptions=False) as client:
        assert (await client.post("/fail")).status_code == 500
        assert (await client.post("/write")).json() == "write"
        assert await group.notes() == group.everywhere("write")
        assert (await client.get("/")).status_code == 200
    for side in group.sides:
        side.db.bind(side.engine)  # the application may have let go of it
    request = ["request"] if mounted and commits else []
    assert await group.notes() == group.everywhere("atomic", *request, "write")


# Misuse.


@each_group([MIXED])
async def test_serves_one_use(group: Group) -> None:
    """Entered a second time, inside itself or later, it raises and harms nothing."""
    block = atomic(*group.proxies)
    async with block:
        await group.add("once")
        with pytest.raises(
            UnitClosedError, match=r"can be used only once: .* `async with atomic\(\.\.\.\):`"
        ):
            await block.__aenter__()
    with pytest.raises(UnitClosedError, match="can be used only once"):
        await block.__aenter__()
    assert await group.notes() == group.everywhere("once")


@each_group([MIXED])
async def test_wrong_arguments(group: Group) -> None:
    """One database, the same twice, no proxy, and a database without an engine are refused at once."""
    first, second = group.proxies
    _, same = create_middleware_and_session_proxy(AsyncSession)
    same.bind(create_async_engine(group.sides[0].url))
    _, unbound = create_middleware_and_session_proxy(AsyncSession)
    nonsense: Any = "postgresql://app:secret@localhost/shop"
    for wrong in ([], [first], [first, first], [first, same], [first, second, same]):
        with pytest.raises(ConfigurationError, match="two databases or more, each with a different URL"):
            atomic(*wrong)
    with pytest.raises(ConfigurationError, match=r"must be proxies such as `db`, not (?!.*secret)"):
        atomic(first, nonsense)
    with pytest.raises(SessionNotInitialisedError, match="has no engine yet"):
        atomic(first, unbound)
    same.unbind()


@each_group(PAIRS)
@pytest.mark.parametrize("way", ["argument", "option"])
async def test_autocommit_is_refused(group: Group, way: str) -> None:
    """An engine whose statements commit by themselves could not be rolled back: it is refused at once."""
    level = {"isolation_level": "AUTOCOMMIT"}
    arguments: Any = level if way == "argument" else {"execution_options": level}
    for side in group.sides:
        _, other = create_middleware_and_session_proxy(AsyncSession)
        proxies = [other if one is side.db else one for one in group.proxies]
        async with other.connect(side.url, engine_args=arguments):
            with pytest.raises(ConfigurationError, match=r"is in AUTOCOMMIT, and .* could not roll it back"):
                atomic(*proxies)


@each_group([MIXED])
async def test_sqlite_is_refused(group: Group, sqlite_url: str) -> None:
    """SQLite has no two-phase commit: it is refused before anything is opened."""
    _, lite = create_middleware_and_session_proxy(AsyncSession)
    async with lite.connect(sqlite_url):
        with pytest.raises(ConfigurationError, match="sqlite has no two-phase commit: leave it out"):
            atomic(group.proxies[0], lite)


@each_group([MIXED])
async def test_read_only_pair(group: Group) -> None:
    """A pair that only reads may take part on PostgreSQL, where that is enforced, and nowhere else."""
    postgresql, mariadb = group.sides
    _, reads = create_middleware_and_session_proxy(AsyncSession, read_only=True)
    async with reads.connect(mariadb.url):
        with pytest.raises(ConfigurationError, match="read_only cannot be enforced on two-phase"):
            atomic(postgresql.db, reads)
    async with reads.connect(postgresql.url):

        async def work() -> None:
            async with atomic(mariadb.db, reads):
                await mariadb.add("none")
                await reads.session.execute(text("INSERT INTO note (text) VALUES ('none')"))

        with pytest.raises(DBAPIError, match="read-only transaction"):
            await work()
        async with atomic(mariadb.db, reads):
            await mariadb.add("one")
            assert list(await reads.session.scalars(select(Note.text))) == []
    assert await group.notes() == [[], ["one"]]


# What is under way at the block's end.


@every_group
async def test_unread_stream(group: Group) -> None:
    """A stream that nobody has read to its end does not keep the block from committing."""
    async with atomic(*group.proxies):
        for side in group.sides:
            for number in range(3):
                await side.add(str(number))
            stream = await side.db.session.stream(select(Note.text))
            assert await anext(stream) is not None
    assert await group.notes() == group.everywhere("0", "1", "2")


@survives_cancellation
@every_group
async def test_task_in_a_statement(group: Group) -> None:
    """A child task in the middle of a statement is waited for, as by every unit that commits."""
    for side in group.sides:
        gate = gate_of(side.engine, side.judge)
        name = str(group.sides.index(side))

        async with closed(gate):
            task = asyncio.create_task(_leave_at_gate(group, side, name, passing(gate)))
            await gate.reached()
            assert not task.done()
        await (await task)
    assert await group.notes() == group.everywhere(*map(str, range(len(group.sides))))


async def _leave_at_gate(group: Group, side: Side, name: str, statement: Any) -> asyncio.Task[Any]:
    """Leave the block while a child waits at a gate; return the child."""
    async with atomic(*group.proxies):
        await group.add(name)
        executing: Coroutine[Any, Any, Any] = side.db.session.execute(statement)
        child = asyncio.create_task(executing)
        await asyncio.sleep(0)
    return child


@survives_cancellation
@every_group
@pytest.mark.parametrize("moment", ["waiting", "done"])
async def test_cancelled_anywhere(group: Group, moment: Moment) -> None:
    """Cancelled at any suspension, all is committed or nothing, and nothing stays prepared or checked out."""
    committed = list[bool]()
    for point in itertools.count(1):
        await _write(group, f"{point:03} warm")  # as many suspensions each time: no connection is to be made
        interrupted = Interrupted(_write(group, f"{point:03}"), {point}, lambda: task.cancel(), moment)  # noqa: B023, PLW0108  # made below
        task = asyncio.create_task(_finish(interrupted))
        assert await ended(task) == (interrupted.cancellations > 0), point
        found = [f"{point:03}" in notes for notes in await group.notes()]
        assert len(set(found)) == 1, point
        assert (await group.prepared(), set(group.checked_out())) == (0, {0}), point
        committed.append(found[0])
        if not interrupted.cancellations:
            break
    assert not committed[0]
    assert committed[-2:] == [True, True]  # the end is seen through once it has begun


async def _write(group: Group, note: str) -> None:
    async with atomic(*group.proxies):
        await group.add(note)


async def _finish(interrupted: Interrupted[None]) -> None:
    await interrupted


# Many at a time.


@each_group(PAIRS)
async def test_many_transfers(group: Group) -> None:
    """Thirty transfers at a time, some of which fail before or in the commit, keep the sum of both."""
    source, target = group.sides
    for side in group.sides:
        await side.judge.execute("CREATE TABLE account (id INTEGER PRIMARY KEY, amount INTEGER NOT NULL)")
        await side.judge.execute("INSERT INTO account VALUES (0, 1000), (1, 1000), (2, 1000)")

    async def transfer(number: int) -> None:
        async with atomic(*group.proxies):
            for side, amount in ((source, -number), (target, number)):
                values = {"amount": amount, "id": number % 3}
                await side.db.session.execute(
                    text("UPDATE account SET amount = amount + :amount WHERE id = :id"), values
                )
                if number % 5 == 0:
                    raise LookupError(number)
            if number % 7 == 0:
                broken = source if source.is_postgresql else target
                broken.db.session.add(Reply(**ORPHAN))

    results = await asyncio.gather(*map(transfer, range(30)), return_exceptions=True)
    failing = {number for number in range(30) if number % 5 == 0 or number % 7 == 0}
    assert {number for number, result in enumerate(results) if result is not None} == failing
    moved = sum(set(range(30)) - failing)
    sums = [await side.judge.scalar("SELECT sum(amount) FROM account") for side in group.sides]
    assert [int(str(value)) for value in sums] == [3000 - moved, 3000 + moved]
    assert await group.prepared() == 0


@each_group([MIXED])
async def test_no_connection_comes_free(group: Group, judge_for: JudgeFor) -> None:
    """Where one of them has no connection in time, nothing is committed on the others."""
    urls = [side.url for side in group.sides]
    async with open_group(urls, judge_for, pool_size=1, max_overflow=0, pool_timeout=0.05) as small:
        for side in small.sides:
            async with side.db.engine.connect():

                async def work() -> None:
                    async with atomic(*small.proxies):
                        await small.add("none")

                with pytest.raises(PoolTimeoutError, match="had no free connection"):
                    await work()
    assert (await group.notes(), await group.prepared()) == (group.everywhere(), 0)
