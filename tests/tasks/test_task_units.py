"""`db(multi_sessions=True)`: a unit for each task that asks for a session."""

import asyncio
import contextvars
import gc
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import pairwise
from typing import Any

import anyio.to_thread
import pytest
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_async_sqlalchemy import (
    ConfigurationError,
    MissingSessionError,
    PoolTimeoutError,
    SessionNotInitialisedError,
    SessionProxy,
    UnitClosedError,
    UnitOfWork,
    create_middleware_and_session_proxy,
)
from tests.support.databases import JudgeFor
from tests.support.gate import closed, gate_of, passing
from tests.support.interruption import Interrupted, Moment
from tests.support.narrow import DEADLINE, ENDED, TIMEOUT, BoomError, read, write
from tests.support.site import Site, complaints
from tests.support.tables import ORPHAN, Note, Reply
from tests.support.versions import survives_cancellation
from tests.support.worker import open_worker

Db = SessionProxy[AsyncSession]
Unit = UnitOfWork[AsyncSession]
NO_PLACE = (
    r"had no free connection within 0\.2 seconds \(1 of 15 are checked out\): max_concurrent units of this "
    r"block have one, this task's own perhaps among them, so raise it, or end their transactions sooner\.\n"
)
EAGER = getattr(asyncio, "eager_task_factory", None)
"""What lets a task begin where it is made, and end there if it waits for nothing."""
MANY = 20_000
"""Tasks of each of three walks."""
RECORDED = pytest.mark.filterwarnings("ignore:record_property is incompatible:pytest.PytestWarning")
"""pytest writes properties of a test into every report, and warns of them if its schema is the strict one."""


