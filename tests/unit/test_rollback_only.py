"""A unit whose joined block failed cannot be committed; one that was given up is rolled back in silence."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_async_sqlalchemy import Propagation, SessionProxy, UnexpectedRollbackError, UnitOfWork
from tests.support.site import MakeSite, Site, complaints
from tests.support.stage import DOOMED, BoomError, BoomExit, Stage, add, block
from tests.support.tables import Note

Db = SessionProxy[AsyncSession]
Unit = UnitOfWork[AsyncSession]
Act = Callable[[Unit], Awaitable[object]]
GIVEN_UP = r"cannot be committed, because set_rollback_only\(\) was called"


async def fail_inside(
    db: Db, propagation: Propagation = "required", note: str | None = "joined"
) -> BoomError:
    """Swallow the error of a block that has joined the unit, and return it."""
    error = BoomError("boom")
    with suppress(BoomError):
        await block(db, propagation, note, end=error)
    return error


# A joined block fails, somebody swallows its error, and then somebody commits.


Fail = Callable[[], Awaitable[BoomError]]
Commit = Callable[[Unit, Fail], Awaitable[None]]


async def at_the_end(unit: Unit, fail: Fail) -> None:
    """Leave the commit to the end of the unit, or the start of the response."""
    await fail()


async def by_the_unit(unit: Unit, fail: Fail) -> None:
    """Commit by the unit."""
    await fail()
    await unit.commit()


async def by_the_session(unit: Unit, fail: Fail) -> None:
    """Commit by the session."""
    await fail()
    await unit.session.commit()


async def by_a_begin_block(unit: Unit, fail: Fail) -> None:
    """Commit by a block that commits itself."""
    async with unit.session.begin():
        await fail()


async def by_a_transaction(unit: Unit, fail: Fail) -> None:
    """Commit by the transaction that was begun by hand."""
    transaction = await unit.session.begin()
    await fail()
    await transaction.commit()


COMMITS = (at_the_end, by_the_unit, by_the_session, by_a_begin_block, by_a_transaction)


@pytest.mark.parametrize("commit", COMMITS)
async def test_joined_failure_cannot_be_committed(stage: Stage, commit: Commit) -> None:
    """Whoever commits after a joined block failed gets an error that names its cause; nothing is written."""
    errors: list[BoomError] = []

    async def fail() -> BoomError:
        await stage.db.session.execute(insert(Note).values(text="owner"))
        errors.append(await fail_inside(stage.db, "mandatory"))
        return errors[0]

    with pytest.raises(UnexpectedRollbackError, match=DOOMED) as raised:
        await stage.inside(lambda unit: commit(unit, fail))
    assert raised.value.__cause__ is errors[0]
    assert stage.site.checked_out() == 0
    assert await stage.site.notes() == []


@pytest.mark.parametrize("commit", COMMITS)
async def test_joined_failure_without_a_statement_cannot_be_committed(stage: Stage, commit: Commit) -> None:
    """A unit in which nothing was sent yet is marked too: nobody gets a success for a failed block."""
    errors: list[BoomError] = []

    async def fail() -> BoomError:
        errors.append(await fail_inside(stage.db, note=None))
        return errors[0]

    with pytest.raises(UnexpectedRollbackError, match=DOOMED) as raised:
        await stage.inside(lambda unit: commit(unit, fail))
    assert raised.value.__cause__ is errors[0]
    assert stage.site.checked_out() == 0


@pytest.mark.parametrize("commit", COMMITS)
@pytest.mark.parametrize("note", ["joined", None])
async def test_hooks_of_a_unit_whose_joined_block_failed(
    worker: Site, commit: Commit, note: str | None
) -> None:
    """A commit that a joined failure forbids is a rollback to the hooks, with SQL sent before or without."""
    ran: list[str] = []

    async def work() -> None:
        async with worker.db(commit_on_exit=True) as unit:
            unit.on_commit(lambda: ran.append("committed"))
            unit.on_rollback(lambda: ran.append("rolled back"))
            unit.before_commit(lambda: ran.append("before commit"))
            await commit(unit, lambda: fail_inside(worker.db, note=note))

    with pytest.raises(UnexpectedRollbackError, match=DOOMED):
        await work()
    assert ran == ["rolled back"]


@pytest.mark.parametrize("commit", COMMITS)
async def test_response_after_a_joined_failure(
    make_site: MakeSite, database_url: str, commit: Commit
) -> None:
    """The client of a request whose joined block failed gets an error, whoever was to commit."""
    site = await make_site(database_url, commit_on_exit=True)

    @site.app.get("/")
    async def route() -> str:
        await commit(site.db.unit, lambda: fail_inside(site.db))
        return "done"

    response = await site.get(raise_app_exceptions=False)
    assert response.status_code == 500
    assert "done" not in response.text
    assert await site.notes() == []


async def test_handler_answers_for_a_joined_failure(make_site: MakeSite, database_url: str) -> None:
    """The application's own handler turns the refused commit into its answer."""
    site = await make_site(database_url, commit_on_exit=True)
    app: FastAPI = site.app

    @app.exception_handler(UnexpectedRollbackError)
    async def answer(request: Request, error: UnexpectedRollbackError) -> JSONResponse:
        return JSONResponse(str(error.__cause__), status_code=409)

    @app.get("/")
    async def route() -> str:
        await fail_inside(site.db)
        return "done"

    response = await site.get()
    assert (response.status_code, response.json()) == (409, "boom")
    assert await site.notes() == []


