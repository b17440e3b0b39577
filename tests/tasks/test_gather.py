"""`db.gather` and `db.task_group`: each coroutine in a unit of its own, and none left behind."""

import asyncio
import gc
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from typing import Any

import pytest
from attrs import Factory, define
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_async_sqlalchemy import (
    ConfigurationError,
    ReadOnlyError,
    SessionNotInitialisedError,
    SessionProxy,
    UnitOfWork,
    create_middleware_and_session_proxy,
)
from tests.support.databases import JudgeFor
from tests.support.gate import closed, gate_of, passing
from tests.support.interruption import Interrupted, Moment
from tests.support.site import MakeSite, Site, complaints
from tests.support.tables import Note
from tests.support.versions import survives_cancellation
from tests.support.worker import open_worker

Db = SessionProxy[AsyncSession]
Unit = UnitOfWork[AsyncSession]
Work = Coroutine[Any, Any, Any]
DEADLINE = 30
"""Seconds after which something hangs, however busy the machine is."""


@pytest.fixture
async def worker(postgresql_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """A process without an application, on PostgreSQL."""
    async with open_worker(postgresql_url, judge_for) as worker:
        yield worker


class BoomError(Exception):
    """The error of a test's own."""

    def __init__(self, text: str = "boom") -> None:
        super().__init__(text)


class EmptyError(Exception):
    """An error that is false in a condition, as a collection of no errors is."""

    def __len__(self) -> int:
        return 0


async def write(db: Db, note: str, *, error: BaseException | None = None) -> str:
    """Write a note, and return it or fail."""
    db.session.add(Note(text=note))
    await db.session.flush()
    if error is not None:
        raise error
    return note


async def read(db: Db) -> object:
    """Read in the current unit."""
    return await db.session.scalar(select(1))


async def answer(value: object = None) -> object:
    """Return without a database."""
    return value


async def by_gather(db: Db, *coroutines: Work, **options: Any) -> list[Any]:
    """Run coroutines by `db.gather`."""
    found: list[Any] = await db.gather(*coroutines, **options)
    return found


async def by_group(db: Db, *coroutines: Work, **options: Any) -> list[Any]:
    """Run coroutines by `db.task_group`."""
    async with db.task_group(**options) as group:
        tasks = [group.create_task(coroutine) for coroutine in coroutines]
    return [task.result() for task in tasks]


Run = Callable[..., Coroutine[Any, Any, list[Any]]]
both_ways = pytest.mark.parametrize("run", [by_gather, by_group])


def assert_closed(*coroutines: Work) -> None:
    """See that nobody can be told of a coroutine that was never awaited."""
    states = [inspect.getcoroutinestate(coroutine) for coroutine in coroutines]
    for coroutine in coroutines:
        coroutine.close()  # a failure here is not to be told of in other tests, too
    assert states == [inspect.CORO_CLOSED for _ in coroutines]
    gc.collect()


# A unit for each.


@both_ways
async def test_each_has_a_unit_of_its_own(worker: Site, run: Run) -> None:
    """Each coroutine has a unit and a session that no other one has, and the caller keeps his own."""

    async def look() -> tuple[Unit, AsyncSession]:
        await read(worker.db)
        return worker.db.unit, worker.db.session

    async with worker.db() as unit:
        await read(worker.db)
        found = await run(worker.db, look(), look(), look())
        assert worker.db.unit is unit
        assert worker.checked_out() == 1
    assert len({id(unit), *(id(its) for its, _ in found)}) == 4
    assert len({id(session) for _, session in found}) == 3
    assert all(its.closed for its, _ in found)


@both_ways
async def test_results_in_order(sqlite_worker: Site, run: Run) -> None:
    """Results come in the order of the arguments, whoever ends first."""
    ended = [asyncio.Event() for _ in range(4)]
    ended[3].set()

    async def work(number: int) -> int:
        await ended[number + 1].wait()
        ended[number].set()
        return number

    assert await run(sqlite_worker.db, *(work(number) for number in range(3))) == [0, 1, 2]


async def test_nothing_given(sqlite_worker: Site) -> None:
    """Nothing to run has no results, and an empty group ends at once."""
    assert await sqlite_worker.db.gather() == []
    assert await sqlite_worker.db.gather(return_exceptions=True, max_concurrent=1) == []
    async with sqlite_worker.db.task_group():
        pass


@define(eq=False)
class Crowd:
    """Counts who runs at the same time, and lets nobody go before so many have come."""

    expected: int
    running: int = 0
    most: int = 0
    full: asyncio.Event = Factory(asyncio.Event)
    leaving: asyncio.Event = Factory(asyncio.Event)

    async def visit(self, db: Db) -> None:
        """Come, wait, and go."""
        await read(db)
        self.running += 1
        self.most = max(self.most, self.running)
        if self.running == self.expected:
            self.full.set()
        await self.leaving.wait()
        self.running -= 1


@both_ways
@pytest.mark.parametrize(("limit", "expected"), [(1, 1), (3, 3), (None, 8)])
async def test_so_many_at_a_time(sqlite_worker: Site, run: Run, limit: int | None, expected: int) -> None:
    """At most `max_concurrent` coroutines run at a time, each with a connection; all in the end."""
    crowd = Crowd(expected)
    task = asyncio.create_task(  # noqa: RUF006  # awaited below
        run(sqlite_worker.db, *(crowd.visit(sqlite_worker.db) for _ in range(8)), max_concurrent=limit)
    )
    async with asyncio.timeout(DEADLINE):
        await crowd.full.wait()
        assert sqlite_worker.checked_out() == expected
        await sqlite_worker.notes()  # a round trip, in which one too many could have come
        assert crowd.running == sqlite_worker.checked_out() == expected
        crowd.leaving.set()
        assert await task == [None] * 8
    assert crowd.most == expected
    assert sqlite_worker.checked_out() == 0


# Failures.


@survives_cancellation
@both_ways
@pytest.mark.parametrize("inside", ["a statement", "a transaction"])
async def test_failure(locking_worker: Site, run: Run, inside: str) -> None:
    """One that fails undoes itself and those under way, all settled before the error leaves."""
    worker, db = locking_worker, locking_worker.db
    gate = gate_of(worker.engine, worker.judge)
    finished, under_way = asyncio.Event(), asyncio.Event()

    async def finish() -> None:
        db.unit.on_commit(finished.set)
        await write(db, "finished")

    async def linger() -> None:
        await write(db, "under way")
        under_way.set()
        await (db.session.execute(passing(gate)) if inside == "a statement" else asyncio.Event().wait())

    async def fail() -> None:
        await finished.wait()
        await under_way.wait()
        if inside == "a statement":
            await gate.reached()
        await write(db, "failed", error=BoomError())

    async with closed(gate), asyncio.timeout(DEADLINE):
        with pytest.raises((BoomError, ExceptionGroup), match=r"^boom$|^unhandled errors") as raised:
            await run(db, finish(), linger(), fail(), commit_on_exit=True)
        assert worker.checked_out() == 0
        assert len(asyncio.all_tasks()) == 1
    assert isinstance(raised.value, BoomError) == (run is by_gather)
    assert await worker.notes() == ["finished"]


@survives_cancellation
@both_ways
async def test_siblings_that_had_not_begun(worker: Site, run: Run) -> None:
    """Coroutines that still wait for their turn when another one fails never run, and are closed."""
    waiting = [write(worker.db, f"{number}") for number in range(3)]
    with pytest.raises((BoomError, ExceptionGroup), match=r"^boom$|^unhandled errors"):
        await run(
            worker.db,
            write(worker.db, "failed", error=BoomError()),
            *waiting,
            max_concurrent=1,
            commit_on_exit=True,
        )
    assert_closed(*waiting)
    assert await worker.notes() == []


async def test_failures_as_results(worker: Site) -> None:
    """With `return_exceptions=True` errors are results in their places, and everybody else commits."""
    errors = [BoomError(), EmptyError(), asyncio.CancelledError()]
    found = await worker.db.gather(
        write(worker.db, "a"),
        *(write(worker.db, f"lost {at}", error=error) for at, error in enumerate(errors)),
        write(worker.db, "b"),
        return_exceptions=True,
        commit_on_exit=True,
    )
    assert worker.checked_out() == 0
    assert found[:2] == ["a", errors[0]]
    assert found[2] is errors[1]
    assert isinstance(found[3], asyncio.CancelledError)
    assert found[4] == "b"
    assert await worker.notes() == ["a", "b"]


async def test_falsy_failure(sqlite_worker: Site) -> None:
    """An error is raised even if it is false in a condition."""
    with pytest.raises(EmptyError, match=r"^$"):
        await sqlite_worker.db.gather(write(sqlite_worker.db, "lost", error=EmptyError()), answer())


async def test_commit_that_fails(worker: Site) -> None:
    """A coroutine's own COMMIT that fails is that coroutine's failure."""

    async def refuse() -> None:
        raise BoomError

    async def work() -> None:
        worker.db.unit.before_commit(refuse)
        await write(worker.db, "lost")

    found = await worker.db.gather(
        work(), write(worker.db, "kept"), return_exceptions=True, commit_on_exit=True
    )
    assert isinstance(found[0], BoomError)
    assert found[1] == "kept"
    assert await worker.notes() == ["kept"]


async def test_several_failures(sqlite_worker: Site, caplog: pytest.LogCaptureFixture) -> None:
    """Of two coroutines that fail at once one's error is raised and the other's is logged."""
    barrier = asyncio.Barrier(2)

    async def fail(name: str) -> None:
        await barrier.wait()
        raise BoomError(name)

    with pytest.raises(BoomError, match=r"^first$"):
        await sqlite_worker.db.gather(fail("first"), fail("second"))
    assert complaints(caplog) == ["ERROR: Another coroutine of the same gather() failed, too"]


@survives_cancellation
async def test_cancelled_coroutine(worker: Site) -> None:
    """A coroutine that is cancelled from within is a failure too: its siblings do not go on."""
    with pytest.raises(asyncio.CancelledError, match=r"^$"):
        async with asyncio.timeout(DEADLINE):
            await worker.db.gather(
                write(worker.db, "cancelled", error=asyncio.CancelledError()),
                asyncio.Event().wait(),
                commit_on_exit=True,
            )
    assert worker.checked_out() == 0


async def test_failure_leaves_the_caller_alone(worker: Site) -> None:
    """The caller may catch the error of a coroutine and commit what he wrote himself."""
    async with worker.db(commit_on_exit=True):
        await write(worker.db, "mine")
        with pytest.raises(BoomError, match="boom"):
            await worker.db.gather(write(worker.db, "lost", error=BoomError()))
    assert await worker.notes() == ["mine"]


# What is refused.


@both_ways
async def test_no_coroutine(sqlite_worker: Site, run: Run) -> None:
    """What is no coroutine is refused, what is one is closed, and a caller's task goes on."""
    task = asyncio.create_task(asyncio.Event().wait())
    for wrong in (1, None, asyncio.get_running_loop().create_future(), task, answer):
        good = [answer(), answer()]
        with pytest.raises((TypeError, ExceptionGroup), match=r"must be a coroutine, as work\(\)|^unhandled"):
            await run(sqlite_worker.db, good[0], wrong, good[1])
        if run is by_group:  # it was never handed over
            good[1].close()
        assert_closed(*good)
    assert not task.cancelling()
    task.cancel()
    await asyncio.wait({task})


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"max_concurrent": 0}, "max_concurrent"),
        ({"return_exceptions": 1}, "return_exceptions"),
        ({"commit_on_exit": "yes"}, "commit_on_exit"),
        ({"session_args": {"autofluch": True}}, "session_args"),
    ],
)
async def test_wrong_options(sqlite_worker: Site, options: dict[str, Any], name: str) -> None:
    """A wrong option of `gather` closes the coroutines that were given."""
    given = [answer(), answer()]
    with pytest.raises(ConfigurationError, match=rf"^{name}"):
        await sqlite_worker.db.gather(*given, **options)
    assert_closed(*given)


