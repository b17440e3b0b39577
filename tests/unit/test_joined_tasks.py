"""Blocks that joined a unit in another task: both halves are committed with the unit, or neither."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import asynccontextmanager, nullcontext, suppress
from typing import Any

import pytest
from fastapi import BackgroundTasks, Depends, Response
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware

from fastapi_async_sqlalchemy import (
    Propagation,
    SessionProxy,
    UnexpectedRollbackError,
    UnitClosedError,
    create_middleware_and_session_proxy,
)
from tests.support.databases import JudgeFor
from tests.support.requests import pass_on
from tests.support.site import MakeSite, Site
from tests.support.stage import BoomError, Stage, Unit, add
from tests.support.tables import engine_with_tables
from tests.support.transfer import Transfer
from tests.support.worker import open_worker

Db = SessionProxy[AsyncSession]
JOINING: tuple[Propagation, ...] = ("required", "nested", "mandatory")
IN_THE_MIDDLE = (
    r"because task 'transfer' is in the middle of a block that has joined it: await the block's task"
)
SHORT = 0.05
"""Seconds that are too few."""


@pytest.fixture(params=["worker on PostgreSQL", "request on SQLite"])
async def stage(
    request: pytest.FixtureRequest,
    postgresql_url: str,
    sqlite_url: str,
    judge_for: JudgeFor,
    make_site: MakeSite,
) -> AsyncIterator[Stage]:
    """A worker and a request, each on another database."""
    if request.param == "request on SQLite":
        yield Stage(await make_site(sqlite_url, commit_on_exit=True), in_request=True)
        return
    async with open_worker(postgresql_url, judge_for) as worker:
        yield Stage(worker, in_request=False)


async def settling(unit: Unit) -> None:
    """Wait until the current task cannot be what keeps the settlement from going on."""
    for _ in range(20):
        await asyncio.sleep(0)
    assert not unit.closed


@pytest.fixture(params=[*JOINING, None], ids=str)
def propagation(request: pytest.FixtureRequest) -> Propagation | None:
    """Each way to join, and `db.transactional`."""
    way: Propagation | None = request.param
    return way


# The settlement waits.


async def test_end_waits_for_the_block(stage: Stage, propagation: Propagation | None) -> None:
    """A unit's end waits for a block of another task, and both halves are committed with the rest."""
    transfer = Transfer(stage.db, propagation)

    async def act(unit: Unit) -> None:
        await add(stage.db, "before")
        await transfer.start()
        asyncio.get_running_loop().call_soon(asyncio.create_task, release(unit))

    async def release(unit: Unit) -> None:
        await settling(unit)
        assert await stage.site.notes() == []
        transfer.resume.set()

    await stage.inside(act)
    assert await stage.site.notes() == ["before", "credit", "debit"]
    assert await transfer.end() is None


async def test_tail_waits_for_the_block(make_site: MakeSite, sqlite_url: str) -> None:
    """A block that begins after the response's start is waited for when the application returns."""
    site = await make_site(sqlite_url, commit_on_exit=True)
    transfer = Transfer(site.db)

    async def tail() -> None:
        await transfer.start()
        asyncio.get_running_loop().call_soon(transfer.resume.set)

    @site.app.get("/")
    async def route(background: BackgroundTasks) -> None:
        background.add_task(tail)

    await site.get()
    assert await transfer.end() is None
    assert await site.notes() == ["credit", "debit"]


async def test_block_that_fails_fails_the_unit(stage: Stage, propagation: Propagation | None) -> None:
    """A block that fails in its task makes the unit's COMMIT fail, unless it was a savepoint."""
    transfer = Transfer(stage.db, propagation)

    async def act(unit: Unit) -> None:
        await add(stage.db, "before")
        (await transfer.start()).cancel()

    if propagation == "nested":
        await stage.inside(act)
    else:
        with pytest.raises(UnexpectedRollbackError, match="a block that had joined it failed"):
            await stage.inside(act)
    assert transfer.tasks[0].cancelled()
    assert await stage.site.notes() == ["before"] * (propagation == "nested")


# It waits as long as for a connection.