@pytest.mark.parametrize("error", [BoomExit("boom"), asyncio.CancelledError("boom")], ids=repr)
async def test_any_error_marks_the_unit(worker: Site, error: BaseException) -> None:
    """An error that is no Exception forbids the commit like any other."""

    async def work() -> None:
        async with worker.db(commit_on_exit=True):
            with suppress(BoomExit, asyncio.CancelledError):
                await block(worker.db, "required", "joined", end=error)

    with pytest.raises(UnexpectedRollbackError, match=DOOMED) as raised:
        await work()
    assert raised.value.__cause__ is error
    assert await worker.notes() == []


async def test_error_that_is_not_swallowed_stays_itself(stage: Stage) -> None:
    """An error that leaves the joined block and its owner's reaches the caller as it was."""
    with pytest.raises(BoomError, match=r"^boom$"):
        await stage.inside(lambda unit: block(stage.db, "required", "joined", end=BoomError("boom")))
    assert await stage.site.notes() == []


async def test_joined_failure_in_a_joined_block(worker: Site) -> None:
    """A block that swallows the error of another inside it cannot undo the mark by ending well."""

    async def work() -> None:
        async with worker.db(commit_on_exit=True), worker.db(propagation="required"):
            await fail_inside(worker.db)

    with pytest.raises(UnexpectedRollbackError, match=DOOMED):
        await work()
    assert await worker.notes() == []


async def test_independent_unit_is_not_marked(worker: Site) -> None:
    """A failure that had joined an inner unit of its own leaves the outer one alone."""

    async def work() -> None:
        async with worker.db(commit_on_exit=True):
            await fail_inside(worker.db)

    async with worker.db(commit_on_exit=True):
        with pytest.raises(UnexpectedRollbackError, match=DOOMED):
            await work()
        await add(worker.db, "outer")
    assert await worker.notes() == ["outer"]


async def rollback_unit(unit: Unit) -> None:
    """Roll back by the unit."""
    await unit.rollback()


async def rollback_session(unit: Unit) -> None:
    """Roll back by the session."""
    await unit.session.rollback()


@pytest.mark.parametrize("rollback", [rollback_unit, rollback_session])
@pytest.mark.parametrize("note", ["joined", None])
async def test_rollback_lifts_the_mark(stage: Stage, rollback: Act, note: str | None) -> None:
    """After a rollback the unit begins again, and commits what came then and nothing else."""

    async def act(unit: Unit) -> None:
        await fail_inside(stage.db, note=note)
        await rollback(unit)
        await add(stage.db, "again")

    await stage.inside(act)
    assert await stage.site.notes() == ["again"]


async def test_refused_commit_can_be_rolled_back(worker: Site) -> None:
    """A unit goes on after a refused commit once it is rolled back."""
    async with worker.db() as unit:
        await fail_inside(worker.db)
        for _ in range(2):
            with pytest.raises(UnexpectedRollbackError, match=DOOMED):
                await unit.commit()
        await unit.rollback()
        await add(worker.db, "again")
        await unit.commit()
    assert await worker.notes() == ["again"]


# Savepoints.


Around = Callable[[Db], Any]


def by_unit_savepoint(db: Db) -> Any:
    """Return the unit's own savepoint."""
    return db.unit.savepoint()


def by_nested(db: Db) -> Any:
    """Return a nested block."""
    return db(propagation="nested")


SAVEPOINTS = (by_unit_savepoint, by_nested)
NOTES = ("joined", None)


