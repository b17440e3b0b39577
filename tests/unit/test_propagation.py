"""Propagation: what a block does about the unit that is open where it stands, and who commits."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from attrs import define
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_async_sqlalchemy import (
    ConfigurationError,
    MissingSessionError,
    Propagation,
    PropagationError,
    SessionProxy,
    UnexpectedRollbackError,
    UnitClosedError,
    UnitOfWork,
)
from tests.support.databases import JudgeFor
from tests.support.site import MakeSite, Site, complaints
from tests.support.tables import Note
from tests.support.worker import open_worker

Db = SessionProxy[AsyncSession]
Unit = UnitOfWork[AsyncSession]
Act = Callable[[Unit], Awaitable[object]]

JOINING: tuple[Propagation, ...] = ("required", "nested", "mandatory")
OPENING: tuple[Propagation, ...] = ("requires_new", "required", "nested", "never")
ALL: tuple[Propagation, ...] = ("requires_new", "required", "nested", "mandatory", "never")
NONE_OPEN = r"propagation='mandatory' joins a unit of work, and none is open here: open one around the call"
ONE_OPEN = r"propagation='never' must not run inside a unit of work, and one is open here: .*'requires_new'"
DOOMED = r"cannot be committed, because a block that had joined it failed: .*rollback\(\)"
GIVEN_UP = r"cannot be committed, because set_rollback_only\(\) was called"
ENDED = r"has ended and serves one use only"


class BoomError(Exception):
    """The error of a test's own."""


class BoomExit(BaseException):
    """What ends a program: no Exception."""


@define(eq=False)
class Stage:
    """Where a test's act is played: in a worker, or in a request of an application.

    Both commit what the act leaves behind when it ends well, and let its errors through.
    """

    site: Site
    in_request: bool

    @property
    def db(self) -> Db:
        """The pair's proxy."""
        return self.site.db

    async def inside(self, act: Act) -> None:
        """Play an act in a unit of work."""
        if not self.in_request:
            async with self.db(commit_on_exit=True) as unit:
                await act(unit)
            return

        @self.site.app.get("/inside")
        async def route() -> None:
            await act(self.db.unit)

        await self.site.get("/inside")

    async def outside(self, act: Callable[[], Awaitable[object]]) -> None:
        """Play an act where no unit of work is open."""
        if not self.in_request:
            await act()
            return

        @self.site.app.get("/outside")
        async def route() -> None:
            await act()

        await self.site.get("/outside")


@pytest.fixture(params=["worker", "request"])
async def stage(
    request: pytest.FixtureRequest, database_url: str, judge_for: JudgeFor, make_site: MakeSite
) -> AsyncIterator[Stage]:
    """A worker and a request in turn, on each of the three databases."""
    if request.param == "request":
        site = await make_site(database_url, commit_on_exit=True, exclude_paths=["/outside"])
        yield Stage(site, in_request=True)
        return
    async with open_worker(database_url, judge_for) as worker:
        yield Stage(worker, in_request=False)


async def add(db: Db, note: str) -> None:
    """Write a note in the current unit."""
    db.session.add(Note(text=note))
    await db.session.flush()


async def block(
    db: Db, propagation: Propagation, note: str | None = None, *, end: BaseException | None = None
) -> None:
    """Write a note, or nothing, in a block that ends by this error or well."""
    async with db(commit_on_exit=True, propagation=propagation):
        if note is not None:
            await add(db, note)
        if end is not None:
            raise end


async def fail_inside(
    db: Db, propagation: Propagation = "required", note: str | None = "joined"
) -> BoomError:
    """Swallow the error of a block that has joined the unit, and return it."""
    error = BoomError("boom")
    with suppress(BoomError):
        await block(db, propagation, note, end=error)
    return error


# Inside a unit.


