"""Hooks around a transaction: what runs before COMMIT and where a transaction begins, and how often."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, cast

import pytest
from fastapi import FastAPI, HTTPException
from httpx2 import AsyncClient
from sqlalchemy import Connection, event, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from fastapi_async_sqlalchemy import (
    TransactionBegunError,
    UnexpectedRollbackError,
    UnitOfWork,
    create_middleware_and_session_proxy,
)
from tests.support.databases import Judge, JudgeFor
from tests.support.serving import asgi_client, serve
from tests.support.site import MakeSite, Site, complaints
from tests.support.tables import ORPHAN, Note, Reply
from tests.support.worker import open_worker

Unit = UnitOfWork[AsyncSession]
Act = Callable[[Unit], Awaitable[object]]
Stage = tuple[Site, Callable[[Act], Awaitable[None]]]
"""A site, and how to play an act in it."""
BROKEN = r"(?i)terminating connection|connection.* closed|another operation"


class BoomError(Exception):
    """The error of a test's own."""


class Log(list[str]):
    """What hooks have run, in order."""

    def hook(self, event: str) -> Callable[[], None]:
        """Return a hook that notes an event."""
        return lambda: self.append(event)

    def all(self, unit: Unit, event: str = "") -> None:
        """Register a hook for each moment there is but a transaction's beginning."""
        unit.on_commit(self.hook(f"{event} committed".strip()))
        unit.on_rollback(self.hook(f"{event} rolled back".strip()))
        unit.before_commit(self.hook(f"{event} before".strip()))

    def begin(self, connection: Connection) -> None:
        """Note that a transaction begins."""
        self.append("begin")


@pytest.fixture
def log() -> Log:
    """An empty log."""
    return Log()


async def answer_of_the_status(_: Request, __: Exception) -> Response:
    """Answer as an application's handler of a status does."""
    return PlainTextResponse("by the handler of 409", 409)


async def add(unit: Unit, note: str = "a") -> None:
    """Write a note."""
    unit.session.add(Note(text=note))
    await unit.session.flush()


def outbox(unit: Unit, note: str = "outbox") -> Callable[[], Awaitable[None]]:
    """Return a hook that writes a row beside those of its unit."""

    async def write() -> None:
        await add(unit, note)

    return write


# However a unit commits.


async def leave(unit: Unit) -> None:
    """Write, and leave the rest to the end of the unit."""
    await add(unit)


async def leave_unflushed(unit: Unit) -> None:
    """Change objects alone, and leave the rest to the end of the unit."""
    unit.session.add(Note(text="a"))


async def commit_unit(unit: Unit) -> None:
    """Write and commit by the unit."""
    await add(unit)
    await unit.commit()


async def commit_session(unit: Unit) -> None:
    """Write and commit by the session."""
    await add(unit)
    await unit.session.commit()


async def begin_block(unit: Unit) -> None:
    """Write in a block that commits itself."""
    async with unit.session.begin():
        unit.session.add(Note(text="a"))


async def begin_and_commit(unit: Unit) -> None:
    """Write in a transaction that is begun and committed by hand."""
    transaction = await unit.session.begin()
    await add(unit)
    await transaction.commit()


COMMITS = (leave, leave_unflushed, commit_unit, commit_session, begin_block, begin_and_commit)


def moments(commit: Act) -> list[str]:
    """Return what comes until COMMIT: the hooks before it run before its flush, which may be what begins."""
    moments = ["begin", "before"]
    return moments[::-1] if commit in {leave_unflushed, begin_block} else moments


async def play(site: Site, act: Act, *, in_request: bool) -> None:
    """Play an act in a unit, or a request, that commits at its end; its errors go on."""
    if not in_request:
        async with site.db(commit_on_exit=True) as unit:
            await act(unit)
        return

    @site.app.get("/")
    async def route() -> None:
        await act(site.db.unit)

    await site.get()


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


async def rollback_unit(unit: Unit) -> None:
    """Write and roll back by the unit."""
    await add(unit)
    await unit.rollback()


async def rollback_session(unit: Unit) -> None:
    """Write and roll back by the session."""
    await add(unit)
    await unit.session.rollback()


async def close_session(unit: Unit) -> None:
    """Write and close the session."""
    await add(unit)
    await unit.session.close()


async def write_and_fail(unit: Unit) -> None:
    """Write and fail."""
    await add(unit)
    raise BoomError


async def fail_early(unit: Unit) -> None:
    """Fail before anything was sent."""
    raise BoomError