@both_ways
async def test_not_connected(run: Run) -> None:
    """Without an engine nothing runs, and nothing is left un-awaited."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    given = answer()
    with pytest.raises(SessionNotInitialisedError, match="has no engine yet"):
        await run(db, given)
    if run is by_group:  # it was never handed over
        given.close()
    assert_closed(given)


async def test_one_coroutine_given_twice(sqlite_worker: Site) -> None:
    """The same coroutine cannot run twice: that is refused before anything runs."""
    once, other = answer(), answer()
    with pytest.raises(TypeError, match="each coroutine runs once, and one was given twice"):
        await sqlite_worker.db.gather(once, other, once)
    assert_closed(once, other)


class Wrapped(Coroutine[Any, Any, Any]):
    """A coroutine that is no `async def`'s, as another library or a compiled module makes it."""

    def __init__(self, inner: Work) -> None:
        self._inner = inner

    def send(self, value: Any) -> Any:
        """Go on."""
        return self._inner.send(value)

    def throw(self, *error: Any) -> Any:
        """Go on with an error."""
        return self._inner.throw(*error)

    def close(self) -> None:
        """Give up."""
        self._inner.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._inner.__await__()


@both_ways
async def test_other_coroutines(worker: Site, run: Run) -> None:
    """Whatever is a coroutine to Python is one here: a class of somebody's own, and a `gather` itself."""
    db = worker.db
    nested = db.gather(write(db, "b"), Wrapped(write(db, "c")), commit_on_exit=True)
    found = await run(db, Wrapped(write(db, "a")), nested, commit_on_exit=True)
    assert found == ["a", ["b", "c"]]
    assert worker.checked_out() == 0
    assert await worker.notes() == ["a", "b", "c"]


