"""A thousand coroutines on a pool of five: what returned is there, what failed is not, none is leaked."""

import asyncio
import gc
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from typing import Any, Literal

import pytest
from attrs import Factory, define
from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_async_sqlalchemy import SessionProxy, create_middleware_and_session_proxy
from tests.support.databases import JudgeFor
from tests.support.interruption import Interrupted, Moment
from tests.support.site import checked_out
from tests.support.tables import Note, engine_with_tables
from tests.support.versions import survives_cancellation

pytestmark = [survives_cancellation, pytest.mark.timeout(180)]

Db = SessionProxy[AsyncSession]
COROUTINES = 1000
POOL_SIZE = 5
PATIENCE = 120
"""Seconds for all of them, and so for the last one's connection too."""
RECORDED = pytest.mark.filterwarnings("ignore:record_property is incompatible:pytest.PytestWarning")
"""pytest writes properties of a test into every report, and warns of them if its schema is the strict one."""


class BoomError(Exception):
    """The error of a coroutine."""


@define(eq=False)
class Job:
    """One coroutine, which may fail or be cancelled, and what became of it."""

    number: int
    kind: Literal["returns", "fails before", "fails after", "is cancelled", "is cancelled at its end"]
    at: int
    """The suspension at which it is cancelled."""
    moment: Moment
    commits: int = 0
    """How many COMMITs were begun for it."""
    returned: bool = False
    """Its coroutine came to its end; its unit may not have."""
    task: asyncio.Task[Any] | None = None

    async def run(self, db: Db) -> int:
        """Write a row, unless something comes in between."""
        current_job.set(self)
        self.task = asyncio.current_task()
        if self.kind == "is cancelled":
            await Interrupted(self.work(db), {self.at}, self.cancel, self.moment)
        else:
            await self.work(db)
        if self.kind == "is cancelled at its end":
            asyncio.get_running_loop().call_soon(self.cancel_later, self.at)
        self.returned = True
        return self.number

    async def work(self, db: Db) -> None:
        """Write a row in two statements, or fail."""
        if self.kind == "fails before":
            raise BoomError
        db.session.add(Note(text=f"{self.number}"))
        await db.session.flush()
        await db.session.get(Note, self.number)
        if self.kind == "fails after":
            raise BoomError

    def cancel(self) -> None:
        """Cancel the coroutine's task, from without."""
        if self.task is not None:
            self.task.cancel()

    def cancel_later(self, turns: int) -> None:
        """Cancel it so many turns of the loop from now: in the middle of its COMMIT, perhaps after it."""
        if turns:
            asyncio.get_running_loop().call_soon(self.cancel_later, turns - 1)
        else:
            self.cancel()


current_job: ContextVar[Job] = ContextVar("current_job")


@define(eq=False)
class Tally:
    """What is seen of the pool and of the commits."""

    jobs: list[Job]
    taken: list[int] = Factory(list[int])
    results: list[Any] = Factory(list[Any])


def draw(seed: int) -> list[Job]:
    """Draw the coroutines: three in five return."""
    rng = random.Random(seed)  # noqa: S311  # a mix that can be had again, not a secret
    kinds: list[Any] = ["returns"] * 6
    kinds += ["fails before", "fails after", "is cancelled", "is cancelled at its end"]
    return [
        Job(
            number,
            rng.choice(kinds),
            rng.randint(1, 8),
            rng.choice(["waiting", "done"]),
        )
        for number in range(COROUTINES)
    ]


async def by_gather(db: Db, jobs: list[Job]) -> list[Any]:
    """Let `gather` run them all at once: the pool is the only limit."""
    found: list[Any] = await db.gather(
        *(job.run(db) for job in jobs), return_exceptions=True, commit_on_exit=True
    )
    return found


async def by_tasks(db: Db, jobs: list[Job]) -> list[Any]:
    """Give each task a session of its own; the block commits them when they have ended."""
    async with db(multi_sessions=True, max_concurrent=POOL_SIZE, commit_on_exit=True):
        return await asyncio.gather(*(job.run(db) for job in jobs), return_exceptions=True)


Run = Callable[[Db, list[Job]], Coroutine[Any, Any, list[Any]]]


async def run_all(url: str, run: Run, jobs: list[Job]) -> Tally:
    """Run the coroutines on a pool of five; it is whole afterwards."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    tally = Tally(jobs)
    pool_args = {"pool_size": POOL_SIZE, "max_overflow": 0, "pool_timeout": PATIENCE}
    async with engine_with_tables(url, **pool_args) as engine:

        def note_commit(_: Connection) -> None:
            job = current_job.get(None)
            if job is not None:
                job.commits += 1

        event.listen(engine.sync_engine, "commit", note_commit)
        event.listen(engine.pool, "checkout", lambda *_: tally.taken.append(checked_out(engine.pool)))
        db.bind(engine)
        async with asyncio.timeout(PATIENCE):
            tally.results = await run(db, jobs)
        assert checked_out(engine.pool) == 0
        assert len(asyncio.all_tasks()) == 1
        assert 1 <= max(tally.taken) <= POOL_SIZE
    return tally


@RECORDED
@pytest.mark.parametrize("run", [by_gather, by_tasks])
async def test_fan_out(
    postgresql_url: str,
    judge_for: JudgeFor,
    caplog: pytest.LogCaptureFixture,
    record_property: Callable[[str, object], None],
    run: Run,
) -> None:
    """Of a random mix every row of a coroutine that returned is there, and none of one that did not."""
    gc.collect()
    caplog.clear()  # of what is logged of earlier tests' garbage
    tally = await run_all(postgresql_url, run, draw(1))
    judge = await judge_for(postgresql_url)
    rows = {str(text) for (text,) in await judge.rows("SELECT text FROM note")}

    counts = Counter[str]()
    acknowledged, in_doubt = set[str](), set[str]()
    for job, result in zip(tally.jobs, tally.results, strict=True):
        counts[job.kind] += 1
        row = f"{job.number}"
        if not isinstance(result, BaseException):
            assert result == job.number
            acknowledged.add(row)
        elif isinstance(result, asyncio.CancelledError):
            counts["cancelled"] += 1
            if job.returned and job.commits:
                in_doubt.add(row)
        else:
            assert isinstance(result, BoomError), result
            assert job.kind.startswith("fails")
            counts["failed"] += 1
    counts["acknowledged"] = len(acknowledged)
    counts["in doubt"] = len(in_doubt)
    counts["in doubt, there"] = len(in_doubt & rows)
    counts["most checked out"] = max(tally.taken)
    for name, value in counts.items():
        record_property(name, value)
    assert acknowledged - rows == set()
    assert rows - acknowledged - in_doubt == set()
    gc.collect()
    assert [
        record.getMessage() for record in caplog.records if record.name.startswith(("sqlalchemy", "asyncio"))
    ] == []