@asynccontextmanager
async def impatient(url: str) -> AsyncGenerator[Db]:
    """Bind a pair to an engine whose pool does not wait long."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    async with engine_with_tables(url, pool_timeout=SHORT) as engine:
        db.bind(engine)
        yield db
        db.unbind()


@pytest.mark.parametrize("own", [True, False], ids=["unit's", "pool's"])
async def test_end_refuses_after_the_deadline(
    sqlite_worker: Site, sqlite_url: str, propagation: Propagation | None, *, own: bool
) -> None:
    """Past the deadline for connections, the unit's or else the pool's, the COMMIT is refused."""
    async with impatient(sqlite_url) as db:
        transfer = Transfer(sqlite_worker.db if own else db, propagation)
        options: dict[str, Any] = {"pool_timeout": SHORT} if own else {}
        with pytest.raises(UnexpectedRollbackError, match=IN_THE_MIDDLE):  # noqa: PT012  # its end raises
            async with transfer.db(commit_on_exit=True, **options):
                await add(transfer.db, "before")
                await transfer.start()
        assert isinstance(await transfer.end(), UnitClosedError | UnexpectedRollbackError)
    assert await sqlite_worker.notes() == []


async def test_response_is_refused_after_the_deadline(sqlite_worker: Site, sqlite_url: str) -> None:
    """A response whose COMMIT would cut a block in two is an error, and the block writes nothing."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    async with engine_with_tables(sqlite_url, pool_timeout=SHORT) as engine:
        sqlite_worker.app.add_middleware(middleware, custom_engine=engine, commit_on_exit=True)
        transfer = Transfer(db)

        @sqlite_worker.app.get("/")
        async def route() -> None:
            await transfer.start()

        with pytest.raises(UnexpectedRollbackError, match=IN_THE_MIDDLE):
            await sqlite_worker.get()
        assert isinstance(await transfer.end(), UnitClosedError | UnexpectedRollbackError)
    assert await sqlite_worker.notes() == []


# An explicit COMMIT is refused.


@pytest.mark.parametrize("by", ["unit", "session", "begin"])
async def test_explicit_commit_is_refused(stage: Stage, propagation: Propagation | None, by: str) -> None:
    """A commit that is asked for by name in the middle of another task's block is refused at once."""
    transfer = Transfer(stage.db, propagation)

    async def act(unit: Unit) -> None:
        async with unit.session.begin() if by == "begin" else nullcontext():
            await add(stage.db, "before")
            await transfer.start()
            if by != "begin":
                with pytest.raises(UnexpectedRollbackError, match=IN_THE_MIDDLE):
                    await (unit if by == "unit" else unit.session).commit()
                assert await transfer.end() is None
                await unit.commit()

    if by == "begin":
        with pytest.raises(UnexpectedRollbackError, match=IN_THE_MIDDLE):
            await stage.inside(act)
        assert await transfer.end() is not None
        assert await stage.site.notes() == []
    else:
        await stage.inside(act)
        assert await stage.site.notes() == ["before", "credit", "debit"]


async def test_own_commit_in_the_block(stage: Stage) -> None:
    """A block whose own task commits in its middle has asked for that, and goes on."""
    db = stage.db

    async def work() -> None:
        async with db(propagation="required") as joined:
            await add(db, "first")
            await joined.commit()
            assert await stage.site.notes() == ["first"]
            await add(db, "second")

    async def act(unit: Unit) -> None:
        await asyncio.create_task(work())

    await stage.inside(act)
    assert await stage.site.notes() == ["first", "second"]


# After a rollback the second half is not stored.


@pytest.mark.parametrize("by", ["unit", "session"])
async def test_rollback_by_another_task(stage: Stage, propagation: Propagation | None, by: str) -> None:
    """A rollback in the middle of a block makes the block's end raise, and the unit's COMMIT too."""
    transfer = Transfer(stage.db, propagation)

    async def act(unit: Unit) -> None:
        await transfer.start()
        await (unit if by == "unit" else unit.session).rollback()
        # SQLAlchemy refuses the second half of a savepoint that was rolled back
        refused = InvalidRequestError if propagation == "nested" else UnexpectedRollbackError
        assert isinstance(await transfer.end(), refused)

    if propagation == "nested":
        await suppressed(stage.inside(act))
    else:
        with pytest.raises(UnexpectedRollbackError):
            await stage.inside(act)
    assert await stage.site.notes() == []


async def suppressed(work: Awaitable[None]) -> None:
    """Await work that may be refused."""
    with suppress(UnexpectedRollbackError):
        await work