@pytest.mark.parametrize("way", ["no coroutine", "twice", "wrong option"])
async def test_nested_gather_that_is_refused(sqlite_worker: Site, way: str) -> None:
    """A `gather` that is refused as an argument closes what it was given."""
    db, given = sqlite_worker.db, [answer(), answer(), answer()]
    nested: Work = db.gather(given[0], Wrapped(given[1]))
    wrong: dict[str, list[Any]] = {"no coroutine": [1], "twice": [nested], "wrong option": []}
    options: dict[str, Any] = {"max_concurrent": 0} if way == "wrong option" else {}
    with pytest.raises((TypeError, ConfigurationError), match=r"^each (argument|coroutine)|^max_concurrent"):
        await db.gather(nested, given[2], *wrong[way], **options)
    assert_closed(*given)


async def test_nested_gather_that_fails(worker: Site) -> None:
    """An error inside a `gather` that is a coroutine of another one undoes what that one has under way."""
    db = worker.db
    waiting = write(db, "waiting")
    nested = db.gather(write(db, "lost", error=BoomError()), waiting, max_concurrent=1)
    with pytest.raises(BoomError, match="boom"):
        await db.gather(nested, asyncio.Event().wait(), commit_on_exit=True)
    assert_closed(waiting)
    assert worker.checked_out() == 0
    assert await worker.notes() == []