@pytest.mark.parametrize("propagation", JOINING)
async def test_joins_the_unit(stage: Stage, propagation: Propagation) -> None:
    """A joining block has the very unit and session of its owner, who alone commits them."""
    db = stage.db

    async def act(unit: Unit) -> None:
        await add(db, "before")
        session = unit.session
        async with db(commit_on_exit=True, propagation=propagation) as joined:
            assert joined is unit is db.unit
            assert joined.session is session is db.session
            await add(db, "inside")
            assert stage.site.checked_out() == 1
        assert db.unit is unit
        assert not unit.closed
        assert db.session is session
        assert session.in_transaction()
        assert await stage.site.notes() == []
        await add(db, "then")

    await stage.inside(act)
    assert await stage.site.notes() == ["before", "inside", "then"]


@pytest.mark.parametrize("propagation", JOINING)
async def test_joins_a_unit_without_a_session(stage: Stage, propagation: Propagation) -> None:
    """A unit that has not been used yet is joined like any other; its owner commits what the block wrote."""

    async def act(unit: Unit) -> None:
        assert unit.opened is None
        await block(stage.db, propagation, "inside")
        assert await stage.site.notes() == []

    await stage.inside(act)
    assert await stage.site.notes() == ["inside"]


@pytest.mark.parametrize("propagation", JOINING)
async def test_joined_blocks_go_with_their_owner(
    worker: Site, propagation: Propagation, caplog: pytest.LogCaptureFixture
) -> None:
    """What a joined block wrote is discarded, and told, where its owner commits nothing."""
    async with worker.db():
        await block(worker.db, propagation, "inside")
    assert await worker.notes() == []
    (complaint,) = complaints(caplog)
    assert "1 statements and 0 unflushed objects are rolled back" in complaint


@pytest.mark.parametrize("end", [None, BoomError("boom")], ids=repr)
async def test_requires_new_is_independent(stage: Stage, end: BoomError | None) -> None:
    """A block of its own has its own unit, session, connection and outcome, whatever the outer one's is."""
    db = stage.db

    async def act(unit: Unit) -> None:
        await unit.session.scalar(select(1))
        units: list[Unit] = []
        with suppress(BoomError):
            async with db(commit_on_exit=True, propagation="requires_new") as inner:
                units.append(inner)
                assert db.unit is inner is not unit
                assert db.session is inner.session is not unit.session
                await add(db, "inner")
                assert stage.site.checked_out() == 2
                if end is not None:
                    raise end
        assert units[0].closed
        assert db.unit is unit
        assert await stage.site.notes() == ([] if end else ["inner"])
        await add(db, "outer")

    await stage.inside(act)
    assert await stage.site.notes() == (["outer"] if end else ["inner", "outer"])


async def test_never_refuses_a_unit(stage: Stage) -> None:
    """Inside a unit `never` raises before its block begins; the unit goes on and commits."""
    db = stage.db

    async def act(unit: Unit) -> None:
        await add(db, "outer")
        with pytest.raises(PropagationError, match=ONE_OPEN):
            await block(db, "never", "inner")
        assert db.unit is unit

    await stage.inside(act)
    assert await stage.site.notes() == ["outer"]


# Outside a unit.


@pytest.mark.parametrize("propagation", OPENING)
async def test_opens_a_unit(stage: Stage, propagation: Propagation) -> None:
    """Where none is open a block opens a unit, commits it by itself, and leaves none behind."""
    db = stage.db

    async def act() -> None:
        async with db(commit_on_exit=True, propagation=propagation) as unit:
            assert db.unit is unit
            await add(db, "written")
        assert unit.closed
        assert await stage.site.notes() == ["written"]
        with pytest.raises(MissingSessionError, match=r"`async with db\(\):`"):
            _ = db.unit

    await stage.outside(act)
    assert await stage.site.notes() == ["written"]


@pytest.mark.parametrize("propagation", OPENING)
async def test_opened_unit_rolls_back(worker: Site, propagation: Propagation) -> None:
    """An error that leaves a block which opened its unit rolls that back and goes on."""
    error = BoomError("boom")
    with pytest.raises(BoomError, match=r"^boom$") as raised:
        await block(worker.db, propagation, "gone", end=error)
    assert raised.value is error
    assert worker.checked_out() == 0
    assert await worker.notes() == []