@pytest.mark.parametrize("note", NOTES)
async def test_nested_failure_is_undone_alone(stage: Stage, note: str | None) -> None:
    """An error that leaves a nested block undoes that block; its unit commits the rest."""
    db = stage.db

    async def act(unit: Unit) -> None:
        await add(db, "before")
        await fail_inside(db, "nested", note)
        assert db.unit is unit
        await add(db, "after")

    await stage.inside(act)
    assert await stage.site.notes() == ["after", "before"]


@pytest.mark.parametrize("note", NOTES)
async def test_nested_failure_in_an_unused_unit(stage: Stage, note: str | None) -> None:
    """A nested block that fails before its unit was used leaves nothing behind, and no mark."""
    await stage.inside(lambda unit: fail_inside(stage.db, "nested", note))
    assert await stage.site.notes() == []


@pytest.mark.parametrize("around", SAVEPOINTS)
async def test_savepoint_whose_flush_failed_does_not_end_well(worker: Site, around: Around) -> None:
    """An error of a flush that is swallowed in a savepoint comes again at its end, for its other writes."""
    db = worker.db

    async def fail_and_swallow() -> None:
        async with around(db):
            await add(db, "lost")
            with pytest.raises(IntegrityError, match=r"(?i)unique|duplicate"):
                await add(db, "before")

    async with db(commit_on_exit=True):
        await add(db, "before")
        with pytest.raises(PendingRollbackError, match="due to a previous exception during flush"):
            await fail_and_swallow()
        await add(db, "after")
    assert await worker.notes() == ["after", "before"]


@pytest.mark.parametrize("before", ["before", None])
@pytest.mark.parametrize("note", NOTES)
@pytest.mark.parametrize("around", SAVEPOINTS)
async def test_joined_failure_is_undone_with_its_savepoint(
    worker: Site, around: Around, note: str | None, before: str | None
) -> None:
    """A joined failure inside a savepoint that is rolled back leaves the unit free to commit."""
    db = worker.db
    async with db(commit_on_exit=True):
        if before is not None:
            await add(db, before)
        with suppress(BoomError):
            async with around(db):
                raise await fail_inside(db, note=note)
        await add(db, "kept")
    assert await worker.notes() == ["before", "kept"][before is None :]


@pytest.mark.parametrize("before", ["before", None])
@pytest.mark.parametrize("note", NOTES)
@pytest.mark.parametrize("around", SAVEPOINTS)
async def test_joined_failure_goes_on_with_a_released_savepoint(
    worker: Site, around: Around, note: str | None, before: str | None
) -> None:
    """A joined failure inside a savepoint that is released forbids the unit's commit."""
    db = worker.db

    async def work() -> None:
        async with db(commit_on_exit=True):
            if before is not None:
                await add(db, before)
            async with around(db):
                await fail_inside(db, note=note)
            await add(db, "lost")

    with pytest.raises(UnexpectedRollbackError, match=DOOMED) as raised:
        await work()
    assert isinstance(raised.value.__cause__, BoomError)
    assert await worker.notes() == []


@pytest.mark.parametrize("around", SAVEPOINTS)
async def test_commit_inside_the_savepoint_is_refused(worker: Site, around: Around) -> None:
    """A commit by hand in the savepoint whose joined block failed is refused as outside it."""

    async def work() -> None:
        async with worker.db(commit_on_exit=True) as unit, around(worker.db):
            await fail_inside(worker.db)
            await unit.commit()

    with pytest.raises(UnexpectedRollbackError, match=DOOMED):
        await work()
    assert await worker.notes() == []


@pytest.mark.parametrize("around", SAVEPOINTS)
async def test_joined_failure_in_a_savepoint_of_a_savepoint(worker: Site, around: Around) -> None:
    """Released into an outer savepoint, the mark shares that one's fate."""
    db = worker.db
    async with db(commit_on_exit=True):
        await add(db, "kept")
        with suppress(BoomError):
            async with around(db):
                async with around(db):
                    await fail_inside(db)
                raise BoomError
    assert await worker.notes() == ["kept"]


@pytest.mark.parametrize("around", SAVEPOINTS)
async def test_savepoint_undoes_its_own_mark_alone(worker: Site, around: Around) -> None:
    """A joined failure of before stays, whatever is undone with a savepoint of after."""
    db, errors = worker.db, list[BoomError]()

    async def work() -> None:
        async with db(commit_on_exit=True):
            await add(db, "owner")
            errors.append(await fail_inside(db))
            with suppress(BoomError):
                async with around(db):
                    raise await fail_inside(db, note="in the savepoint")

    with pytest.raises(UnexpectedRollbackError, match=DOOMED) as raised:
        await work()
    assert raised.value.__cause__ is errors[0]
    assert await worker.notes() == []


