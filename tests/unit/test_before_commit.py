"""`before_commit` hooks write into the transaction however a unit commits, and can refuse COMMIT."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, cast

import pytest
from fastapi import FastAPI, HTTPException
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from fastapi_async_sqlalchemy import UnexpectedRollbackError, create_middleware_and_session_proxy
from tests.support.databases import JudgeFor
from tests.support.hooks import (
    COMMITS,
    ROLLBACKS,
    Act,
    BoomError,
    Log,
    Unit,
    add,
    begin_and_commit,
    begin_block,
    commit_session,
    commit_unit,
    leave,
    leave_unflushed,
    play,
)
from tests.support.serving import asgi_client
from tests.support.site import MakeSite, Site, complaints
from tests.support.tables import ORPHAN, Note, Reply
from tests.support.worker import open_worker

Stage = tuple[Site, Callable[[Act], Awaitable[None]]]
"""A site, and how to play an act in it."""


async def answer_of_the_status(_: Request, __: Exception) -> Response:
    """Answer as an application's handler of a status does."""
    return PlainTextResponse("by the handler of 409", 409)


def outbox(unit: Unit, note: str = "outbox") -> Callable[[], Awaitable[None]]:
    """Return a hook that writes a row beside those of its unit."""

    async def write() -> None:
        await add(unit, note)

    return write


@pytest.fixture(params=["worker", "request"])
async def stage(
    request: pytest.FixtureRequest, database_url: str, judge_for: JudgeFor, make_site: MakeSite
) -> AsyncIterator[Stage]:
    """A worker and a request in turn, on each of the three databases: the site, and how to play an act."""
    if request.param == "request":
        site = await make_site(database_url, commit_on_exit=True)
        yield site, lambda act: play(site, act, in_request=True)
        return
    async with open_worker(database_url, judge_for) as worker:
        yield worker, lambda act: play(worker, act, in_request=False)


@pytest.mark.parametrize("commit", COMMITS)
async def test_before_commit_writes_into_the_transaction(stage: Stage, commit: Act, log: Log) -> None:
    """However a unit commits, what a hook writes before that is committed with the rest, once."""
    site, play_in = stage

    async def act(unit: Unit) -> None:
        async def write() -> None:
            assert await site.notes() == []
            assert site.db.unit is unit
            await add(unit, "outbox")
            log.append("hook")

        unit.before_commit(write)
        unit.on_commit(log.hook("committed"))
        unit.on_rollback(log.hook("rolled back"))
        await commit(unit)

    await play_in(act)
    assert log == ["hook", "committed"]
    assert await site.notes() == ["a", "outbox"]


@pytest.mark.parametrize("commit", COMMITS)
async def test_before_commit_may_be_a_plain_function(worker: Site, commit: Act, log: Log) -> None:
    """A plain function runs too, in the order of registration; objects that it adds are flushed."""
    async with worker.db(commit_on_exit=True) as unit:
        unit.before_commit(lambda: unit.session.add(Note(text="by a function")))
        unit.before_commit(outbox(unit))
        unit.before_commit(log.hook("last"))
        await commit(unit)
    assert log == ["last"]
    assert await worker.notes() == ["a", "by a function", "outbox"]


@pytest.mark.parametrize("commit", COMMITS)
async def test_before_commit_shares_the_rollback(deferring_worker: Site, commit: Act, log: Log) -> None:
    """When the database refuses COMMIT, what the hook wrote is gone with the rest."""

    async def work() -> None:
        async with deferring_worker.db(commit_on_exit=True) as unit:
            log.all(unit)
            unit.before_commit(outbox(unit))
            unit.before_commit(lambda: unit.session.add(Reply(**ORPHAN)))
            await commit(unit)

    with pytest.raises(IntegrityError, match=r"(?i)foreign key"):
        await work()
    assert log == ["before", "rolled back"]
    assert await deferring_worker.notes() == []