async def test_mandatory_refuses_without_a_unit(stage: Stage) -> None:
    """Where none is open `mandatory` raises before its block begins."""

    async def act() -> None:
        with pytest.raises(PropagationError, match=NONE_OPEN):
            await block(stage.db, "mandatory", "inner")

    await stage.outside(act)
    assert await stage.site.notes() == []


# After a unit.


async def outlive(stage: Stage, act: Callable[[], Awaitable[None]]) -> None:
    """Play an act in a task that was started in a unit, after the unit's end."""
    ended = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def late() -> None:
        await ended.wait()
        await act()

    async def start(unit: Unit) -> None:
        await add(stage.db, "before")
        tasks.append(asyncio.create_task(late()))

    await stage.inside(start)
    ended.set()
    await tasks[0]


@pytest.mark.parametrize("propagation", OPENING)
async def test_closed_unit_is_none(stage: Stage, propagation: Propagation) -> None:
    """A task that outlived its unit opens one of its own: one that has ended cannot be joined."""
    await outlive(stage, lambda: block(stage.db, propagation, "late"))
    assert await stage.site.notes() == ["before", "late"]
    assert stage.site.checked_out() == 0


async def test_closed_unit_is_no_unit_to_mandatory(stage: Stage) -> None:
    """A task that outlived its unit has nothing left to join."""

    async def late() -> None:
        with pytest.raises(PropagationError, match=NONE_OPEN):
            await block(stage.db, "mandatory", "late")

    await outlive(stage, late)
    assert await stage.site.notes() == ["before"]


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


# Settings that do not go together.

Options = dict[str, Any]
CONFLICTS: dict[str, tuple[Options, Options, str]] = {
    "read_only in a unit that writes": ({}, {"read_only": True}, r"read_only=True .*read_only=False"),
    "writing in a read_only unit": ({"read_only": True}, {"read_only": False}, r"read_only=False .*=True"),
    "isolation_level in a plain unit": (
        {},
        {"isolation_level": "SERIALIZABLE"},
        r"isolation_level='SERIALIZABLE' .*isolation_level=None",
    ),
    "session_args": ({}, {"session_args": {"autoflush": False}}, "session_args"),
    "the same session_args": (
        {"session_args": {"autoflush": False}},
        {"session_args": {"autoflush": False}},
        "session_args",
    ),
}
POSTGRESQL_CONFLICTS: dict[str, tuple[Options, Options, str]] = {
    "another isolation_level": (
        {"isolation_level": "SERIALIZABLE"},
        {"isolation_level": "READ COMMITTED"},
        r"isolation_level='READ COMMITTED' .*isolation_level='SERIALIZABLE'",
    ),
    "deferrable in a plain unit": ({}, {"deferrable": True}, r"deferrable=True .*deferrable=False"),
    "deferrable twice otherwise": (
        {"isolation_level": "SERIALIZABLE", "read_only": True, "deferrable": True},
        {"deferrable": False},
        r"deferrable=False .*deferrable=True",
    ),
}


async def refuse(db: Db, outer: Options, inner: Options, match: str, propagation: Propagation) -> None:
    """Open a unit in which a block with other settings is refused and nothing else is harmed."""
    async with db(commit_on_exit=True, **outer) as unit:
        with pytest.raises(PropagationError, match=f"{match}.*: leave that out, or use .*'requires_new'"):
            await db(propagation=propagation, **inner).__aenter__()
        assert db.unit is unit
        await unit.session.scalar(select(1))


@pytest.mark.parametrize("propagation", JOINING)
@pytest.mark.parametrize(("outer", "inner", "match"), CONFLICTS.values(), ids=CONFLICTS)
async def test_conflict_is_refused(
    sqlite_worker: Site, outer: Options, inner: Options, match: str, propagation: Propagation
) -> None:
    """A block that asks for other settings than its unit has is refused on entry, by the setting's name."""
    await refuse(sqlite_worker.db, outer, inner, match, propagation)