async def fail_in_begin_block(unit: Unit) -> None:
    """Fail in a block that rolls back itself."""
    async with unit.session.begin():
        await add(unit)
        raise BoomError


async def give_up(unit: Unit) -> None:
    """Write, and have the unit rolled back at its end."""
    await add(unit)
    unit.set_rollback_only()


async def fail_in_a_savepoint_and_outside(unit: Unit) -> None:
    """Release a savepoint, then fail."""
    await add(unit)
    async with unit.savepoint():
        await add(unit, "b")
    raise BoomError


ROLLBACKS = (
    *(rollback_unit, rollback_session, close_session, write_and_fail, fail_early, fail_in_begin_block),
    *(give_up, fail_in_a_savepoint_and_outside),
)


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

    with pytest.raises(UnexpectedRollbackError, match="has given the transaction up") as raised:
        await work()
    assert "division by zero" in str(raised.value.__cause__)
    assert log == ["before", "rolled back"]
    assert await postgresql_worker.notes() == []


async def do_nothing(unit: Unit) -> None:
    """Begin nothing."""


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


# Where a transaction begins.


async def test_on_begin_comes_before_each_transaction(worker: Site, log: Log) -> None:
    """The hook runs once for each transaction of its unit, on its connection, and for no savepoint."""
    seen: list[object] = []

    def look(connection: Connection) -> None:
        assert connection.in_transaction()
        seen.append(connection.execute(select(1)).scalar_one())

    async with worker.db(commit_on_exit=True) as unit:
        unit.on_begin(look)
        assert unit.opened is not None
        assert worker.checked_out() == 0
        for number, end in enumerate(
            (unit.commit, unit.rollback, unit.session.commit, unit.session.rollback)
        ):
            await add(unit, str(number))
            async with unit.savepoint():
                await unit.session.scalar(select(1))
            assert seen == [1] * (number + 1)
            await end()
        async with unit.session.begin():
            assert len(seen) == 4
            await unit.session.scalar(select(1))
        async with unit.savepoint():
            await unit.session.connection()
    assert seen == [1] * 6
    assert await worker.notes() == ["0", "2"]


@pytest.mark.parametrize("commit", COMMITS)
async def test_on_begin_runs_in_order_and_once(worker: Site, commit: Act, log: Log) -> None:
    """Several hooks run in the order of their registration, once, however the transaction is committed."""
    async with worker.db(commit_on_exit=True) as unit:
        unit.on_begin(log.begin)
        unit.on_begin(lambda connection: log.append("second"))
        await commit(unit)
    assert log == ["begin", "second"]


async def test_on_begin_writes_into_the_transaction(worker: Site) -> None:
    """What the hook writes is part of the transaction, and shares its outcome."""
    async with worker.db(commit_on_exit=True) as unit:
        unit.on_begin(lambda connection: connection.execute(insert(Note).values(text="by the hook")))
        await unit.session.scalar(select(1))
        await unit.rollback()
        assert await worker.notes() == []
        await unit.session.scalar(select(1))
    assert await worker.notes() == ["by the hook"]


def set_timeout(connection: Connection) -> None:
    """Give the transaction's statements a timeout of its own."""
    connection.execute(text("SET LOCAL statement_timeout = '7654ms'"))


async def timeout(session: AsyncSession) -> object:
    """Return the timeout that the transaction's statements have."""
    return await session.scalar(text("SHOW statement_timeout"))


async def test_on_begin_settings_hold_for_the_user_s_statements(postgresql_worker: Site) -> None:
    """What the hook sets for the transaction holds for each statement in it, and for nobody else."""
    db = postgresql_worker.db
    async with db() as unit:
        unit.on_begin(set_timeout)
        assert await timeout(unit.session) == "7654ms"
        await unit.commit()
        assert await timeout(unit.session) == "7654ms"
        await unit.session.rollback()
        async with unit.savepoint():
            assert await timeout(unit.session) == "7654ms"
    async with db() as unit:
        assert await timeout(unit.session) == "0"


