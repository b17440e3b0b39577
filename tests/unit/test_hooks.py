"""Hooks: what runs after a unit's outcome, when it runs, and when it does not."""

import asyncio
import functools
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import pytest
from anyio import CancelScope
from fastapi import HTTPException
from httpx2 import AsyncClient
from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from starlette.responses import StreamingResponse

from tests.support.hooks import (
    Act,
    BoomError,
    Log,
    add,
    begin_and_commit,
    begin_block,
    close_session,
    commit_session,
    commit_unit,
    die_in_commit,
    fail,
    fail_early,
    fail_in_begin_block,
    leave,
    rollback_session,
    rollback_unit,
)
from tests.support.serving import raw_get, serve
from tests.support.site import MakeSite, Site, complaints
from tests.support.tables import ORPHAN, Note, Reply

# After which outcome.


@pytest.mark.parametrize("act", [leave, commit_unit, commit_session, begin_block, begin_and_commit])
async def test_commit_runs_its_hooks(worker: Site, act: Act, log: Log) -> None:
    """However a unit commits, its `on_commit` hooks run once, in order, and no other."""
    async with worker.db(commit_on_exit=True) as unit:
        log.both(unit, "first")
        log.both(unit, "second")
        await act(unit)
    assert log == ["first committed", "second committed"]
    assert await worker.notes() == ["a"]


@pytest.mark.parametrize(
    "act", [leave, rollback_unit, rollback_session, close_session, fail, fail_early, fail_in_begin_block]
)
async def test_rollback_runs_its_hooks(worker: Site, act: Act, log: Log) -> None:
    """However a unit rolls back, its `on_rollback` hooks run once, in order, and no other."""
    with suppress(BoomError):
        async with worker.db() as unit:
            log.both(unit, "first")
            log.both(unit, "second")
            await act(unit)
    assert log == ["first rolled back", "second rolled back"]
    assert await worker.notes() == []


async def test_failed_commit_is_a_rollback(deferring_worker: Site, log: Log) -> None:
    """When the database refuses COMMIT, the `on_rollback` hooks run and the error goes on."""

    async def write_orphan() -> None:
        async with deferring_worker.db(commit_on_exit=True) as unit:
            log.both(unit)
            unit.session.add(Reply(**ORPHAN))

    with pytest.raises(IntegrityError, match=r"(?i)foreign key"):
        await write_orphan()
    assert log == ["rolled back"]


@pytest.mark.parametrize("commit_on_exit", [True, False])
async def test_unit_without_a_transaction_counts_as_committed(
    worker: Site, log: Log, *, commit_on_exit: bool
) -> None:
    """A unit that ends well and never sent anything runs its `on_commit` hooks."""
    async with worker.db(commit_on_exit=commit_on_exit) as unit:
        log.both(unit)
    assert log == ["committed"]


async def test_commit_without_a_transaction_runs_hooks_at_once(worker: Site, log: Log) -> None:
    """`unit.commit()` with nothing to commit is the hooks' moment all the same."""
    async with worker.db() as unit:
        log.both(unit)
        await unit.commit()
        assert log == ["committed"]
    assert log == ["committed"]


async def test_each_transaction_has_its_own_hooks(worker: Site, log: Log) -> None:
    """A hook belongs to the transaction in which it was registered, and runs for no later one."""
    async with worker.db(commit_on_exit=True) as unit:
        log.both(unit, "first")
        await commit_unit(unit)
        log.both(unit, "second")
        await add(unit, "b")
        await unit.rollback()
        log.both(unit, "third")
        await add(unit, "c")
    assert log == ["first committed", "second rolled back", "third committed"]
    assert await worker.notes() == ["a", "c"]


async def test_inner_unit_has_its_own_hooks(worker: Site, log: Log) -> None:
    """An inner unit's commit runs no hook of the outer one."""
    with suppress(BoomError):
        async with worker.db() as outer:
            log.both(outer, "outer")
            async with worker.db(commit_on_exit=True) as inner:
                log.both(inner, "inner")
                await add(inner)
            await fail_early(outer)
    assert log == ["inner committed", "outer rolled back"]


# How they run.