@pytest.mark.parametrize("propagation", JOINING)
@pytest.mark.parametrize(("outer", "inner", "match"), POSTGRESQL_CONFLICTS.values(), ids=POSTGRESQL_CONFLICTS)
async def test_conflict_on_postgresql_is_refused(
    postgresql_worker: Site, outer: Options, inner: Options, match: str, propagation: Propagation
) -> None:
    """PostgreSQL's own settings and levels are compared as the others are."""
    await refuse(postgresql_worker.db, outer, inner, match, propagation)


@pytest.mark.parametrize("options", [{"read_only": True}, {"isolation_level": "SERIALIZABLE"}], ids=repr)
async def test_conflict_in_a_request(make_site: MakeSite, database_url: str, options: Options) -> None:
    """A request's unit has no settings of its own, so that a block which asks for some cannot join it."""
    site = await make_site(database_url, commit_on_exit=True)

    @site.app.get("/")
    async def route() -> str:
        with pytest.raises(PropagationError, match=next(iter(options))):
            await site.db(propagation="required", **options).__aenter__()
        async with site.db(propagation="requires_new", **options) as unit:
            assert await unit.session.scalar(select(1)) == 1
        await add(site.db, "written")
        return "done"

    assert (await site.get()).json() == "done"
    assert await site.notes() == ["written"]


@pytest.mark.parametrize("propagation", JOINING)
@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        ({"read_only": True}, {"read_only": True}),
        ({"read_only": True}, {}),
        ({"isolation_level": "SERIALIZABLE"}, {"isolation_level": "SERIALIZABLE"}),
        ({"isolation_level": "SERIALIZABLE"}, {}),
        ({}, {"read_only": False}),
        ({"session_args": {"autoflush": False}}, {}),
    ],
    ids=repr,
)
async def test_settings_that_agree_join(
    sqlite_worker: Site, outer: Options, inner: Options, propagation: Propagation
) -> None:
    """A block that asks for what its unit has, or for nothing, joins it."""
    async with (
        sqlite_worker.db(**outer) as unit,
        sqlite_worker.db(propagation=propagation, **inner) as joined,
    ):
        assert joined is unit
        assert await joined.session.scalar(select(1)) == 1


# The outer unit is current again.

ENDS = (None, BoomError("boom"), BoomExit("boom"), asyncio.CancelledError("boom"))


@pytest.mark.parametrize("end", ENDS, ids=repr)
@pytest.mark.parametrize("propagation", ["requires_new", *JOINING])
async def test_outer_unit_is_current_again(
    worker: Site, propagation: Propagation, end: BaseException | None
) -> None:
    """However a block ends, the unit around it is current again, open, and can be used."""
    db = worker.db
    async with db(commit_on_exit=True) as unit:
        with suppress(BoomError, BoomExit, asyncio.CancelledError):
            await block(db, propagation, "inner", end=end)
        assert db.unit is unit
        assert not unit.closed
        await unit.rollback()
        await add(db, "outer")
    assert await worker.notes() == (
        ["inner", "outer"] if propagation == "requires_new" and end is None else ["outer"]
    )
    with pytest.raises(MissingSessionError, match=r"`async with db\(\):`"):
        _ = db.unit


@pytest.mark.parametrize("propagation", JOINING)
@pytest.mark.parametrize("by", ["commit", "rollback"])
async def test_joined_block_settles_its_unit_by_hand(worker: Site, propagation: Propagation, by: str) -> None:
    """A joined block that commits or rolls back by hand does so for its owner, who goes on."""
    db = worker.db
    async with db(commit_on_exit=True) as unit:
        await add(db, "before")
        async with db(propagation=propagation) as joined:
            await add(db, "inside")
            await getattr(joined, by)()
            assert worker.checked_out() == 0
        assert db.unit is unit
        await add(db, "then")
    assert await worker.notes() == (["before", "inside", "then"] if by == "commit" else ["then"])