# The caller is cancelled.


@pytest.mark.parametrize("how", ["cancel", "wait_for"])
async def test_cancelled_before(sqlite_worker: Site, how: str) -> None:
    """A `gather` whose task is cancelled before it has begun leaves no coroutine un-awaited."""
    given: list[Work] = [answer(), asyncio.Event().wait()]
    if how == "cancel":
        task = asyncio.create_task(sqlite_worker.db.gather(*given))
        task.cancel()
        with pytest.raises(asyncio.CancelledError, match=r"^$"):
            await task
    else:
        with pytest.raises(TimeoutError, match=r"^$"):
            await asyncio.wait_for(sqlite_worker.db.gather(*given), 0)
    assert_closed(*given)


@survives_cancellation
@both_ways
@pytest.mark.parametrize("times", [1, 2])
async def test_cancelled_during(worker: Site, run: Run, times: int) -> None:
    """A caller who is cancelled, even twice, leaves when all coroutines have ended and are settled."""
    under_way, cleaning, cleaned = asyncio.Barrier(3), asyncio.Event(), asyncio.Event()

    async def work(note: str) -> None:
        await write(worker.db, note)
        await under_way.wait()
        try:
            await asyncio.Event().wait()
        finally:
            cleaning.set()
            await cleaned.wait()

    waiting = write(worker.db, "c")
    task = asyncio.create_task(
        run(worker.db, work("a"), work("b"), waiting, max_concurrent=2, commit_on_exit=True)
    )
    async with asyncio.timeout(DEADLINE):
        await under_way.wait()
        task.cancel()
        await cleaning.wait()
        if times == 2:
            task.cancel()
        await worker.notes()
        assert not task.done()
        cleaned.set()
        with pytest.raises(asyncio.CancelledError, match=r"^$"):
            await task
    assert worker.checked_out() == 0
    assert len(asyncio.all_tasks()) == 1
    assert_closed(waiting)
    assert await worker.notes() == []