async def test_hooks_may_be_coroutine_functions(worker: Site, log: Log) -> None:
    """Functions and coroutine functions run one after the other, in the order of their registration."""

    async def slow() -> None:
        log.append("coroutine begins")
        await asyncio.to_thread(log.append, "thread")
        log.append("coroutine ends")

    async with worker.db(commit_on_exit=True) as unit:
        unit.on_commit(log.hook("function"))
        unit.on_commit(slow)
        unit.on_commit(functools.partial(slow))
        unit.on_commit(log.hook("last"))
        await add(unit)
    coroutine = ["coroutine begins", "thread", "coroutine ends"]
    assert log == ["function", *coroutine, *coroutine, "last"]


@pytest.mark.parametrize("act", [leave, commit_unit, commit_session, begin_block, begin_and_commit])
async def test_hook_runs_after_the_commit_with_no_connection_held(worker: Site, act: Act) -> None:
    """When a hook runs, the writes can be read by others and every connection is back in the pool."""
    seen: list[object] = []

    async def look() -> None:
        seen.append(worker.checked_out())
        seen.append(await worker.notes())

    async with worker.db(commit_on_exit=True) as unit:
        unit.on_commit(look)
        await act(unit)
    assert seen == [0, ["a"]]


@pytest.mark.parametrize("act", [leave, rollback_unit, rollback_session, fail, fail_in_begin_block])
async def test_rollback_hook_runs_with_no_connection_held(worker: Site, act: Act) -> None:
    """When an `on_rollback` hook runs, every connection is back in the pool."""
    seen: list[int] = []
    with suppress(BoomError):
        async with worker.db() as unit:
            unit.on_rollback(lambda: seen.append(worker.checked_out()))
            await act(unit)
    assert seen == [0]


def broken() -> None:
    """Fail as a hook."""
    message = "a broken hook"
    raise ValueError(message)


async def broken_later() -> None:
    """Fail as an asynchronous hook."""
    await asyncio.to_thread(broken)