# One use.


@pytest.mark.parametrize("propagation", JOINING)
async def test_joining_scope_entered_twice(stage: Stage, propagation: Propagation) -> None:
    """A block that joined serves one `async with`: a second one raises, inside the first and after it."""
    db = stage.db

    async def act(unit: Unit) -> None:
        scope = db(propagation=propagation)
        async with scope:
            with pytest.raises(UnitClosedError, match=ENDED):
                await scope.__aenter__()
            assert db.unit is unit
        with pytest.raises(UnitClosedError, match=ENDED):
            await scope.__aenter__()
        await add(db, "written")

    await stage.inside(act)
    assert await stage.site.notes() == ["written"]


@pytest.mark.parametrize("propagation", OPENING)
async def test_opening_scope_entered_twice(sqlite_worker: Site, propagation: Propagation) -> None:
    """A block that opened its unit serves one `async with`: a second one raises, inside and after it."""
    scope = sqlite_worker.db(propagation=propagation)
    async with scope as unit:
        with pytest.raises(UnitClosedError, match=ENDED):
            await scope.__aenter__()
        assert sqlite_worker.db.unit is unit
    with pytest.raises(UnitClosedError, match=ENDED):
        await scope.__aenter__()


# What was asked for.


@pytest.mark.parametrize("wrong", ["supports", "", None, True, "REQUIRED"])
async def test_wrong_propagation_is_refused(sqlite_worker: Site, wrong: Any) -> None:
    """A propagation that there is none of is refused where it is given, with those that there are."""
    with pytest.raises(ConfigurationError, match=r"propagation must be one of requires_new, .*, never, not"):
        sqlite_worker.db(propagation=wrong)
    with pytest.raises(ConfigurationError, match=r"propagation must be one of requires_new, .*, never, not"):
        sqlite_worker.db.transactional(propagation=wrong)


async def test_durable(stage: Stage) -> None:
    """`never` with commit_on_exit is durable: when the block has ended, what it wrote is committed."""
    db = stage.db

    async def act() -> None:
        async with db(propagation="never", commit_on_exit=True):
            await add(db, "durable")
        assert await stage.site.notes() == ["durable"]
        raise BoomError

    with pytest.raises(BoomError, match=r"^$"):
        await stage.outside(act)
    assert await stage.site.notes() == ["durable"]


# db.transactional.

Function = Callable[..., Any]


def bare(db: Db, function: Function) -> Function:
    """Decorate by `@db.transactional`."""
    return db.transactional(function)


def called(db: Db, function: Function) -> Function:
    """Decorate by `@db.transactional()`."""
    return db.transactional()(function)


@pytest.mark.parametrize("decorate", [bare, called])
async def test_transactional_commits_when_it_returns(
    stage: Stage, decorate: Callable[[Db, Function], Function]
) -> None:
    """A transactional function runs in a unit, which is committed before its caller has the result."""

    async def write(note: str, *, twice: bool) -> str:
        await add(stage.db, note * 2 if twice else note)
        return note

    write = decorate(stage.db, write)

    async def act() -> None:
        assert await write("a", twice=True) == "a"
        assert await stage.site.notes() == ["aa"]
        assert await write("b", twice=False) == "b"

    await stage.outside(act)
    assert await stage.site.notes() == ["aa", "b"]


async def test_transactional_methods(sqlite_worker: Site) -> None:
    """A method of any kind runs in a unit: the decorator stands below `@classmethod` and `@staticmethod`."""
    db = sqlite_worker.db

    class Notes:
        @db.transactional
        async def write(self, note: str) -> None:
            await add(db, note)

        @classmethod
        @db.transactional
        async def of_class(cls, note: str) -> str:
            await add(db, note)
            return cls.__name__

        @staticmethod
        @db.transactional
        async def static(note: str) -> None:
            await add(db, note)

    await Notes().write("a")
    assert await Notes.of_class("b") == "Notes"
    await Notes.static("c")
    assert await sqlite_worker.notes() == ["a", "b", "c"]
    kinds: list[Any] = [classmethod, staticmethod]
    for kind in kinds:
        with pytest.raises(
            ConfigurationError, match=rf"^transactional is for coroutine .*<{kind.__name__}\("
        ):
            bare(db, kind(add))