@pytest.mark.parametrize("early", [True, False])
async def test_block_after_a_401(
    make_site: MakeSite, sqlite_url: str, propagation: Propagation | None, *, early: bool
) -> None:
    """What a block writes after its request was rolled back is not stored, whenever it ends."""
    site = await make_site(sqlite_url, commit_on_exit=True)
    transfer = Transfer(site.db, propagation)
    outcomes = list[BaseException | None]()

    async def tail() -> None:
        if early:
            outcomes.append(await transfer.end())

    @site.app.get("/")
    async def route(background: BackgroundTasks, response: Response) -> None:
        await transfer.start()
        background.add_task(tail)
        response.status_code = 401

    async with site.client(raise_app_exceptions=False) as client:
        await client.get("/")
    if not early:
        outcomes.append(await transfer.end())
    (outcome,) = outcomes
    if not (propagation == "nested" and early):  # a savepoint is held until it ends, and rolled back then
        assert isinstance(outcome, UnexpectedRollbackError | UnitClosedError)
    assert await site.notes() == []


async def test_error_in_the_unit(stage: Stage, propagation: Propagation | None) -> None:
    """An error that ends the unit does not wait for a block of another task, whose end raises."""
    transfer = Transfer(stage.db, propagation)

    async def act(unit: Unit) -> None:
        await transfer.start()
        raise BoomError

    with pytest.raises(BoomError):
        await stage.inside(act)
    assert isinstance(await transfer.end(), UnexpectedRollbackError | UnitClosedError)
    assert await stage.site.notes() == []


# Blocks of the request's own.


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "BaseHTTP inside"])
@pytest.mark.parametrize("status", [200, 401])
async def test_block_of_a_dependency(
    make_site: MakeSite, sqlite_url: str, propagation: Propagation | None, *, inside: bool, status: int
) -> None:
    """A block that a dependency holds open around the response is settled when it ends."""
    middlewares = [Middleware(BaseHTTPMiddleware, dispatch=pass_on)] if inside else []
    site = await make_site(sqlite_url, commit_on_exit=True, inside=middlewares)

    async def held() -> AsyncGenerator[None]:
        async with site.db(propagation=propagation or "required"):
            await add(site.db, "debit")
            yield
            await add(site.db, "credit")

    @site.app.get("/", dependencies=[Depends(held)])
    async def route(response: Response) -> None:
        response.status_code = status

    async with asyncio.timeout(10):
        assert (await site.get()).status_code == status
    assert await site.notes() == (["credit", "debit"] if status == 200 else [])


# Children of every kind.


async def test_task_of_a_task_group(stage: Stage) -> None:
    """A block in a plain TaskGroup, which ends before the unit, is committed with it."""
    transfer = Transfer(stage.db)
    transfer.resume.set()

    async def act(unit: Unit) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(transfer.run())
        assert await stage.site.notes() == []

    await stage.inside(act)
    assert await stage.site.notes() == ["credit", "debit"]


@pytest.mark.parametrize("by", ["gather", "task_group"])
async def test_task_that_a_child_leaves(stage: Stage, by: str) -> None:
    """The unit of a child waits for a task that the child leaves behind."""
    transfer = Transfer(stage.db)

    async def work() -> None:
        await transfer.start()
        asyncio.get_running_loop().call_soon(transfer.resume.set)

    async def act(unit: Unit) -> None:
        if by == "gather":
            await stage.db.gather(work())
        else:
            async with stage.db.task_group() as group:
                group.create_task(work())

    await stage.inside(act)
    assert await transfer.end() is None
    assert await stage.site.notes() == ["credit", "debit"]


async def test_generator_that_its_task_leaves(stage: Stage) -> None:
    """A block whose task has ended without leaving it adds nothing more, and is not waited for."""
    generators = list[AsyncGenerator[None]]()

    async def rows() -> AsyncGenerator[None]:
        async with stage.db(propagation="required"):
            await add(stage.db, "debit")
            yield

    async def work() -> None:
        generators.append(rows())
        await anext(generators[0])

    async def act(unit: Unit) -> None:
        await asyncio.create_task(work(), name="transfer")

    async with asyncio.timeout(10):
        await stage.inside(act)
    await suppressed(generators[0].aclose())
    assert await stage.site.notes() == ["debit"]