@pytest.mark.parametrize("commit_on_exit", [True, False])
async def test_on_begin_in_the_tail(
    make_site: MakeSite, postgresql_url: str, *, commit_on_exit: bool
) -> None:
    """The transaction that a request's tail begins has its hooks too."""
    site = await make_site(postgresql_url, commit_on_exit=commit_on_exit)

    async def body() -> AsyncIterator[str]:
        yield f"{await timeout(site.db.session)} "
        yield f"{await timeout(site.db.session)}"

    @site.app.get("/")
    async def route() -> StreamingResponse:
        site.db.unit.on_begin(set_timeout)
        assert await timeout(site.db.session) == "7654ms"
        return StreamingResponse(body())

    async with serve(site.app) as address, AsyncClient(timeout=60) as client:
        assert (await client.get(address.url)).text == "7654ms 7654ms"


async def test_on_begin_of_a_joined_block(postgresql_worker: Site) -> None:
    """A joined block registers for its owner's unit; a unit of its own has its own hooks alone."""
    db = postgresql_worker.db
    async with db() as unit:
        async with db(propagation="required") as joined:
            joined.on_begin(set_timeout)
        assert await timeout(unit.session) == "7654ms"
        async with db() as inner:
            assert await timeout(inner.session) == "0"


async def execute(session: AsyncSession) -> None:
    """Send a statement."""
    await session.execute(insert(Note).values(text="without the hook"))


async def flush(session: AsyncSession) -> None:
    """Flush an object."""
    session.add(Note(text="without the hook"))
    await session.flush()


async def connect(session: AsyncSession) -> None:
    """Write on the connection."""
    connection = await session.connection()
    await connection.execute(insert(Note).values(text="without the hook"))


async def nest(session: AsyncSession) -> None:
    """Write in a savepoint."""
    async with session.begin_nested():
        await session.execute(insert(Note).values(text="without the hook"))


async def begin(session: AsyncSession) -> None:
    """Write in a block that commits itself."""
    async with session.begin():
        await session.execute(insert(Note).values(text="without the hook"))


def break_down(connection: Connection) -> None:
    """Fail without the database's help."""
    message = "boom"
    raise BoomError(message)


def break_sql(connection: Connection) -> None:
    """Fail by a statement."""
    connection.execute(text("SELECT * FROM no_such_table"))


SENDS = (execute, flush, connect, nest, begin)
BREAKS = (break_down, break_sql)


@pytest.mark.parametrize("send", SENDS)
@pytest.mark.parametrize("hook", BREAKS)
async def test_failing_on_begin_stops_the_statement(
    worker: Site,
    hook: Callable[[Connection], None],
    send: Callable[[AsyncSession], Awaitable[None]],
    log: Log,
) -> None:
    """An error in the hook goes to the statement's caller; none is sent, and the connection is discarded."""

    async def work() -> None:
        async with worker.db(commit_on_exit=True) as unit:
            unit.on_begin(hook)
            log.all(unit)
            await send(unit.session)

    with pytest.raises((BoomError, DBAPIError), match=r"boom|no_such_table"):
        await work()
    assert log == ["rolled back"]
    assert worker.checked_out() == 0
    assert await worker.notes() == []
    async with worker.db(commit_on_exit=True) as unit:
        await add(unit, "next")
    assert await worker.notes() == ["next"]


@pytest.mark.parametrize("send", SENDS[:4])
@pytest.mark.parametrize("hook", BREAKS)
async def test_swallowed_on_begin_error_sends_nothing(
    worker: Site, hook: Callable[[Connection], None], send: Callable[[AsyncSession], Awaitable[None]]
) -> None:
    """A transaction whose hook failed takes no statement more, and cannot be committed."""

    async def work() -> None:
        async with worker.db(commit_on_exit=True) as unit:
            unit.on_begin(hook)
            for _ in range(2):
                with pytest.raises(
                    (BoomError, SQLAlchemyError), match=r"boom|no_such_table|rolled back|closed"
                ):
                    await send(unit.session)
            await unit.commit()

    given_up = r"is rolled back|has been rolled back|has given the transaction up"
    with pytest.raises((PendingRollbackError, UnexpectedRollbackError), match=given_up):
        await work()
    assert worker.checked_out() == 0
    assert await worker.notes() == []


@pytest.mark.parametrize("hook", BREAKS)
async def test_unit_goes_on_after_a_failing_on_begin(
    worker: Site, hook: Callable[[Connection], None], log: Log
) -> None:
    """After a rollback the next transaction begins with the hook again, on another connection."""
    healthy = False

    def sometimes(connection: Connection) -> None:
        log.append("begin")
        if not healthy:
            hook(connection)

    async with worker.db(commit_on_exit=True) as unit:
        unit.on_begin(sometimes)
        with pytest.raises((BoomError, DBAPIError), match=r"boom|no_such_table"):
            await add(unit, "lost")
        await unit.rollback()
        assert worker.checked_out() == 0
        healthy = True
        await add(unit, "kept")
    assert log == ["begin", "begin"]
    assert await worker.notes() == ["kept"]