@pytest.fixture
async def worker(postgresql_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """A process without an application, on PostgreSQL."""
    async with open_worker(postgresql_url, judge_for) as worker:
        yield worker


async def orphan(db: Db) -> None:
    """Write what makes COMMIT fail."""
    db.session.add(Reply(**ORPHAN))
    await db.session.flush()


async def test_each_task_has_a_unit_of_its_own(sqlite_worker: Site) -> None:
    """Each task finds the same unit and session whenever it asks, and no other task's."""
    db, barrier = sqlite_worker.db, asyncio.Barrier(3)

    async def work() -> tuple[Unit, AsyncSession]:
        unit, session = db.unit, db.session
        await read(db)
        await barrier.wait()
        assert (db.unit, db.session, unit.session) == (unit, session, session)
        return unit, session

    async with db(multi_sessions=True) as own:
        assert db.unit is own
        assert db.session is own.session
        found = await asyncio.gather(*(work() for _ in range(3)))
        assert db.unit is own
    assert len({id(unit) for unit in [own, *(unit for unit, _ in found)]}) == 4
    assert len({id(session) for _, session in found}) == 3
    assert all(unit.closed for unit, _ in found)
    assert own.closed


@pytest.mark.parametrize("commit_on_exit", [True, False])
async def test_outcome_of_each_task(
    worker: Site, caplog: pytest.LogCaptureFixture, *, commit_on_exit: bool
) -> None:
    """A task's unit is committed if the task returned, and rolled back if it failed or was cancelled."""
    db, written = worker.db, asyncio.Barrier(2)

    async def fail() -> None:
        await write(db, "failed")
        raise BoomError

    async def linger() -> None:
        await write(db, "cancelled")
        await written.wait()
        await asyncio.Event().wait()

    async with db(multi_sessions=True, commit_on_exit=commit_on_exit):
        await write(db, "block")
        tasks = [
            asyncio.create_task(work, name=name)
            for name, work in {"good": write(db, "good"), "bad": fail(), "slow": linger()}.items()
        ]
        await written.wait()
        tasks[2].cancel()
        await asyncio.wait(tasks)
    assert worker.checked_out() == 0
    assert await worker.notes() == (["block", "good"] if commit_on_exit else [])
    of_failures = [complaint for complaint in complaints(caplog) if "'bad'" in complaint]
    assert len(of_failures) == 1
    assert of_failures[0].startswith("WARNING: ")
    assert "failed in a unit of AsyncSession" in of_failures[0]
    discarded = [complaint for complaint in complaints(caplog) if "because nothing committed" in complaint]
    assert len(discarded) == (0 if commit_on_exit else 2)
    assert len(complaints(caplog)) == len(of_failures) + len(discarded)


async def test_task_is_settled_when_it_ends(worker: Site) -> None:
    """A task's unit is committed when the task has ended, while the block goes on."""
    db, committed = worker.db, asyncio.Event()

    async def work() -> None:
        db.unit.on_commit(committed.set)
        await write(db, "task")

    async with asyncio.timeout(DEADLINE), db(multi_sessions=True, commit_on_exit=True):
        await write(db, "block")
        await asyncio.create_task(work())
        await committed.wait()
        assert await worker.notes() == ["task"]
    assert await worker.notes() == ["block", "task"]


async def test_end_of_the_block_waits(worker: Site) -> None:
    """The block ends when the tasks that have a unit have ended, and waits for no other task."""
    db, begun, go, ends = worker.db, asyncio.Barrier(2), asyncio.Event(), list[str]()

    async def work() -> None:
        await write(db, "task")
        await begun.wait()
        await go.wait()
        ends.append("task")

    async def block() -> None:
        async with db(multi_sessions=True, commit_on_exit=True):
            stranger = asyncio.create_task(asyncio.Event().wait())
            strangers.append(stranger)
            working.append(asyncio.create_task(work()))
            await begun.wait()
        ends.append("block")

    strangers, working = list[asyncio.Task[Any]](), list[asyncio.Task[Any]]()
    running = asyncio.create_task(block())
    while not working:  # noqa: ASYNC110  # until the block has got so far
        await asyncio.sleep(0)
    await worker.notes()
    assert ends == []
    go.set()
    async with asyncio.timeout(DEADLINE):
        await running
    assert ends == ["task", "block"]
    assert worker.checked_out() == 0
    assert await worker.notes() == ["task"]
    strangers[0].cancel()
    await asyncio.wait(strangers)


@survives_cancellation
@pytest.mark.parametrize("how", ["error", "cancelled", "cancelled at its end"])
@pytest.mark.parametrize("inside", ["a statement", "a transaction"])
async def test_error_in_the_block(worker: Site, how: str, inside: str) -> None:
    """A block that fails gives the units of all its tasks up, and what they go on to do is refused."""
    db, gate = worker.db, gate_of(worker.engine, worker.judge)
    begun, go, tasks = asyncio.Event(), asyncio.Event(), list[asyncio.Task[Any]]()

    async def work() -> None:
        await write(db, "task")
        begun.set()
        await (db.session.execute(passing(gate)) if inside == "a statement" else go.wait())
        await write(db, "too late")

    async def block() -> None:
        async with db(multi_sessions=True, commit_on_exit=True):
            await write(db, "block")
            tasks.append(asyncio.create_task(work()))
            await (gate.reached() if inside == "a statement" else begun.wait())
            if how == "error":
                raise BoomError
            left.set()
            if how == "cancelled":
                await asyncio.Event().wait()

    left = asyncio.Event()
    async with closed(gate), asyncio.timeout(DEADLINE):
        running = asyncio.create_task(block())
        if how != "error":
            await left.wait()
            await worker.notes()
            running.cancel()
        with pytest.raises((BoomError, asyncio.CancelledError), match=r"^(boom)?$"):
            await running
        assert worker.checked_out() == 0
        go.set()
        with pytest.raises(UnitClosedError, match=ENDED):
            await tasks[0]
    assert await worker.notes() == []


@survives_cancellation
@pytest.mark.parametrize("moment", ["waiting", "done"])
@pytest.mark.parametrize("times", [1, 2])
async def test_cancelled_at_every_step(worker: Site, moment: Moment, times: int) -> None:
    """Wherever the block is cancelled, no connection is out once its tasks have ended."""
    db, step = worker.db, 0
    while True:
        step += 1
        tasks = list[asyncio.Task[None]]()

        async def block(step: int = step, tasks: list[asyncio.Task[None]] = tasks) -> None:
            async with db(multi_sessions=True, commit_on_exit=True):
                tasks.extend(asyncio.create_task(write(db, f"{step} {number}")) for number in range(2))
                await write(db, f"{step} block")

        running: asyncio.Task[Any]
        interrupted = Interrupted(
            block(),
            range(step, step + times),
            lambda: running.cancel(),  # noqa: B023, PLW0108  # this step's, made below
            moment,
        )

        async def outer(interrupted: Interrupted[None] = interrupted) -> None:
            await interrupted

        running = asyncio.create_task(outer())
        async with asyncio.timeout(DEADLINE):
            await asyncio.wait({running, *tasks})
            if tasks:
                ended, _ = await asyncio.wait(tasks)
                errors = [task.exception() for task in ended]
                assert {type(error) for error in errors} <= {type(None), UnitClosedError}
        assert worker.checked_out() == 0
        assert len(asyncio.all_tasks()) == 1
        if not interrupted.cancellations:
            assert running.exception() is None
            break
        assert running.cancelled()
    found = await worker.notes()
    assert [note for note in found if str(note).startswith(f"{step} ")] == [
        f"{step} {end}" for end in ("0", "1", "block")
    ]


@pytest.mark.parametrize("failures", [1, 2])
async def test_commit_that_fails_after_its_task(worker: Site, failures: int) -> None:
    """A COMMIT that fails when its task has ended is raised at the end of the block, several together."""

    async def block() -> None:
        async with worker.db(multi_sessions=True, commit_on_exit=True):
            await asyncio.gather(*(orphan(worker.db) for _ in range(failures)), write(worker.db, "task"))
            await write(worker.db, "block")

    expected = IntegrityError if failures == 1 else ExceptionGroup
    with pytest.raises(expected, match=r"foreign key|several units of work could not be committed") as raised:
        await block()
    assert type(raised.value) is expected
    if isinstance(raised.value, ExceptionGroup):
        assert [type(error) for error in raised.value.exceptions] == [IntegrityError] * failures
    assert worker.checked_out() == 0
    assert await worker.notes() == ["block", "task"]


async def test_commit_that_fails_in_a_block_that_fails(worker: Site) -> None:
    """The error of the block goes on, whatever became of its tasks."""

    async def block() -> None:
        async with worker.db(multi_sessions=True, commit_on_exit=True):
            await asyncio.create_task(orphan(worker.db))
            raise BoomError

    with pytest.raises(BoomError, match="boom"):
        await block()


@pytest.mark.parametrize("end", ["well", "error", "failing commit"])
async def test_after_the_block(worker: Site, end: str) -> None:
    """However the block ended, a task of it that asks for a session first then is refused."""
    db, go = worker.db, asyncio.Event()

    async def late() -> None:
        await go.wait()
        await write(db, "late")

    async def block() -> asyncio.Task[None]:
        async with db(multi_sessions=True, commit_on_exit=True):
            tasks.append(asyncio.create_task(late()))
            if end == "error":
                raise BoomError
            await (orphan(db) if end == "failing commit" else read(db))
        return tasks[0]

    tasks = list[asyncio.Task[None]]()
    if end == "well":
        await block()
    else:
        with pytest.raises((BoomError, IntegrityError), match=r"boom|foreign key"):
            await block()
    go.set()
    with pytest.raises(UnitClosedError, match=ENDED):
        await tasks[0]
    assert await worker.notes() == []


async def test_task_that_asks_while_the_block_commits(worker: Site) -> None:
    """A task that asks for its first session while the block commits is waited for, or refused."""
    db, go, asked, done = worker.db, asyncio.Event(), asyncio.Event(), asyncio.Event()
    sessions = list[AsyncSession]()

    async def late() -> None:
        await go.wait()
        try:
            sessions.append(db.session)
            await read(db)
        finally:
            asked.set()
        await done.wait()
        await write(db, "late")

    async def commit() -> None:
        go.set()
        await asked.wait()

    async def block() -> None:
        async with db(multi_sessions=True, commit_on_exit=True) as unit:
            tasks.append(asyncio.create_task(late()))
            unit.before_commit(commit)
            await write(db, "block")

    tasks = list[asyncio.Task[None]]()
    running = asyncio.create_task(block())
    async with asyncio.timeout(DEADLINE):
        await asked.wait()
        await asyncio.wait({running}, timeout=TIMEOUT)
        if running.done():
            held = worker.checked_out()
            done.set()
            await asyncio.wait(tasks)
            with pytest.raises(UnitClosedError, match=ENDED):
                await tasks[0]
            assert held == 0
            assert await worker.notes() == ["block"]
        else:
            done.set()
            await running
            assert await worker.notes() == ["block", "late"]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("asks", [False, True])
async def test_left_in_another_task(sqlite_worker: Site, *, asks: bool, fails: bool) -> None:
    """A block that is left in another task than it was entered in does not wait for that one."""
    db, context, found = sqlite_worker.db, contextvars.copy_context(), list[bool]()
    scope = db(multi_sessions=True, commit_on_exit=True)

    async def enter() -> None:
        unit = await scope.__aenter__()
        unit.on_commit(lambda: found.append(db.unit is unit))
        unit.session.add(Note(text="entering"))

    async def leave() -> None:
        if asks:
            db.session.add(Note(text="leaving"))
        await scope.__aexit__(*((BoomError, BoomError(), None) if fails else (None, None, None)))
        with pytest.raises(MissingSessionError, match="has no unit of work here"):
            _ = db.session

    async with asyncio.timeout(DEADLINE):
        for step in (enter(), write(db, "between"), leave()):
            await asyncio.get_running_loop().create_task(step, context=context)
    expected = ["between"] if fails else ["between", "entering", "leaving"]
    assert await sqlite_worker.notes() == [note for note in expected if asks or note != "leaving"]
    assert found == ([] if fails else [not asks])
    assert sqlite_worker.checked_out() == 0


async def test_entered_twice(sqlite_worker: Site) -> None:
    """The block serves one use."""
    scope = sqlite_worker.db(multi_sessions=True)
    async with scope:
        with pytest.raises(UnitClosedError, match=ENDED):
            await scope.__aenter__()
    with pytest.raises(UnitClosedError, match=ENDED):
        await scope.__aenter__()


async def test_without_an_engine() -> None:
    """Without an engine the block says how to give one."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    with pytest.raises(SessionNotInitialisedError, match="has no engine yet"):
        await db(multi_sessions=True).__aenter__()


async def test_outer_unit_comes_back(worker: Site) -> None:
    """Around the block the outer unit is current, and what it does is its own."""
    db = worker.db

    async def block(outer: Unit) -> None:
        async with db(multi_sessions=True, commit_on_exit=True):
            assert db.unit is not outer
            await write(db, "lost")
            raise BoomError

    async with db(commit_on_exit=True) as outer:
        await write(db, "outer")
        with pytest.raises(BoomError, match="boom"):
            await block(outer)
        assert db.unit is outer
    assert await worker.notes() == ["outer"]


@pytest.mark.parametrize("fails", [False, True])
async def test_hooks(sqlite_worker: Site, *, fails: bool) -> None:
    """Hooks find their own task's unit, and run with its outcome."""
    db, ran = sqlite_worker.db, list[tuple[str, Unit, Unit]]()

    async def work() -> None:
        unit = db.unit
        unit.on_commit(lambda: ran.append(("committed", unit, db.unit)))
        unit.on_rollback(lambda: ran.append(("rolled back", unit, db.unit)))
        await write(db, "task")
        if fails:
            raise BoomError

    async with db(multi_sessions=True, commit_on_exit=True) as own:
        own.on_commit(lambda: ran.append(("committed block", own, own)))
        await asyncio.gather(work(), return_exceptions=True)
    (outcome, unit, found), block = ran
    assert outcome == ("rolled back" if fails else "committed")
    assert found is unit is not own
    assert block == ("committed block", own, own)


@pytest.mark.skipif(EAGER is None, reason="Python has eager tasks since 3.12")
async def test_hooks_of_an_eager_task(sqlite_worker: Site) -> None:
    """The hooks of a task that ended without waiting find its own unit, too, and what they write is kept."""
    db, found = sqlite_worker.db, list[bool]()

    async def work() -> None:
        unit = db.unit
        unit.on_commit(lambda: found.append(db.unit is unit))
        unit.on_commit(lambda: write(db, "hook"))

    asyncio.get_running_loop().set_task_factory(EAGER)
    async with db(multi_sessions=True, commit_on_exit=True):
        await asyncio.create_task(work())
    assert found == [True]
    assert sqlite_worker.checked_out() == 0
    assert await sqlite_worker.notes() == ["hook"]


async def test_hook_that_writes(sqlite_worker: Site) -> None:
    """What a hook writes by its task's session is committed with a task that returned."""
    db = sqlite_worker.db

    async def work() -> None:
        db.unit.on_commit(lambda: write(db, "hook"))
        await write(db, "task")

    async with db(multi_sessions=True, commit_on_exit=True):
        await asyncio.create_task(work())
    assert sqlite_worker.checked_out() == 0
    assert await sqlite_worker.notes() == ["hook", "task"]


async def call_back(function: Callable[[], object]) -> None:
    """Have the event loop call a function outside of any task, in this one's context."""
    called = asyncio.get_running_loop().create_future()

    def call() -> None:
        try:
            called.set_result(function())
        except MissingSessionError as error:
            called.set_exception(error)

    asyncio.get_running_loop().call_soon(call)
    await called


Elsewhere = Callable[[Callable[[], object]], Awaitable[object]]
elsewhere = pytest.mark.parametrize("elsewhere", [asyncio.to_thread, anyio.to_thread.run_sync, call_back])
UNKNOWN_TASK = (
    r"has no unit of work for a thread or a callback of a db.per_task\(\) block, which may be any task's: "
    r"take `session = db\.session` in the task and hand that over, or open `async with db\(\):` around "
)


@elsewhere
async def test_thread_of_a_task(sqlite_worker: Site, elsewhere: Elsewhere) -> None:
    """What a task has done elsewhere is done in its own unit, and shares that one's outcome."""
    db, barrier = sqlite_worker.db, asyncio.Barrier(2)

    async def work(note: str) -> None:
        unit = db.unit
        await barrier.wait()
        await elsewhere(lambda: db.session.add(Note(text=note)))
        assert [one.text for one in unit.session.new if isinstance(one, Note)] == [note]
        if note == "bad":
            raise BoomError

    async with db(multi_sessions=True, commit_on_exit=True) as own:
        tasks = [asyncio.create_task(work(note)) for note in ("good", "bad")]
        await asyncio.wait(tasks)
        assert not own.session.new
    assert await sqlite_worker.notes() == ["good"]


@elsewhere
async def test_thread_of_a_task_s_hook(sqlite_worker: Site, elsewhere: Elsewhere) -> None:
    """What a hook does elsewhere is done in its task's unit, although that task has ended."""
    db, found = sqlite_worker.db, list[bool]()

    async def work() -> None:
        unit = db.unit
        unit.on_commit(lambda: elsewhere(lambda: found.append(db.unit is unit)))
        await read(db)

    async with db(multi_sessions=True, commit_on_exit=True):
        await asyncio.create_task(work())
    assert found == [True]


@elsewhere
async def test_thread_whose_task_is_not_known(sqlite_worker: Site, elsewhere: Elsewhere) -> None:
    """A task that has not asked for a session must hand one over; it never has the block's by accident."""
    db, refused = sqlite_worker.db, pytest.raises(MissingSessionError, match=UNKNOWN_TASK)

    def add(note: str, session: AsyncSession | None = None) -> None:
        (session or db.session).add(Note(text=note))

    async def work(note: str) -> None:
        with refused:
            await elsewhere(lambda: add("nobody's"))
        async with db(commit_on_exit=True):
            await elsewhere(lambda: add(f"{note} in a block"))
        session = db.session
        await elsewhere(lambda: add(note, session))

    async with db(multi_sessions=True, commit_on_exit=True):
        await asyncio.create_task(work("task"))
        await work("block")
    assert await sqlite_worker.notes() == ["block", "block in a block", "task", "task in a block"]


@pytest.mark.parametrize("propagation", ["required", "nested", "mandatory"])
async def test_join(sqlite_worker: Site, propagation: Any) -> None:
    """A block inside a task that joins the current unit joins the task's own."""
    db = sqlite_worker.db

    async def work() -> None:
        unit = db.unit
        async with db(propagation=propagation) as joined:
            assert joined is unit
            await write(db, "joined")

    async with db(multi_sessions=True, commit_on_exit=True):
        await asyncio.create_task(work())
    assert await sqlite_worker.notes() == ["joined"]


async def test_gather_inside(worker: Site) -> None:
    """A task inside may gather: each coroutine has a unit of its own again, and commits as the block does."""
    db = worker.db

    async def work() -> None:
        await write(db, "task")
        await db.gather(write(db, "a"), write(db, "b"))
        assert await worker.notes() == ["a", "b"]

    async with db(multi_sessions=True, commit_on_exit=True):
        await asyncio.create_task(work())
    assert await worker.notes() == ["a", "b", "task"]


@pytest.mark.parametrize("limit", [1, 2, 5])
async def test_so_many_connections(worker: Site, limit: int) -> None:
    """At most `max_concurrent` tasks have a connection at a time, however large the pool is."""
    db, taken = worker.db, list[int]()
    event.listen(worker.engine.pool, "checkout", lambda *_: taken.append(worker.checked_out()))

    async def work(number: int) -> None:
        await read(db)
        await db.session.commit()  # gives the place back, and asks for another
        await write(db, f"{number:02}")

    async with db(multi_sessions=True, max_concurrent=limit, commit_on_exit=True):
        async with asyncio.timeout(DEADLINE):
            await asyncio.gather(*(work(number) for number in range(20)))
    assert max(taken) == limit
    assert await worker.notes() == [f"{number:02}" for number in range(20)]


async def test_place_comes_back_from_failures(sqlite_worker: Site) -> None:
    """A place is given back by a task that fails, by one that is cancelled, and by one that never wrote."""
    db = sqlite_worker.db

    async def fail() -> None:
        await write(db, "lost")
        raise BoomError

    async def cancelled() -> None:
        await write(db, "lost")
        raise asyncio.CancelledError

    async def closing() -> None:
        await read(db)
        await db.session.close()

    async with db(multi_sessions=True, max_concurrent=1, commit_on_exit=True):
        async with asyncio.timeout(DEADLINE):
            for work in (fail, cancelled, closing, fail, closing):
                await asyncio.wait({asyncio.create_task(work())})
            await write(db, "block")
    assert await sqlite_worker.notes() == ["block"]


@survives_cancellation
async def test_cancelled_while_it_waits_for_a_place(sqlite_worker: Site) -> None:
    """A task that is cancelled while it waits for a place takes none along."""
    db = sqlite_worker.db
    async with asyncio.timeout(DEADLINE), db(multi_sessions=True, max_concurrent=1):
        await read(db)
        waiting = asyncio.create_task(read(db))
        await sqlite_worker.notes()
        assert not waiting.done()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError, match=r"^$"):
            await waiting
        await db.session.rollback()
        assert await asyncio.create_task(read(db)) == 1


