"""Which outcome hooks are told, and what becomes of what they begin, break or give up."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest
from httpx2 import ASGITransport, AsyncClient
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from fastapi_async_sqlalchemy import UnexpectedRollbackError, UnitClosedError
from tests.support import hooks
from tests.support.hooks import Act, BoomError, Log, Unit, add, commit_session, commit_unit, leave
from tests.support.interruption import Interrupted, Moment
from tests.support.serving import serve
from tests.support.site import MakeSite, Site, complaints
from tests.support.tables import Note
from tests.support.versions import survives_cancellation


@pytest.fixture(params=["postgresql", "mariadb", "asyncmy", "sqlite"])
def driver_url(request: pytest.FixtureRequest) -> str:
    """An empty database on each of the three, MariaDB's by both drivers."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


async def in_block(site: Site, act: Act) -> None:
    """Act in a block that commits at its end."""
    async with site.db(commit_on_exit=True) as unit:
        await act(unit)


async def in_function(site: Site, act: Act) -> None:
    """Act in a function that commits at its end."""

    @site.db.transactional
    async def work() -> None:
        await act(site.db.unit)

    await work()


async def in_request(site: Site, act: Act) -> None:
    """Act in a request; the application runs already."""

    @site.app.get("/")
    async def route() -> str:
        await act(site.db.unit)
        return "done"

    async with AsyncClient(transport=ASGITransport(site.app), base_url="http://testserver") as client:
        response = await client.get("/")
    assert (response.status_code, response.json()) == (200, "done")


Way = Callable[[Site, Act], Awaitable[None]]


# A cancellation that lands when COMMIT has succeeded, while the pool resets the connection. PostgreSQL's
# reset awaits nothing: there the task's next await is cut short.


def cancel_after_commit(unit: Unit) -> asyncio.Task[object]:
    """Have the task cancelled as soon as the next COMMIT has succeeded."""
    task = asyncio.current_task()
    assert task is not None

    def cancel(session: Session) -> None:
        task.cancel("enough")

    event.listen(unit.session.sync_session, "after_commit", cancel, once=True)
    return task


@survives_cancellation
@pytest.mark.parametrize("way", [in_block, in_function, in_request])
@pytest.mark.parametrize(
    "commit", [leave, commit_unit, commit_session, hooks.begin_block, hooks.begin_and_commit]
)
async def test_cancelled_just_after_commit(
    make_site: MakeSite, driver_url: str, way: Way, commit: Act, log: Log
) -> None:
    """A COMMIT that succeeded is one to the hooks, though its task was cancelled before it could tell."""
    site = await make_site(driver_url, commit_on_exit=True)

    async def act(unit: Unit) -> None:
        log.both(unit)
        cancel_after_commit(unit)
        await commit(unit)

    async with site.client():
        task = asyncio.ensure_future(way(site, act))
        with pytest.raises(asyncio.CancelledError, match="enough"):
            await task
        assert log == ["committed"]
        assert await site.notes() == ["a"]
        assert site.checked_out() == 0


async def commit_and_go_on(unit: Unit) -> None:
    """Commit, be cancelled just after it, and swallow that, as `asyncio.timeout()` does."""
    await add(unit, "first")
    task = cancel_after_commit(unit)
    with suppress(asyncio.CancelledError):
        await unit.commit()
        await asyncio.Event().wait()
    task.uncancel()


async def roll_back_a_savepoint(unit: Unit) -> None:
    """Begin by a savepoint that is rolled back, then roll back."""
    savepoint = await unit.session.begin_nested()
    await savepoint.rollback()
    await unit.rollback()


async def stop(unit: Unit) -> None:
    """Do no more."""


COMMITTED: tuple[Act, ...] = (commit_unit, commit_session, hooks.begin_block, Unit.commit, stop)
ROLLED_BACK: tuple[Act, ...] = (
    *(hooks.rollback_unit, hooks.rollback_session, hooks.close_session, hooks.fail, hooks.fail_early),
    *(roll_back_a_savepoint, Unit.rollback),
)


@survives_cancellation
@pytest.mark.parametrize("act", [*COMMITTED, *ROLLED_BACK])
async def test_unit_goes_on_after_a_cancelled_commit(
    make_site: MakeSite, driver_url: str, act: Act, log: Log
) -> None:
    """Each transaction's hooks follow its own outcome, though a cancellation came with the first COMMIT."""
    site = await make_site(driver_url)
    async with site.client():
        with suppress(BoomError):
            async with site.db() as unit:
                log.both(unit, "first")
                await commit_and_go_on(unit)
                log.both(unit, "second")
                await act(unit)
        assert log == ["first committed", f"second {'committed' if act in COMMITTED else 'rolled back'}"]
        assert await site.notes() == (["a", "first"] if act in COMMITTED[:3] else ["first"])
        assert site.checked_out() == 0