@pytest.mark.parametrize("hook", BREAKS)
async def test_failing_on_begin_in_a_request(
    make_site: MakeSite, database_url: str, hook: Callable[[Connection], None]
) -> None:
    """A request whose hook failed answers with an error, and the next one has a connection to work with."""
    site = await make_site(database_url, commit_on_exit=True)

    @site.app.get("/broken")
    async def broken() -> str:
        site.db.unit.on_begin(hook)
        await add(site.db.unit)
        return "done"

    @site.app.get("/")
    async def route() -> str:
        await add(site.db.unit)
        return "done"

    async with site.client(raise_app_exceptions=False) as client:
        assert (await client.get("/broken")).status_code == 500
        assert site.checked_out() == 0
        assert await site.notes() == []
        assert (await client.get("/")).status_code == 200
    assert await site.notes() == ["a"]


async def after_a_statement(unit: Unit) -> None:
    """Be in the middle of a transaction."""
    await unit.session.scalar(select(1))


async def after_a_savepoint(unit: Unit) -> None:
    """Be in the middle of a transaction that a savepoint has begun."""
    async with unit.savepoint():
        await unit.session.scalar(select(1))


async def in_a_savepoint(unit: Unit) -> None:
    """Have begun a savepoint, which has sent nothing."""
    await unit.session.begin_nested()


@pytest.mark.parametrize("act", [after_a_statement, after_a_savepoint, in_a_savepoint])
async def test_on_begin_in_the_middle_is_refused(worker: Site, act: Act, log: Log) -> None:
    """In the middle of a transaction the hook comes too late; after its end it does not."""
    async with worker.db() as unit:
        await act(unit)
        with pytest.raises(TransactionBegunError, match=r"is open: call on_begin\(\) before"):
            unit.on_begin(log.begin)
        await unit.rollback()
        unit.on_begin(log.begin)
        await unit.session.scalar(select(1))
    assert log == ["begin"]


async def after_adding(unit: Unit) -> None:
    """Have added what is not flushed yet."""
    unit.session.add(Note(text="added"))


async def after_begin(unit: Unit) -> None:
    """Have begun by hand."""
    await unit.session.begin()
    unit.session.add(Note(text="added"))


@pytest.mark.parametrize("act", [after_adding, after_begin])
async def test_on_begin_before_the_first_statement(worker: Site, act: Act, log: Log) -> None:
    """Where nothing has been sent yet the hook is in time: it runs before what sends the objects."""
    sent: list[str] = []
    event.listen(worker.engine.sync_engine, "before_cursor_execute", lambda *args: sent.append(args[2]))
    async with worker.db() as unit:
        await act(unit)
        unit.on_begin(lambda connection: connection.execute(text("SELECT 'begins'")))
        await unit.commit()
    assert sent[0] == "SELECT 'begins'"
    assert sent[1].startswith("INSERT INTO note")
    assert await worker.notes() == ["added"]


async def test_on_begin_refuses_coroutine_functions(sqlite_url: str, judge_for: JudgeFor) -> None:
    """A coroutine function cannot run where a transaction begins, and is refused."""

    async def later(connection: Connection) -> None:
        """Never run."""

    async with open_worker(sqlite_url, judge_for) as worker, worker.db() as unit:
        with pytest.raises(TypeError, match=r"an on_begin hook must be a plain function of a Connection"):
            unit.on_begin(later)


class Later:
    """A hook that only calling it shows to be asynchronous."""

    async def __call__(self, connection: Connection) -> None:
        """Never run."""


def later(connection: Connection) -> object:
    """Return a coroutine that nobody awaits."""
    return Later()(connection)


@pytest.mark.parametrize("hook", [Later(), later])
async def test_on_begin_that_returns_a_coroutine(
    worker: Site, hook: Callable[[Connection], object], log: Log
) -> None:
    """It fails before the transaction's first statement is sent, and leaves no coroutine to be awaited."""
    sent: list[str] = []
    event.listen(worker.engine.sync_engine, "before_cursor_execute", lambda *args: sent.append(args[2]))

    async def work() -> None:
        async with worker.db(commit_on_exit=True) as unit:
            unit.on_begin(hook)
            log.all(unit)
            await execute(unit.session)

    with pytest.raises(TypeError, match=r"an on_begin hook must be a plain function, and .* a coroutine"):
        await work()
    assert [statement for statement in sent if "note" in statement] == []
    assert log == ["rolled back"]
    assert worker.checked_out() == 0
    assert await worker.notes() == []