async def test_deadline_while_a_place_is_waited_for(sqlite_worker: Site) -> None:
    """The deadline holds for a place as for a connection; the pool may have plenty."""
    db = sqlite_worker.db
    async with db(multi_sessions=True, max_concurrent=1, pool_timeout=TIMEOUT):
        await read(db)
        with pytest.raises(PoolTimeoutError, match=NO_PLACE) as raised:
            await asyncio.create_task(read(db))
        assert (raised.value.timeout, raised.value.retry_after) == (TIMEOUT, 1)
        assert raised.value.pool_status["checked_out"] == 1
        await db.session.rollback()
        assert await asyncio.create_task(read(db)) == 1


def test_wrong_combinations(sqlite_worker: Site) -> None:
    """A limit without `multi_sessions`, and a propagation with it, are refused."""
    with pytest.raises(ConfigurationError, match=r"write `db.per_task\(max_concurrent=...\)`"):
        sqlite_worker.db(max_concurrent=2)
    with pytest.raises(ConfigurationError, match="leave propagation='required' out"):
        sqlite_worker.db(multi_sessions=True, propagation="required")


def open_units() -> int:
    """How many units of this process are open."""
    gc.collect()
    return sum(isinstance(found, UnitOfWork) and not found.closed for found in gc.get_objects())


@pytest.mark.slow
@RECORDED
@pytest.mark.timeout(180)
async def test_many_tasks(sqlite_worker: Site, record_property: Callable[[str, object], None]) -> None:
    """Many tasks that have ended leave no entry, and memory as it was."""
    db = sqlite_worker.db

    async def work() -> None:
        assert not db.session.in_transaction()

    async def run(tasks: int) -> int:
        for _ in range(tasks // 100):
            await asyncio.gather(*(work() for _ in range(100)))
        while len(asyncio.all_tasks()) > 1:  # noqa: ASYNC110  # the last of them are being settled
            await asyncio.sleep(0)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    async with db(multi_sessions=True, commit_on_exit=True):
        tracemalloc.start(1)
        try:
            units = open_units()
            memory = [await run(tasks) for tasks in (1000, MANY, MANY, MANY)]
        finally:
            tracemalloc.stop()
        assert open_units() <= units
    growth = [after - before for before, after in pairwise(memory)]
    record_property("bytes grown", growth)
    # A pointer for each task would be a leak, which every walk shows; a table that something else makes anew,
    # as SQLAlchemy of all proxies in this process, is seen in one of them.
    assert min(growth) < 4 * MANY