# set_rollback_only().


@pytest.mark.parametrize("note", ["given up", None])
async def test_set_rollback_only_rolls_back_in_silence(
    stage: Stage, note: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A unit that was given up is rolled back where it would commit by itself, and nobody gets an error."""
    ran: list[str] = []

    async def act(unit: Unit) -> None:
        unit.on_commit(lambda: ran.append("committed"))
        unit.on_rollback(lambda: ran.append("rolled back"))
        unit.before_commit(lambda: ran.append("before commit"))
        if note is not None:
            await add(stage.db, note)
        unit.set_rollback_only()

    await stage.inside(act)
    assert ran == ["rolled back"]
    assert complaints(caplog) == []
    assert stage.site.checked_out() == 0
    assert await stage.site.notes() == []


async def test_commit_after_set_rollback_only(sqlite_worker: Site) -> None:
    """The error says what to leave out, and nothing of savepoints."""
    async with sqlite_worker.db.begin() as unit:
        unit.set_rollback_only()
        with pytest.raises(
            UnexpectedRollbackError, match=r"was called: leave out commit\(\), because"
        ) as raised:
            await unit.commit()
        assert "savepoint" not in str(raised.value)


async def test_set_rollback_only_without_commit_on_exit(
    worker: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """No warning advises to commit what was given up."""
    async with worker.db() as unit:
        await add(worker.db, "given up")
        unit.session.add(Note(text="not flushed"))
        unit.set_rollback_only()
    assert complaints(caplog) == []
    assert await worker.notes() == []


async def test_set_rollback_only_after_reading(stage: Stage) -> None:
    """A unit that only read and was given up is a rollback to its hooks too."""
    ran: list[str] = []

    async def act(unit: Unit) -> None:
        unit.on_commit(lambda: ran.append("committed"))
        unit.on_rollback(lambda: ran.append("rolled back"))
        await unit.session.scalar(select(Note))
        unit.set_rollback_only()

    await stage.inside(act)
    assert ran == ["rolled back"]


async def test_response_of_a_unit_that_was_given_up(make_site: MakeSite, database_url: str) -> None:
    """The response of a request whose unit was given up passes as the route made it."""
    site = await make_site(database_url, commit_on_exit=True)

    @site.app.get("/")
    async def route() -> str:
        await add(site.db, "a dry run")
        site.db.unit.set_rollback_only()
        return "done"

    response = await site.get()
    assert (response.status_code, response.json()) == (200, "done")
    assert await site.notes() == []


@pytest.mark.parametrize("commit", COMMITS[1:])
@pytest.mark.parametrize("note", ["given up", None])
async def test_commit_by_name_of_a_unit_that_was_given_up(
    stage: Stage, commit: Commit, note: str | None
) -> None:
    """A commit that is asked for by name raises instead of rolling back silently."""

    async def act(unit: Unit) -> None:
        async def give_up() -> BoomError:
            if note is not None:
                await add(stage.db, note)
            unit.set_rollback_only()
            return BoomError()

        await commit(unit, give_up)

    with pytest.raises(UnexpectedRollbackError, match=GIVEN_UP) as raised:
        await stage.inside(act)
    assert raised.value.__cause__ is None
    assert await stage.site.notes() == []


@pytest.mark.parametrize("rollback", [rollback_unit, rollback_session])
@pytest.mark.parametrize("note", ["given up", None])
async def test_rollback_lifts_set_rollback_only(worker: Site, rollback: Act, note: str | None) -> None:
    """After a rollback a unit that was given up commits again."""
    async with worker.db(commit_on_exit=True) as unit:
        if note is not None:
            await add(worker.db, note)
        unit.set_rollback_only()
        await rollback(unit)
        await add(worker.db, "again")
    assert await worker.notes() == ["again"]


async def test_joined_block_gives_its_unit_up(worker: Site) -> None:
    """A joined block may give the unit up and end well; the owner's end rolls back in silence."""
    async with worker.db(commit_on_exit=True):
        await add(worker.db, "owner")
        async with worker.db(propagation="mandatory") as joined:
            joined.set_rollback_only()
    assert await worker.notes() == []


@pytest.mark.parametrize("around", SAVEPOINTS)
async def test_set_rollback_only_in_a_savepoint_rolled_back(worker: Site, around: Around) -> None:
    """A savepoint that is rolled back takes the mark along that was set inside it."""
    db = worker.db
    async with db(commit_on_exit=True) as unit:
        await add(db, "kept")
        with suppress(BoomError):
            async with around(db):
                await add(db, "gone")
                unit.set_rollback_only()
                raise BoomError
    assert await worker.notes() == ["kept"]


@pytest.mark.parametrize("around", SAVEPOINTS)
async def test_set_rollback_only_in_a_savepoint_released(worker: Site, around: Around) -> None:
    """What was written in a savepoint that was given up is never committed, even if that ends well."""
    async with worker.db(commit_on_exit=True) as unit, around(worker.db):
        await add(worker.db, "gone")
        unit.set_rollback_only()
    assert "gone" not in await worker.notes()


@pytest.mark.parametrize("around", SAVEPOINTS)
async def test_set_rollback_only_outlasts_a_savepoint(worker: Site, around: Around) -> None:
    """A unit that was given up stays so, whatever is undone with a savepoint of after."""
    db = worker.db
    async with db(commit_on_exit=True) as unit:
        await add(db, "owner")
        unit.set_rollback_only()
        with suppress(BoomError):
            async with around(db):
                raise await fail_inside(db)
    assert await worker.notes() == []


async def test_next_transaction_is_not_given_up(worker: Site) -> None:
    """The mark belongs to one transaction: what follows its rollback in the tail of a unit is free of it."""
    async with worker.db(commit_on_exit=True) as unit:
        await add(worker.db, "first")
        await unit.commit()
        unit.set_rollback_only()
        with pytest.raises(UnexpectedRollbackError, match=GIVEN_UP):
            await unit.commit()
        await unit.rollback()
        await add(worker.db, "second")
    assert await worker.notes() == ["first", "second"]


# In the tail of a request.


async def test_joined_failure_in_the_tail(
    make_site: MakeSite, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A joined failure after the response's start is logged and raised; what came before it stays."""
    site = await make_site(database_url, commit_on_exit=True)

    async def body() -> AsyncIterator[bytes]:
        await add(site.db, "in the tail")
        await fail_inside(site.db)
        yield b"end"

    @site.app.get("/")
    async def route() -> StreamingResponse:
        await add(site.db, "before")
        return StreamingResponse(body())

    with pytest.raises(UnexpectedRollbackError, match=DOOMED):
        await site.get()
    assert [complaint.split(" ", 2)[0] for complaint in complaints(caplog)] == ["ERROR:"]
    assert await site.notes() == ["before"]


async def test_set_rollback_only_in_the_tail(
    make_site: MakeSite, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A tail that was given up is rolled back in silence; what was committed before it stays."""
    site = await make_site(database_url, commit_on_exit=True)

    async def body() -> AsyncIterator[bytes]:
        await add(site.db, "in the tail")
        site.db.unit.set_rollback_only()
        yield b"end"

    @site.app.get("/")
    async def route() -> StreamingResponse:
        await add(site.db, "before")
        return StreamingResponse(body())

    assert (await site.get()).text == "end"
    assert complaints(caplog) == []
    assert await site.notes() == ["before"]


async def test_tail_after_a_unit_that_was_given_up(make_site: MakeSite, database_url: str) -> None:
    """The mark ends with its transaction: what the tail writes after the response's start is committed."""
    site = await make_site(database_url, commit_on_exit=True)

    async def body() -> AsyncIterator[bytes]:
        await add(site.db, "in the tail")
        yield b"end"

    @site.app.get("/")
    async def route() -> StreamingResponse:
        await add(site.db, "given up")
        site.db.unit.set_rollback_only()
        return StreamingResponse(body())

    assert (await site.get()).text == "end"
    assert await site.notes() == ["in the tail"]


async def test_tail_after_a_transaction_that_only_read(make_site: MakeSite, database_url: str) -> None:
    """So it does where nobody asked for a commit: what only read is released, and its mark is, too."""
    site = await make_site(database_url)

    async def body() -> AsyncIterator[str]:
        await add(site.db, "in the tail")
        await site.db.unit.commit()
        yield "written"

    @site.app.get("/")
    async def route() -> StreamingResponse:
        await site.db.session.scalar(select(Note.text))
        await fail_inside(site.db, note=None)
        return StreamingResponse(body())

    assert (await site.get()).text == "written"
    assert await site.notes() == ["in the tail"]