async def test_cancelled_after(worker: Site) -> None:
    """A cancellation after the end changes nothing."""
    task = asyncio.create_task(worker.db.gather(write(worker.db, "a"), commit_on_exit=True))
    found: list[str] = list(await task)
    assert found == ["a"]
    assert not task.cancel()
    assert await worker.notes() == ["a"]


@survives_cancellation
async def test_cancelled_when_one_has_failed(sqlite_worker: Site, caplog: pytest.LogCaptureFixture) -> None:
    """An error that was to be a result is lost with the results, without asyncio's complaint."""

    async def fail() -> None:
        raise BoomError

    gc.collect()
    caplog.clear()  # of what asyncio has to say of earlier tests
    task = asyncio.create_task(
        sqlite_worker.db.gather(fail(), asyncio.Event().wait(), return_exceptions=True)
    )
    await asyncio.sleep(0)  # the tasks of the two begin
    while len(asyncio.all_tasks()) != 3:  # noqa: ASYNC110  # this one, and those two that wait
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError, match=r"^$"):
        await task
    del task
    gc.collect()
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


@survives_cancellation
@both_ways
@pytest.mark.parametrize("moment", ["waiting", "done"])
@pytest.mark.parametrize("times", [1, 2])
async def test_cancelled_at_every_step(worker: Site, run: Run, moment: Moment, times: int) -> None:
    """Wherever the caller is cancelled, the pool is whole at once and no coroutine is left."""
    step = 0
    while True:
        step += 1
        given: list[Work] = [write(worker.db, f"{step} {number}") for number in range(3)]

        async def call(given: list[Work] = given) -> list[Any]:
            return await run(worker.db, *given, max_concurrent=2, commit_on_exit=True)

        task: asyncio.Task[Any]
        at = range(step, step + times)
        interrupted = Interrupted(call(), at, lambda: task.cancel(), moment)  # noqa: B023, PLW0108  # this step's, made below

        async def outer(interrupted: Interrupted[list[Any]] = interrupted) -> list[Any]:
            return await interrupted

        task = asyncio.create_task(outer())
        async with asyncio.timeout(DEADLINE):
            await asyncio.wait({task})
        assert worker.checked_out() == 0
        assert len(asyncio.all_tasks()) == 1
        assert_closed(*given)
        if not interrupted.cancellations:
            assert task.result() == [f"{step} {number}" for number in range(3)]
            break
        assert task.cancelled()