@pytest.mark.parametrize("decorate", [bare, called])
async def test_transactional_rolls_back(worker: Site, decorate: Callable[[Db, Function], Function]) -> None:
    """An error that leaves a transactional function rolls back and goes on as it is."""
    error = BoomError("boom")

    async def fail() -> None:
        await add(worker.db, "gone")
        raise error

    with pytest.raises(BoomError, match=r"^boom$") as raised:
        await decorate(worker.db, fail)()
    assert raised.value is error
    assert worker.checked_out() == 0
    assert await worker.notes() == []


@pytest.mark.parametrize("decorate", [bare, called])
async def test_transactional_joins(stage: Stage, decorate: Callable[[Db, Function], Function]) -> None:
    """Inside a unit a transactional function joins it, and leaves the commit to its owner."""
    db = stage.db

    async def write() -> Unit:
        await add(db, "inside")
        return db.unit

    async def act(unit: Unit) -> None:
        assert await decorate(db, write)() is unit
        assert await stage.site.notes() == []

    await stage.inside(act)
    assert await stage.site.notes() == ["inside"]


async def test_transactional_failure_marks_the_unit(stage: Stage) -> None:
    """A transactional function that failed in a unit forbids its commit, whoever swallowed the error."""
    db = stage.db

    @db.transactional
    async def fail() -> None:
        await add(db, "joined")
        raise BoomError

    async def act(unit: Unit) -> None:
        with suppress(BoomError):
            await fail()

    with pytest.raises(UnexpectedRollbackError, match=DOOMED) as raised:
        await stage.inside(act)
    assert isinstance(raised.value.__cause__, BoomError)
    assert await stage.site.notes() == []


@pytest.mark.parametrize("propagation", ALL)
async def test_transactional_by_propagation_inside(worker: Site, propagation: Propagation) -> None:
    """Inside a unit each propagation does for a function what it does for a block."""
    db = worker.db

    @db.transactional(propagation=propagation)
    async def write() -> Unit:
        await add(db, "inside")
        return db.unit

    async with db(commit_on_exit=True) as unit:
        if propagation == "never":
            with pytest.raises(PropagationError, match=ONE_OPEN):
                await write()
        else:
            assert (await write() is unit) is (propagation != "requires_new")
        assert await worker.notes() == (["inside"] if propagation == "requires_new" else [])
        await add(db, "outer")
    assert await worker.notes() == ["inside", "outer"][propagation == "never" :]


@pytest.mark.parametrize("propagation", ["requires_new", "nested"])
async def test_transactional_failure_that_is_undone_alone(worker: Site, propagation: Propagation) -> None:
    """A function in a unit or savepoint of its own fails alone; the unit around it commits."""
    db = worker.db

    @db.transactional(propagation=propagation)
    async def fail() -> None:
        await add(db, "inside")
        raise BoomError

    async with db(commit_on_exit=True):
        with pytest.raises(BoomError, match=r"^$"):
            await fail()
        await add(db, "outer")
    assert await worker.notes() == ["outer"]


@pytest.mark.parametrize("propagation", ALL)
async def test_transactional_by_propagation_outside(worker: Site, propagation: Propagation) -> None:
    """Where no unit is open each propagation but `mandatory` opens one and commits it."""
    db = worker.db

    @db.transactional(propagation=propagation)
    async def write() -> None:
        await add(db, "written")

    if propagation == "mandatory":
        with pytest.raises(PropagationError, match=NONE_OPEN):
            await write()
    else:
        await write()
    assert await worker.notes() == ([] if propagation == "mandatory" else ["written"])