@pytest.mark.parametrize("commit", COMMITS)
async def test_failing_before_commit_stops_the_commit(
    stage: Stage, commit: Act, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    """An error in the hook reaches whoever commits; nothing is written, and it is a rollback to the hooks."""
    site, play_in = stage
    error = BoomError("boom")

    def fail() -> None:
        raise error

    async def act(unit: Unit) -> None:
        unit.before_commit(outbox(unit))
        unit.before_commit(fail)
        log.all(unit)
        await commit(unit)

    with pytest.raises(BoomError, match=r"^boom$") as raised:
        await play_in(act)
    assert raised.value is error
    assert log == ["rolled back"]
    assert site.checked_out() == 0
    assert await site.notes() == []
    assert complaints(caplog) == []


async def fail() -> None:
    """Fail before COMMIT."""
    message = "boom"
    raise BoomError(message)


async def test_client_of_a_failing_before_commit_gets_an_error(
    make_site: MakeSite, database_url: str
) -> None:
    """The client of a request whose hook failed before COMMIT gets an error and nothing of the response."""
    site = await make_site(database_url, commit_on_exit=True)

    @site.app.get("/")
    async def route() -> str:
        site.db.unit.before_commit(fail)
        await add(site.db.unit)
        return "done"

    response = await site.get(raise_app_exceptions=False)
    assert response.status_code == 500
    assert "done" not in response.text
    assert await site.notes() == []


@pytest.mark.parametrize("commit", [commit_unit, commit_session])
async def test_refused_commit_is_not_made_up_for(worker: Site, commit: Act) -> None:
    """A commit whose hook failed and whose error was swallowed is never repeated without the hook's work."""
    with suppress(BoomError, UnexpectedRollbackError):
        async with worker.db(commit_on_exit=True) as unit:
            unit.before_commit(fail)
            with pytest.raises(BoomError, match=r"^boom$"):
                await commit(unit)
    assert await worker.notes() == []


@pytest.mark.parametrize("commit", [commit_unit, commit_session, begin_block])
async def test_before_commit_runs_before_the_next_commit_only(worker: Site, commit: Act, log: Log) -> None:
    """A hook belongs to one transaction, and runs for no later one."""
    async with worker.db(commit_on_exit=True) as unit:
        log.all(unit)
        await commit(unit)
        assert log == ["before", "committed"]
        await add(unit, "b")
        await unit.commit()
        await add(unit, "c")
    assert log == ["before", "committed"]
    assert await worker.notes() == ["a", "b", "c"]


@pytest.mark.parametrize("act", ROLLBACKS)
async def test_before_commit_never_runs_on_rollback(worker: Site, act: Act, log: Log) -> None:
    """A hook whose transaction is rolled back never runs, not for a later commit either."""
    with suppress(BoomError):
        async with worker.db(commit_on_exit=True) as unit:
            log.all(unit)
            await act(unit)
            await unit.session.scalar(select(1))
    assert log == ["rolled back"]
    assert await worker.notes() == []


@pytest.mark.parametrize(
    ("handlers", "body"), [({}, "full"), ({409: answer_of_the_status}, "by the handler of 409")]
)
@pytest.mark.parametrize("kind", [FastAPI, Starlette])
async def test_before_commit_may_refuse_as_a_route_does(
    make_site: MakeSite, postgresql_url: str, kind: type[Starlette], handlers: dict[Any, Any], body: str
) -> None:
    """An HTTPException of a hook is answered as any other: by the status' handler, or the framework's."""
    site = await make_site(postgresql_url)
    middleware, db = create_middleware_and_session_proxy(AsyncSession)

    def refuse() -> None:
        raise HTTPException(409, "full")

    async def route(_: Request) -> Response:
        db.unit.before_commit(refuse)
        await add(db.unit)
        return Response()

    ours = Middleware(cast("Any", middleware), custom_engine=site.engine, commit_on_exit=True)
    app = kind(routes=[Route("/", route)], middleware=[ours], exception_handlers=handlers)
    async with asgi_client(app) as client:
        response = await client.get("/")
    assert response.status_code == 409
    assert body in response.text
    assert await site.notes() == []


@pytest.mark.parametrize("kind", ["raised", "returned", "crash"])
@pytest.mark.parametrize("writes", [True, False])
async def test_error_response_runs_no_before_commit(
    make_site: MakeSite, database_url: str, kind: str, log: Log, *, writes: bool
) -> None:
    """An error response is a rollback to the hooks of a request that wrote, and of one that only read."""
    site = await make_site(database_url, commit_on_exit=True)

    @site.app.get("/")
    async def route() -> StreamingResponse:
        log.all(site.db.unit)
        await site.db.session.scalar(select(Note))
        if writes:
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


async def test_before_commit_in_the_tail(make_site: MakeSite, database_url: str, log: Log) -> None:
    """Each transaction of a request has its own hooks: one until the response starts, one in the tail."""
    site = await make_site(database_url, commit_on_exit=True)

    async def body() -> AsyncIterator[bytes]:
        assert log == ["early before", "early committed"]
        log.all(site.db.unit, "late")
        site.db.unit.before_commit(outbox(site.db.unit, "late outbox"))
        await add(site.db.unit, "b")
        yield b"end"

    @site.app.get("/")
    async def route() -> StreamingResponse:
        log.all(site.db.unit, "early")
        site.db.unit.before_commit(outbox(site.db.unit, "early outbox"))
        await add(site.db.unit)
        return StreamingResponse(body())

    assert (await site.get()).text == "end"
    assert log == ["early before", "early committed", "late before", "late committed"]
    assert await site.notes() == ["a", "b", "early outbox", "late outbox"]


@pytest.mark.parametrize("commit", COMMITS)
async def test_before_commit_of_a_savepoint(worker: Site, commit: Act, log: Log) -> None:
    """A hook of a savepoint that was rolled back does not run; one of a savepoint that was released does."""
    async with worker.db(commit_on_exit=True) as unit:
        await unit.session.execute(insert(Note).values(text="before"))
        with suppress(BoomError):
            async with unit.savepoint():
                async with unit.savepoint():
                    unit.before_commit(log.hook("released into one rolled back"))
                unit.before_commit(log.hook("rolled back"))
                raise BoomError
        async with unit.savepoint():
            unit.before_commit(log.hook("released"))
        if commit not in {begin_block, begin_and_commit}:
            await commit(unit)
    assert log == ["released"]


@pytest.mark.parametrize("by", ["end", "commit"])
async def test_before_commit_without_a_transaction(stage: Stage, by: str, log: Log) -> None:
    """A unit that sent nothing runs its hooks all the same; one that writes begins the transaction."""
    site, play_in = stage

    async def act(unit: Unit) -> None:
        log.all(unit)
        unit.before_commit(outbox(unit))
        if by == "commit":
            await unit.commit()

    await play_in(act)
    assert log == ["before", "committed"]
    assert site.checked_out() == 0
    assert await site.notes() == ["outbox"]


@pytest.mark.parametrize("by", ["end", "commit"])
async def test_before_commit_without_any_transaction(stage: Stage, by: str, log: Log) -> None:
    """A hook that needs no transaction begins none."""
    _, play_in = stage

    async def act(unit: Unit) -> None:
        unit.on_begin(log.begin)
        log.all(unit)
        if by == "commit":
            await unit.commit()

    await play_in(act)
    assert log == ["before", "committed"]


@pytest.mark.parametrize("by", ["end", "commit"])
async def test_failing_before_commit_without_a_transaction(stage: Stage, by: str, log: Log) -> None:
    """The error of a hook in a unit that sent nothing is a rollback to the other hooks too."""
    _, play_in = stage

    async def act(unit: Unit) -> None:
        unit.before_commit(fail)
        log.all(unit)
        if by == "commit":
            await unit.commit()

    with pytest.raises(BoomError, match=r"^boom$"):
        await play_in(act)
    assert log == ["rolled back"]


@pytest.mark.parametrize("commit", COMMITS)
async def test_before_commit_registers_hooks(worker: Site, commit: Act, log: Log) -> None:
    """A hook may register others: those before COMMIT run before this one, those after it after this one."""
    async with worker.db(commit_on_exit=True) as unit:

        async def register() -> None:
            unit.on_commit(log.hook("committed"))
            unit.on_rollback(log.hook("rolled back"))
            unit.before_commit(outbox(unit, "second outbox"))
            await add(unit, "outbox")

        unit.before_commit(register)
        await commit(unit)
    assert log == ["committed"]
    assert await worker.notes() == ["a", "outbox", "second outbox"]


@pytest.mark.parametrize("commit", COMMITS)
async def test_before_commit_in_a_savepoint_of_its_own(worker: Site, commit: Act, log: Log) -> None:
    """A hook may try something in a savepoint; what fails there is undone there, and COMMIT goes on."""
    async with worker.db(commit_on_exit=True) as unit:

        async def attempt() -> None:
            await unit.session.flush()
            with suppress(IntegrityError):
                async with unit.savepoint():
                    await unit.session.execute(insert(Note).values(text="a"))
            async with unit.savepoint():
                await unit.session.execute(insert(Note).values(text="outbox"))

        unit.before_commit(attempt)
        log.all(unit)
        await commit(unit)
    assert log == ["before", "committed"]
    assert await worker.notes() == ["a", "outbox"]


@pytest.mark.parametrize("commit", COMMITS)
async def test_swallowed_statement_error_before_commit(
    postgresql_worker: Site, commit: Act, log: Log
) -> None:
    """A hook that swallows a statement's error makes no silent rollback: COMMIT raises."""

    async def work() -> None:
        async with postgresql_worker.db(commit_on_exit=True) as unit:

            async def swallow() -> None:
                with suppress(DBAPIError):
                    await unit.session.execute(text("SELECT 1/0"))

            unit.before_commit(swallow)
            log.all(unit)
            await commit(unit)

    with pytest.raises(UnexpectedRollbackError, match="has aborted the transaction") as raised:
        await work()
    assert "division by zero" in str(raised.value.__cause__)
    assert log == ["before", "rolled back"]
    assert await postgresql_worker.notes() == []


async def do_nothing(unit: Unit) -> None:
    """Begin nothing."""


@pytest.mark.parametrize("by", ["leaving", "unit", "session"])
async def test_no_before_commit_after_a_swallowed_statement_error(
    postgresql_worker: Site, by: str, log: Log
) -> None:
    """In a transaction that the database has given up no hook runs: COMMIT raises first."""

    async def work() -> None:
        async with postgresql_worker.db(commit_on_exit=True) as unit:
            log.all(unit)
            await add(unit)
            with suppress(DBAPIError):
                await unit.session.execute(text("SELECT 1/0"))
            if by != "leaving":
                await (unit if by == "unit" else unit.session).commit()

    with pytest.raises(UnexpectedRollbackError, match="has aborted the transaction"):
        await work()
    assert log == ["rolled back"]
    assert await postgresql_worker.notes() == []


@pytest.mark.parametrize("commit", [*COMMITS, do_nothing])
async def test_before_commit_marks_the_unit(worker: Site, commit: Act) -> None:
    """A hook that swallows the failure of a block which had joined the unit makes COMMIT raise."""

    async def work() -> None:
        async with worker.db(commit_on_exit=True) as unit:

            async def swallow() -> None:
                with suppress(BoomError):
                    async with worker.db(propagation="mandatory"):
                        raise BoomError

            unit.before_commit(swallow)
            await commit(unit)

    with pytest.raises(UnexpectedRollbackError, match="a block that had joined it failed"):
        await work()
    assert await worker.notes() == []


@pytest.mark.parametrize("act", [leave, leave_unflushed, do_nothing])
async def test_given_up_before_commit(
    stage: Stage, act: Act, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    """A hook that gives the transaction up makes a rollback in silence, also where none was open."""
    site, play_in = stage

    async def work(unit: Unit) -> None:
        unit.before_commit(unit.set_rollback_only)
        log.all(unit)
        await act(unit)

    await play_in(work)
    assert log == ["before", "rolled back"]
    assert await site.notes() == []
    assert complaints(caplog) == []


async def test_response_whose_transaction_a_hook_gives_up(make_site: MakeSite, database_url: str) -> None:
    """The client gets the answer of the route."""
    site = await make_site(database_url, commit_on_exit=True)

    @site.app.get("/")
    async def route() -> str:
        site.db.unit.before_commit(site.db.unit.set_rollback_only)
        await add(site.db.unit)
        return "done"

    response = await site.get()
    assert (response.status_code, response.json()) == (200, "done")
    assert await site.notes() == []


@pytest.mark.parametrize("commit", [commit_unit, commit_session, begin_block, begin_and_commit, Unit.commit])
async def test_commit_by_name_of_what_a_hook_gives_up(worker: Site, commit: Act, log: Log) -> None:
    """Who asks for COMMIT by name is told that there was none, and of which database."""
    told = (
        rf"^The transaction of .*{worker.engine.url.database}\) cannot be .* set_rollback_only\(\) was called"
    )
    async with worker.db(commit_on_exit=True) as unit:
        unit.before_commit(unit.set_rollback_only)
        log.all(unit)
        with pytest.raises(UnexpectedRollbackError, match=told):
            await commit(unit)
    assert log == ["before", "rolled back"]
    assert await worker.notes() == []


@pytest.mark.parametrize("commit", COMMITS)
async def test_cancelled_before_commit(worker: Site, commit: Act, log: Log) -> None:
    """A task that is cancelled in the hook rolls back, and its outcome is known to the other hooks."""
    inside = asyncio.Event()

    async def slow() -> None:
        inside.set()
        await asyncio.Event().wait()

    async def work() -> None:
        async with worker.db(commit_on_exit=True) as unit:
            unit.before_commit(slow)
            log.all(unit)
            await commit(unit)

    task = asyncio.create_task(work())
    await inside.wait()
    task.cancel("enough")
    with pytest.raises(asyncio.CancelledError, match="enough"):
        await task
    assert log == ["rolled back"]
    assert worker.checked_out() == 0
    assert await worker.notes() == []


@pytest.mark.parametrize("wrong", [3, None, "fn"], ids=repr)
@pytest.mark.parametrize("register", ["before_commit", "on_begin"])
async def test_hook_that_cannot_be_called_is_refused(
    sqlite_url: str, judge_for: JudgeFor, register: str, wrong: Any
) -> None:
    """What cannot be called is refused where it is registered."""
    async with open_worker(sqlite_url, judge_for) as worker, worker.db() as unit:
        with pytest.raises(TypeError, match=f"a hook must be a function, not {wrong!r}"):
            getattr(unit, register)(wrong)