# What the units of children take over.


GIVEN: dict[str, dict[str, Any]] = {
    "as the unit does": {},
    "kept": {"commit_on_exit": True},
    "lost": {"commit_on_exit": False},
}


@both_ways
@pytest.mark.parametrize("current", [None, True, False, "tasks"])
async def test_commit_on_exit(sqlite_worker: Site, run: Run, current: bool | str | None) -> None:  # noqa: FBT001  # and other values
    """Children commit as the call says, else as the current unit does, else not at all."""
    db = sqlite_worker.db
    expected = [*(["as the unit does"] if current else []), "kept"]

    async def run_all() -> None:
        for note, options in GIVEN.items():
            await run(db, write(db, note), **options)
        assert await sqlite_worker.notes() == expected

    if current is None:
        await run_all()
    else:
        async with db(commit_on_exit=bool(current), multi_sessions=current == "tasks"):
            await run_all()


@both_ways
@pytest.mark.parametrize("commit_on_exit", [True, False])
async def test_commit_on_exit_in_a_request(
    sqlite_url: str, make_site: MakeSite, run: Run, *, commit_on_exit: bool
) -> None:
    """Children of a request commit as the request does, which need not have touched its own session."""
    site = await make_site(sqlite_url, commit_on_exit=commit_on_exit)

    @site.app.get("/")
    async def route() -> list[str]:
        return await run(site.db, write(site.db, "a"), write(site.db, "b"))

    response = await site.get()
    assert (response.status_code, response.json()) == (200, ["a", "b"])
    assert await site.notes() == (["a", "b"] if commit_on_exit else [])


@both_ways
async def test_session_args(sqlite_worker: Site, run: Run) -> None:
    """Children's sessions have the current unit's arguments, or those of the call."""
    db = sqlite_worker.db

    async def autoflush() -> bool:
        return db.session.sync_session.autoflush

    async with db(session_args={"autoflush": False}):
        assert await run(db, autoflush()) == [False]
        assert await run(db, autoflush(), session_args={"autoflush": True}) == [True]
    assert await run(db, autoflush()) == [True]
    assert await run(db, autoflush(), session_args={"autoflush": False}) == [False]


@both_ways
@pytest.mark.parametrize("options", [{}, {"session_args": {"autoflush": True}}], ids=["as is", "and more"])
async def test_read_only(sqlite_worker: Site, run: Run, options: dict[str, Any]) -> None:
    """Children of a read-only unit are read-only, whatever session arguments the call adds."""
    with pytest.raises((ReadOnlyError, ExceptionGroup), match=r"read-only|unhandled errors"):
        async with sqlite_worker.db(read_only=True):
            await run(sqlite_worker.db, write(sqlite_worker.db, "refused"), commit_on_exit=True, **options)
    assert await sqlite_worker.notes() == []


@both_ways
async def test_hooks(sqlite_worker: Site, run: Run) -> None:
    """The hooks of a coroutine's unit run with its own outcome, not with the caller's."""
    db, ran = sqlite_worker.db, list[str]()

    async def work() -> None:
        db.unit.on_commit(lambda: ran.append("committed"))
        db.unit.on_rollback(lambda: ran.append("rolled back"))
        await write(db, "a")

    async def fail() -> None:
        db.unit.on_commit(lambda: ran.append("committed the failed one"))
        db.unit.on_rollback(lambda: ran.append("rolled back the failed one"))
        raise BoomError

    async with db():
        await run(db, work(), commit_on_exit=True)
        assert ran == ["committed"]
        with pytest.raises((BoomError, ExceptionGroup), match=r"boom|unhandled errors"):
            await run(db, fail(), commit_on_exit=True)
    assert ran == ["committed", "rolled back the failed one"]