async def test_transactional_is_called_again_and_at_once(postgresql_worker: Site) -> None:
    """A transactional function may be called many times, in turn and at the same time: each has its unit."""
    db = postgresql_worker.db

    @db.transactional
    async def write(number: int) -> Unit:
        await add(db, f"{number}")
        return db.unit

    units = [await write(0), *await asyncio.gather(*map(write, range(1, 4)))]
    assert len(set(units)) == 4
    assert await postgresql_worker.notes() == ["0", "1", "2", "3"]


async def test_transactional_settings(worker: Site) -> None:
    """A function's settings are those of its unit: what it must not join, it does not."""
    db = worker.db

    @db.transactional(read_only=True)
    async def look() -> object:
        return await db.session.scalar(select(Note.text))

    assert await look() is None
    async with db(commit_on_exit=True):
        with pytest.raises(PropagationError, match="read_only=True was asked for"):
            await look()
    async with db(read_only=True):
        assert await look() is None


async def test_transactional_method(worker: Site) -> None:
    """Methods are decorated like functions."""
    db = worker.db

    class Notebook:
        note = "written"

        @db.transactional
        async def write(self, again: str = "") -> str:
            await add(db, self.note + again)
            return self.note

    assert await Notebook().write(" twice") == "written"
    assert await worker.notes() == ["written twice"]


@pytest.mark.parametrize("decorate", [bare, called])
def test_transactional_keeps_the_function_s_face(
    decorate: Callable[[Db, Function], Function], sqlite_worker: Site
) -> None:
    """The decorated function has the name, docstring and signature of the original, and is a coroutine's."""

    async def write(note: str, *, twice: bool = False) -> int:
        """Write a note."""
        return len(note)

    decorated = decorate(sqlite_worker.db, write)
    assert (decorated.__name__, decorated.__qualname__) == ("write", write.__qualname__)
    assert decorated.__doc__ == "Write a note."
    assert decorated.__module__ == __name__
    assert inspect.signature(decorated) == inspect.signature(write)
    assert inspect.iscoroutinefunction(decorated)


def plain() -> None:
    """Do nothing, synchronously."""


async def generator() -> AsyncIterator[int]:
    """Yield once."""
    yield 1


class Acting:
    """An object, not a function."""

    async def __call__(self) -> None:
        """Do nothing."""


@pytest.mark.parametrize(
    "wrong",
    [plain, generator, Acting(), Acting, "required", 3],
    ids=["function", "generator", "object", "class", "string", "number"],
)
@pytest.mark.parametrize("decorate", [bare, called])
def test_transactional_refuses_what_is_no_coroutine_function(
    sqlite_worker: Site, decorate: Callable[[Db, Function], Function], wrong: Any
) -> None:
    """What is no coroutine function is refused where it is decorated, and shown."""
    with pytest.raises(ConfigurationError, match=r"transactional is for coroutine functions .*, not ."):
        decorate(sqlite_worker.db, wrong)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"isolation_level": "AUTOCOMMIT"}, "isolation_level must be one of .*'AUTOCOMMIT'"),
        ({"isolation_level": "serializable"}, "isolation_level must be one of .*'serializable'"),
        ({"read_only": "yes"}, "read_only must be True or False, not 'yes'"),
        ({"deferrable": 1}, "deferrable must be True or False, not 1"),
        ({"retries": -1}, "retries must be a whole number of at least 0, not -1"),
        ({"retries": True}, "retries must be a whole number of at least 0, not True"),
        ({"retries": "3"}, "retries must be a whole number of at least 0, not '3'"),
        ({"retries": 1, "propagation": "nested"}, "retries need a unit of their own: propagation='nested'"),
        ({"retries": 1, "propagation": "mandatory"}, "retries need .*: propagation='mandatory'"),
    ],
    ids=repr,
)
def test_transactional_refuses_wrong_options(sqlite_worker: Site, options: Options, match: str) -> None:
    """A wrong value is refused where the function is decorated, by the parameter's name."""
    with pytest.raises(ConfigurationError, match=match):
        sqlite_worker.db.transactional(**options)