# How often, over every outcome.


async def die_in_commit(judge: Judge) -> None:
    """Let the server end the connection of whoever commits a note, in the middle of COMMIT."""
    await judge.execute(
        "CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$"
    )
    await judge.execute(
        "CREATE CONSTRAINT TRIGGER die AFTER INSERT ON note DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION die()"
    )


async def write_orphan(unit: Unit) -> None:
    """Write what fails at COMMIT."""
    await add(unit)
    unit.session.add(Reply(**ORPHAN))


async def cancel(unit: Unit) -> None:
    """Write and be cancelled."""
    await add(unit)
    task = asyncio.current_task()
    assert task is not None
    task.cancel("enough")
    await asyncio.Event().wait()


async def lose_the_connection(unit: Unit) -> None:
    """Write and lose the connection before COMMIT."""
    await add(unit)
    await unit.session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))


OUTCOMES: dict[str, tuple[Act, list[str]]] = {
    **{f"commit: {act.__name__}": (act, [*moments(act), "committed"]) for act in COMMITS},
    **{
        f"rollback: {act.__name__}": (act, ["begin", "rolled back"])
        for act in ROLLBACKS
        if act is not fail_early
    },
    "rollback: fail_early": (fail_early, ["rolled back"]),
    "failed commit": (write_orphan, ["begin", "before", "rolled back"]),
    "cancelled": (cancel, ["begin", "rolled back"]),
    "connection lost": (lose_the_connection, ["begin", "rolled back"]),
}


@pytest.mark.parametrize("in_request", [False, True])
@pytest.mark.parametrize(("act", "expected"), OUTCOMES.values(), ids=OUTCOMES)
async def test_each_hook_runs_as_often_as_its_moment_comes(
    make_site: MakeSite, postgresql_url: str, act: Act, expected: list[str], log: Log, *, in_request: bool
) -> None:
    """Whatever becomes of a unit, its hooks run once each for what did happen, and not for what did not."""
    site = await make_site(postgresql_url, commit_on_exit=True)

    async def work(unit: Unit) -> None:
        unit.on_begin(log.begin)
        log.all(unit)
        await act(unit)

    with suppress(BoomError, IntegrityError, DBAPIError, asyncio.CancelledError):
        if in_request:
            await play(site, work, in_request=True)
        else:
            async with site.client():
                await play(site, work, in_request=False)
    assert log == expected
    assert site.checked_out() == 0


@pytest.mark.parametrize("in_request", [False, True])
@pytest.mark.parametrize("commit", COMMITS)
async def test_no_hook_after_an_unknown_outcome(
    make_site: MakeSite, postgresql_url: str, commit: Act, log: Log, *, in_request: bool
) -> None:
    """A connection that breaks in COMMIT leaves the hooks before it run, and those after it not."""
    site = await make_site(postgresql_url, commit_on_exit=True)
    await die_in_commit(site.judge)

    async def work(unit: Unit) -> None:
        unit.on_begin(log.begin)
        log.all(unit)
        await commit(unit)

    with pytest.raises(DBAPIError, match=BROKEN):
        async with site.client():
            await play(site, work, in_request=in_request)
    assert log == moments(commit)
    assert site.checked_out() == 0


@pytest.mark.parametrize("commit", [commit_unit, commit_session, begin_block, begin_and_commit])
async def test_connection_lost_after_a_commit_is_a_rollback(
    postgresql_worker: Site, commit: Act, log: Log
) -> None:
    """A connection that breaks in a later ROLLBACK has a known outcome, whoever made the commit before."""

    async def work() -> None:
        async with postgresql_worker.db(commit_on_exit=True) as unit:
            log.all(unit, "first")
            await commit(unit)
            log.all(unit, "second")
            await add(unit, "b")
            pid = await unit.session.scalar(text("SELECT pg_backend_pid()"))
            await postgresql_worker.judge.execute(f"SELECT pg_terminate_backend({pid}, 5000)")
            await fail_early(unit)

    with pytest.raises(BoomError, match=r"^$"):
        await work()
    assert log == ["first before", "first committed", "second rolled back"]
    assert await postgresql_worker.notes() == ["a"]
    assert postgresql_worker.checked_out() == 0