@survives_cancellation
@pytest.mark.parametrize("fails", [True, False])
async def test_savepoint_after_a_cancelled_commit(
    make_site: MakeSite, driver_url: str, log: Log, *, fails: bool
) -> None:
    """The hooks of a savepoint follow its own outcome, not that of the COMMIT before it."""
    site = await make_site(driver_url)
    async with site.client():
        async with site.db(commit_on_exit=True) as unit:
            log.both(unit, "first")
            await commit_and_go_on(unit)
            with suppress(BoomError):
                async with unit.savepoint():
                    log.both(unit, "part")
                    await (hooks.fail if fails else add)(unit)
            await add(unit, "b")
        assert log == ["first committed", f"part {'rolled back' if fails else 'committed'}"]
        assert await site.notes() == (["b", "first"] if fails else ["a", "b", "first"])


# A cancellation that lands anywhere in a rollback, and that the unit outlives.

GiveUp = Callable[[Unit], Coroutine[Any, Any, None]]


async def roll_session_back(unit: Unit) -> None:
    """Roll back by the session."""
    await unit.session.rollback()


async def close_session(unit: Unit) -> None:
    """Close the session, which begins afresh."""
    await unit.session.close()


async def invalidate_session(unit: Unit) -> None:
    """Discard the connection."""
    await unit.session.invalidate()


@survives_cancellation
@pytest.mark.parametrize("moment", ["waiting", "done"])
@pytest.mark.parametrize("give_up", [Unit.rollback, roll_session_back, close_session, invalidate_session])
async def test_cancelled_rollback(
    make_site: MakeSite, driver_url: str, give_up: GiveUp, moment: Moment, log: Log
) -> None:
    """What was registered for a transaction that was given up runs as that, and not with the next COMMIT."""
    site, task, kept = await make_site(driver_url), asyncio.current_task(), list[str]()
    assert task is not None
    async with site.client():
        for point in itertools.count(1):
            async with site.db(commit_on_exit=True) as unit:
                log.both(unit, "first")
                unit.before_commit(log.hook("before the first"))
                await add(unit, "lost")
                interrupted = Interrupted(give_up(unit), {point}, task.cancel, moment)
                with suppress(asyncio.CancelledError):
                    await interrupted
                    if interrupted.cancellations:
                        await asyncio.Event().wait()  # it has not been raised yet
                task.uncancel()
                log.both(unit, "second")
                kept.append(f"kept {point}")
                await add(unit, kept[-1])
            assert log == ["first rolled back", "second committed"], point
            log.clear()
            if not interrupted.cancellations:
                break
        assert await site.notes() == sorted(kept)
        assert site.checked_out() == 0


# What a hook begins on the unit's own session.


async def in_plain_block(site: Site, act: Act) -> None:
    """Act in a block that commits nothing by itself."""
    async with site.db() as unit:
        await act(unit)


@pytest.mark.parametrize("way", [in_plain_block, in_request])
@pytest.mark.parametrize("flushes", [True, False])
async def test_nobody_commits_what_a_hook_wrote(
    make_site: MakeSite,
    driver_url: str,
    way: Way,
    log: Log,
    caplog: pytest.LogCaptureFixture,
    *,
    flushes: bool,
) -> None:
    """What a hook writes after a commit by hand is rolled back with a warning; its own hooks see that."""
    site = await make_site(driver_url)

    async def act(unit: Unit) -> None:
        async def write() -> None:
            unit.session.add(Note(text="by the hook"))
            if flushes:
                await unit.session.flush()
            log.both(unit, "hook's")

        unit.on_commit(write)
        await commit_unit(unit)

    async with site.client():
        await way(site, act)
    assert log == ["hook's rolled back"]
    assert await site.notes() == ["a"]
    (complaint,) = complaints(caplog)
    flushed, pending = "1 statement and 0 unflushed objects", "0 statements and 1 unflushed object"
    assert complaint.startswith("WARNING: ")
    assert f"{flushed if flushes else pending} are rolled back at the end of their unit" in complaint


async def commit_twice(unit: Unit) -> None:
    """Commit, and commit what the hooks of that have begun."""
    await commit_unit(unit)
    await unit.commit()


async def roll_back_and_commit(unit: Unit) -> None:
    """Roll back, and commit what the hooks of that have begun."""
    await hooks.rollback_unit(unit)
    await unit.commit()