@both_ways
async def test_nested(worker: Site, run: Run) -> None:
    """A coroutine may gather others: those have units of their own again, and inherit."""
    db = worker.db

    async def outer(number: int) -> list[Any]:
        await write(db, f"{number}")
        return await run(db, *(write(db, f"{number}{letter}") for letter in "ab"), max_concurrent=1)

    assert await run(db, outer(1), outer(2), commit_on_exit=True) == [["1a", "1b"], ["2a", "2b"]]
    assert await worker.notes() == ["1", "1a", "1b", "2", "2a", "2b"]


async def test_failure_in_a_request(postgresql_url: str, make_site: MakeSite) -> None:
    """A coroutine that fails in a request leaves the client with an error and the pool whole."""
    site = await make_site(postgresql_url, commit_on_exit=True)

    @site.app.get("/")
    async def route() -> None:
        await write(site.db, "route")
        await site.db.gather(
            asyncio.Event().wait(), write(site.db, "child", error=BoomError()), max_concurrent=2
        )

    @site.app.get("/next")
    async def following() -> object:
        return await site.db.gather(*(write(site.db, f"{number}") for number in range(3)))

    async with site.client(raise_app_exceptions=False) as client:
        assert (await client.get("/")).status_code == 500
        assert site.checked_out() == 0
        assert (await client.get("/next")).json() == ["0", "1", "2"]
    assert await site.notes() == ["0", "1", "2"]


# The group.


async def test_group_gives_tasks_with_names(sqlite_worker: Site) -> None:
    """`create_task` returns a task, with its name, whose result can be awaited inside the block."""
    async with sqlite_worker.db.task_group() as group:
        task = group.create_task(answer(5), name="five")
        assert task.get_name() == "five"
        assert await task == 5
        assert group.create_task(answer()).get_name()


async def test_group_not_entered(sqlite_worker: Site) -> None:
    """`create_task` before the group is entered is refused, and the coroutine closed."""
    given = answer()
    with pytest.raises(RuntimeError, match=r"enter the group first: `async with db\.task_group\(\)"):
        sqlite_worker.db.task_group().create_task(given)
    assert_closed(given)


async def test_group_that_has_ended(sqlite_worker: Site) -> None:
    """`create_task` after the end of the group is refused, and so is to enter it again."""
    async with sqlite_worker.db.task_group() as group:
        pass
    given = answer()
    with pytest.raises(RuntimeError, match=r"(?i)finished"):
        group.create_task(given)
    assert_closed(given)
    with pytest.raises(RuntimeError, match="already been entered"):
        await group.__aenter__()


@survives_cancellation
async def test_group_whose_block_fails(worker: Site) -> None:
    """An error of the block cancels the tasks and leaves when they are settled."""
    under_way = asyncio.Event()

    async def work() -> None:
        await write(worker.db, "lost")
        under_way.set()
        await asyncio.Event().wait()

    async def block() -> None:
        async with worker.db.task_group(commit_on_exit=True) as group:
            group.create_task(work())
            await under_way.wait()
            raise BoomError

    with pytest.raises(ExceptionGroup, match="unhandled errors") as raised:
        await block()
    assert worker.checked_out() == 0
    assert [str(error) for error in raised.value.exceptions] == ["boom"]
    assert await worker.notes() == []


async def test_group_with_several_failures(sqlite_worker: Site) -> None:
    """All errors leave the group, together."""
    go = asyncio.Event()

    async def fail(name: str) -> None:
        await go.wait()
        raise BoomError(name)

    async def let_go() -> None:
        go.set()

    with pytest.raises(ExceptionGroup, match="unhandled errors") as raised:
        await by_group(sqlite_worker.db, fail("a"), fail("b"), let_go())
    assert [str(error) for error in raised.value.exceptions] == ["a", "b"]


async def test_group_reads_the_unit_when_entered(sqlite_worker: Site) -> None:
    """A group takes over what is current where it is entered, not where its tasks are created."""
    db = sqlite_worker.db
    async with db(commit_on_exit=True), db.task_group() as group, db():
        group.create_task(write(db, "child"))
    assert await sqlite_worker.notes() == ["child"]