@pytest.mark.parametrize("hook", [broken, broken_later])
@pytest.mark.parametrize("act", [leave, commit_unit, commit_session, begin_block, rollback_unit, fail])
async def test_failing_hook_stops_nothing(
    worker: Site, hook: Callable[[], object], act: Act, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    """A hook's error is logged with its traceback; the other hooks run, and the unit ends as it would."""
    with suppress(BoomError):
        async with worker.db(commit_on_exit=True) as unit:
            for register in (unit.on_commit, unit.on_rollback):
                register(log.hook("before"))
                register(hook)
                register(log.hook("after"))
            await act(unit)
    assert log == ["before", "after"]
    (complaint,) = complaints(caplog)
    assert complaint.startswith("ERROR: ")
    assert hook.__name__ in complaint
    assert "ValueError: a broken hook" in caplog.text


@pytest.mark.parametrize("act", [leave, commit_unit, commit_session])
async def test_cancelled_in_a_hook(
    worker: Site, act: Act, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    """A task that is cancelled in a hook ends cancelled when the other hooks have run; its writes stay."""
    inside = asyncio.Event()

    async def slow() -> None:
        inside.set()
        await asyncio.Event().wait()

    async def work() -> None:
        async with worker.db(commit_on_exit=True) as unit:
            unit.on_commit(slow)
            unit.on_commit(lambda: asyncio.to_thread(log.append, "in a thread"))
            unit.on_commit(log.hook("committed"))
            unit.on_rollback(log.hook("rolled back"))
            await act(unit)

    task = asyncio.create_task(work())
    await inside.wait()
    task.cancel("enough")
    with pytest.raises(asyncio.CancelledError, match="enough"):
        await task
    assert log == ["in a thread", "committed"]
    assert worker.checked_out() == 0
    assert await worker.notes() == ["a"]
    assert complaints(caplog) == []


@pytest.mark.parametrize("act", [leave, commit_unit, commit_session])
async def test_scope_cancelled_in_a_hook(worker: Site, act: Act, log: Log) -> None:
    """AnyIO's scopes cancel at every await; the other hooks run to their ends, with the session."""
    scope = CancelScope()

    async def slow() -> None:
        scope.cancel()
        await asyncio.Event().wait()

    async def read() -> None:
        await asyncio.sleep(0)
        log.append(str(await worker.db.session.scalar(select(func.count(Note.id)))))
        await worker.db.session.rollback()

    with scope:
        async with worker.db(commit_on_exit=True) as unit:
            unit.on_commit(slow)
            unit.on_commit(read)
            unit.on_commit(lambda: asyncio.to_thread(log.append, "in a thread"))
            unit.on_commit(log.hook("committed"))
            await act(unit)
    assert scope.cancelled_caught
    assert log == ["1", "in a thread", "committed"]
    assert worker.checked_out() == 0
    assert await worker.notes() == ["a"]


@pytest.mark.parametrize("register", ["on_commit", "on_rollback"])
async def test_hook_that_cannot_be_called_is_refused(worker: Site, register: str) -> None:
    """A coroutine in place of its function is refused where it is registered."""
    async with worker.db() as unit:
        coroutine = broken_later()
        with pytest.raises(TypeError, match=r"a hook must be .*, not <coroutine object broken_later"):
            getattr(unit, register)(coroutine)
        coroutine.close()


@pytest.mark.parametrize("act", [leave, commit_unit, commit_session])
async def test_session_in_a_hook(worker: Site, act: Act) -> None:
    """A hook may read by `db.session`: a transaction of its own, which is over when the unit is."""
    seen: list[object] = []

    async def look() -> None:
        assert worker.db.unit is unit
        seen.append(await worker.db.session.scalar(select(func.count()).select_from(Note)))

    async with worker.db(commit_on_exit=True) as unit:
        unit.on_commit(look)
        await act(unit)
    assert seen == [1]
    assert worker.checked_out() == 0


@pytest.mark.parametrize("act", [leave, commit_unit, commit_session, begin_block])
async def test_unit_in_a_hook(worker: Site, act: Act) -> None:
    """A hook may write in a unit of its own, whose outcome is its own."""

    async def write() -> None:
        async with worker.db(commit_on_exit=True) as inner:
            await add(inner, "by the hook")
        assert worker.db.unit is unit

    async with worker.db(commit_on_exit=True) as unit:
        unit.on_commit(write)
        await act(unit)
    assert await worker.notes() == ["a", "by the hook"]


@pytest.mark.parametrize("act", [leave, commit_unit, commit_session, begin_block])
async def test_hook_registered_by_a_hook(
    worker: Site, act: Act, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    """A hook that a hook registers runs too, once, before the unit is over."""
    async with worker.db(commit_on_exit=True) as unit:
        unit.on_commit(lambda: unit.on_commit(log.hook("second")))
        unit.on_commit(log.hook("first"))
        await act(unit)
    assert log == ["first", "second"]
    assert complaints(caplog) == []


# Savepoints.


@pytest.mark.parametrize("commit_on_exit", [True, False])
async def test_savepoint_rolled_back(worker: Site, log: Log, *, commit_on_exit: bool) -> None:
    """Hooks of a savepoint that was rolled back saw a rollback, at the unit's end, whatever its outcome."""
    async with worker.db(commit_on_exit=commit_on_exit) as unit:
        await add(unit)
        log.both(unit, "before")
        with suppress(BoomError):
            async with unit.savepoint():
                log.both(unit, "inside")
                await add(unit, "b")
                await fail_early(unit)
        log.both(unit, "after")
        assert log == []
    outcome = "committed" if commit_on_exit else "rolled back"
    assert log == [f"before {outcome}", "inside rolled back", f"after {outcome}"]
    assert await worker.notes() == (["a"] if commit_on_exit else [])


@pytest.mark.parametrize("commit_on_exit", [True, False])
async def test_savepoint_released(worker: Site, log: Log, *, commit_on_exit: bool) -> None:
    """Hooks of a savepoint that was released share the outcome of the unit."""
    async with worker.db(commit_on_exit=commit_on_exit) as unit:
        await add(unit)
        async with unit.savepoint():
            log.both(unit, "inside")
            await add(unit, "b")
        assert log == []
    assert log == [f"inside {'committed' if commit_on_exit else 'rolled back'}"]


async def test_savepoint_released_in_one_rolled_back(worker: Site, log: Log) -> None:
    """Hooks share the fate of the outer savepoint once the inner one is released into it."""
    async with worker.db(commit_on_exit=True) as unit:
        await add(unit)
        with suppress(BoomError):
            async with unit.savepoint():
                async with unit.savepoint():
                    log.both(unit, "innermost")
                    await add(unit, "b")
                log.both(unit, "inner")
                await fail_early(unit)
        assert log == []
    assert log == ["innermost rolled back", "inner rolled back"]
    assert await worker.notes() == ["a"]


async def test_savepoint_rolled_back_by_hand(worker: Site, log: Log) -> None:
    """Savepoints of the session itself count like the unit's."""
    async with worker.db(commit_on_exit=True) as unit:
        await add(unit)
        savepoint = await unit.session.begin_nested()
        log.both(unit, "inside")
        await savepoint.rollback()
        savepoint = await unit.session.begin_nested()
        log.both(unit, "released")
        await savepoint.commit()
    assert log == ["inside rolled back", "released committed"]


async def test_savepoint_before_a_hook(worker: Site, log: Log) -> None:
    """A savepoint that ended before the first hook was registered touches no hook."""
    async with worker.db(commit_on_exit=True) as unit:
        await add(unit)
        with suppress(BoomError):
            async with unit.savepoint():
                await fail_early(unit)
        log.both(unit)
    assert log == ["committed"]


# In a request.


async def test_hooks_run_before_the_response_is_on_the_wire(
    make_site: MakeSite, database_url: str, log: Log
) -> None:
    """A client that holds the head of the response can see what the hooks did, while the body goes on."""
    site = await make_site(database_url, commit_on_exit=True)
    go_on = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        await go_on.wait()
        yield b"end"

    @site.app.get("/")
    async def write() -> StreamingResponse:
        log.both(site.db.unit)
        await add(site.db.unit)
        return StreamingResponse(body())

    async with serve(site.app) as address, raw_get(address, "/") as response:
        assert await response.status() == 200
        assert log == ["committed"]
        go_on.set()
        await response.until(b"end")


@pytest.mark.parametrize("kind", ["raised", "returned", "crash"])
async def test_error_response_runs_the_rollback_hooks(
    make_site: MakeSite, database_url: str, kind: str, log: Log
) -> None:
    """A client that holds an error can see what the `on_rollback` hooks did; the others have not run."""
    site = await make_site(database_url, commit_on_exit=True)

    @site.app.get("/")
    async def write() -> StreamingResponse:
        log.both(site.db.unit)
        await add(site.db.unit)
        if kind == "crash":
            raise BoomError
        if kind == "raised":
            raise HTTPException(409)
        return StreamingResponse(iter([b"conflict"]), status_code=409)

    response = await site.get(raise_app_exceptions=False)
    assert response.status_code == (500 if kind == "crash" else 409)
    assert log == ["rolled back"]
    assert await site.notes() == []


async def test_request_without_a_transaction_runs_its_hooks(
    make_site: MakeSite, sqlite_url: str, log: Log
) -> None:
    """A hook needs no transaction: it runs when the response starts, and no connection is checked out."""
    site = await make_site(sqlite_url)

    @site.app.get("/")
    async def register() -> str:
        log.both(site.db.unit)
        site.db.unit.on_commit(lambda: log.append(f"{site.checked_out()} connections"))
        return "done"

    assert (await site.get()).json() == "done"
    assert log == ["committed", "0 connections"]


@pytest.mark.parametrize("hook", [broken, broken_later])
async def test_failing_hook_leaves_the_response_as_it_is(
    make_site: MakeSite, database_url: str, hook: Callable[[], object], caplog: pytest.LogCaptureFixture
) -> None:
    """The client of a request whose hook failed gets the response of the route, and the write is there."""
    site = await make_site(database_url, commit_on_exit=True)

    @site.app.get("/")
    async def write() -> str:
        site.db.unit.on_commit(hook)
        await add(site.db.unit)
        return "done"

    response = await site.get()
    assert (response.status_code, response.json()) == (200, "done")
    assert await site.notes() == ["a"]
    assert len(complaints(caplog)) == 1


async def test_session_in_a_hook_of_a_request(make_site: MakeSite, database_url: str, log: Log) -> None:
    """In a hook `db.session` is the request's session, before the response and in its tail."""
    site = await make_site(database_url, commit_on_exit=True)

    async def count() -> None:
        log.append(f"{await site.db.session.scalar(select(func.count()).select_from(Note))} notes")

    async def body() -> AsyncIterator[bytes]:
        site.db.unit.on_commit(count)
        await add(site.db.unit, "in the tail")
        yield b"end"

    @site.app.get("/")
    async def write() -> StreamingResponse:
        site.db.unit.on_commit(count)
        await add(site.db.unit)
        return StreamingResponse(body())

    async with serve(site.app) as address, AsyncClient(timeout=60) as client:
        assert (await client.get(address.url)).text == "end"
    assert log == ["1 notes", "2 notes"]


async def test_hook_of_a_route_in_a_thread(make_site: MakeSite, database_url: str, log: Log) -> None:
    """A `def` route registers hooks too; they run in the loop after the commit."""
    site = await make_site(database_url, commit_on_exit=True)

    @site.app.get("/")
    def write() -> str:
        log.both(site.db.unit)
        site.db.unit.on_commit(lambda: log.append(asyncio.get_running_loop().__class__.__name__[-9:]))
        site.db.session.add(Note(text="a"))
        return "done"

    assert (await site.get()).json() == "done"
    assert log == ["committed", "EventLoop"]


# Never on an unknown outcome.


@pytest.mark.parametrize("act", [leave, commit_unit, commit_session, begin_block, begin_and_commit])
async def test_no_hook_runs_when_the_outcome_is_unknown(
    postgresql_worker: Site, act: Act, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    """A connection that breaks in COMMIT runs no hook; the log says that the outcome is unknown."""
    await die_in_commit(postgresql_worker.judge)

    async def work() -> None:
        async with postgresql_worker.db(commit_on_exit=True) as unit:
            log.both(unit)
            await act(unit)

    with pytest.raises(DBAPIError, match=r"(?i)terminating connection|connection.* closed") as raised:
        await work()
    assert raised.value.connection_invalidated
    assert log == []
    (complaint,) = complaints(caplog)
    assert complaint.startswith("ERROR: COMMIT on ")
    assert "its outcome is unknown, no hook" in complaint
    assert postgresql_worker.checked_out() == 0


async def test_unit_goes_on_after_an_unknown_outcome(postgresql_worker: Site, log: Log) -> None:
    """The next transaction of a unit has a new connection and hooks of its own."""
    judge = postgresql_worker.judge
    await die_in_commit(judge)
    async with postgresql_worker.db(commit_on_exit=True) as unit:
        log.both(unit, "first")
        with pytest.raises(DBAPIError, match=r"(?i)terminating connection|connection.* closed"):
            await commit_unit(unit)
        await judge.execute("DROP TRIGGER die ON note")
        await unit.rollback()
        log.both(unit, "second")
        await unit.session.execute(text("INSERT INTO note (text) VALUES ('b')"))
    assert log == ["second committed"]
    assert await postgresql_worker.notes() == ["b"]


async def test_request_with_an_unknown_outcome(
    make_site: MakeSite, postgresql_url: str, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    """A request whose connection breaks in COMMIT answers 500 and runs no hook."""
    site = await make_site(postgresql_url, commit_on_exit=True)
    await die_in_commit(site.judge)

    @site.app.get("/")
    async def write() -> str:
        log.both(site.db.unit)
        await add(site.db.unit)
        return "done"

    assert (await site.get(raise_app_exceptions=False)).status_code == 500
    assert log == []
    assert "its outcome is unknown, no hook" in caplog.text


async def test_connection_lost_before_commit_is_a_rollback(postgresql_worker: Site, log: Log) -> None:
    """A connection that breaks before COMMIT was sent has a known outcome: the `on_rollback` hooks run."""

    async def work() -> None:
        async with postgresql_worker.db(commit_on_exit=True) as unit:
            log.both(unit)
            await add(unit)
            await unit.session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    with pytest.raises(DBAPIError, match=r"(?i)terminating connection|connection.* closed"):
        await work()
    assert log == ["rolled back"]
    assert postgresql_worker.checked_out() == 0