async def work_and_fail(site: Site, act: Act, fail: Act, log: Log, reason: str) -> None:
    """Act in a unit whose hooks write and swallow a failure, which must keep it from committing that."""

    async def work() -> None:
        async with site.db(commit_on_exit=True) as unit:

            async def swallow() -> None:
                log.both(unit, "hook's")
                await add(unit, "by the hook")
                with suppress(BoomError, DBAPIError):
                    await fail(unit)

            unit.on_commit(swallow)
            unit.on_rollback(swallow)
            await act(unit)

    with pytest.raises(UnexpectedRollbackError, match=reason):
        await work()
    assert log == ["hook's rolled back"]
    assert "by the hook" not in await site.notes()


ENDS = (leave, commit_unit, commit_twice, hooks.rollback_unit, roll_back_and_commit)


@pytest.mark.parametrize("act", ENDS)
async def test_statement_that_fails_in_a_hook(postgresql_worker: Site, act: Act, log: Log) -> None:
    """A statement's error that a hook swallows makes no silent rollback of what the hook began."""

    async def fail(unit: Unit) -> None:
        await unit.session.execute(text("SELECT 1/0"))

    await work_and_fail(postgresql_worker, act, fail, log, "has aborted the transaction")


@pytest.mark.parametrize("act", ENDS)
async def test_joined_block_that_fails_in_a_hook(worker: Site, act: Act, log: Log) -> None:
    """A block that joins the unit in a hook, and fails there, lets nobody commit what the hook began."""

    async def fail(unit: Unit) -> None:
        async with worker.db(propagation="mandatory"):
            raise BoomError

    await work_and_fail(worker, act, fail, log, "a block that had joined it failed")


@pytest.mark.parametrize("act", [leave, commit_unit, commit_session])
@pytest.mark.parametrize("flushes", [True, False])
async def test_hooks_that_register_each_other(worker: Site, act: Act, *, flushes: bool) -> None:
    """Each hook finds committed what the one that registered it wrote, to the last one's write."""
    seen: list[int] = []
    async with worker.db(commit_on_exit=True) as unit:

        async def write() -> None:
            seen.append(len(await worker.notes()))
            unit.session.add(Note(text=f"level {len(seen)}"))
            if flushes:
                await unit.session.flush()
            if len(seen) < 4:
                unit.on_commit(write)

        unit.on_commit(write)
        await act(unit)
    assert seen == [1, 2, 3, 4]
    assert await worker.notes() == ["a", "level 1", "level 2", "level 3", "level 4"]


async def await_what_is_cancelled() -> None:
    """Await a task that somebody else has cancelled."""
    task = asyncio.ensure_future(asyncio.Event().wait())
    task.cancel()
    await task


@pytest.mark.parametrize("served", [True, False])
async def test_hook_that_awaits_what_is_cancelled(
    make_site: MakeSite, database_url: str, log: Log, caplog: pytest.LogCaptureFixture, *, served: bool
) -> None:
    """It is logged as any other failure: the other hooks run, and the client gets the route's answer."""
    site = await make_site(database_url, commit_on_exit=True)

    @site.app.get("/")
    async def route() -> str:
        site.db.unit.on_commit(await_what_is_cancelled)
        log.both(site.db.unit)
        await add(site.db.unit)
        return "done"

    if served:
        async with serve(site.app) as address, AsyncClient(timeout=60) as client:
            response = await client.get(address.url)
    else:
        response = await site.get()
    assert (response.status_code, response.json()) == (200, "done")
    assert log == ["committed"]
    assert await site.notes() == ["a"]
    (complaint,) = complaints(caplog)
    assert complaint.startswith("ERROR: A hook of ")
    assert "awaited what was cancelled: <function await_what_is_cancelled" in complaint


async def test_unit_with_hooks_ends_while_a_task_reads(locking_worker: Site, log: Log) -> None:
    """A unit that only read ends at once, hooks and all, though a task is in the middle of a statement."""
    if locking_worker.engine.dialect.name == "postgresql":
        lock = "SELECT 1 FROM (SELECT pg_advisory_lock(1)) AS locked"
    else:
        lock = "SELECT GET_LOCK(database(), 60)"
    await locking_worker.judge.scalar(lock)
    async with locking_worker.db() as unit:
        log.both(unit)
        await unit.session.execute(text("SELECT 1"))
        task = asyncio.ensure_future(unit.session.execute(text(lock)))
        await asyncio.sleep(0)  # it begins
    assert log == ["committed"]
    with pytest.raises(UnitClosedError, match="has ended"):
        await task
