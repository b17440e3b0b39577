"""Loaded values after a ROLLBACK that the package decides: readable, as loaded, never written by accident."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from fastapi import BackgroundTasks, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy import delete, insert, inspect, select, text, update
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.background import BackgroundTask
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_async_sqlalchemy import SessionProxy
from tests.support.databases import Judge, JudgeFor
from tests.support.owners import LOADED, Owner, Pet, load, open_owners, values
from tests.support.requests import DomainError
from tests.support.site import Site
from tests.support.stage import BoomError

Db = SessionProxy[AsyncSession]
Change = Callable[[AsyncSession, "Owner"], Awaitable[object]]


@pytest.fixture
async def owners(deferring_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """An application and its owner, on PostgreSQL and SQLite."""
    async with open_owners(deferring_url, judge_for) as site:
        yield site


async def stored(judge: Judge) -> list[tuple[object, ...]]:
    """Return what the database has."""
    return await judge.rows(
        "SELECT mail, attempts, version, stamp, (SELECT count(*) FROM pet) FROM owner ORDER BY id"
    )


UNCHANGED = [("mail", 0, 1, "made", 2)]

CHANGES: dict[str, Change] = {}


def a_change(change: Change) -> Change:
    """Note a change."""
    CHANGES[change.__name__] = change
    return change


@a_change
async def nothing_of_it(session: AsyncSession, owner: Owner) -> None:
    """Write by SQL, which the session does not see."""
    await session.execute(text("UPDATE owner SET attempts = 5"))


@a_change
async def unflushed(session: AsyncSession, owner: Owner) -> None:
    """Change attributes only."""
    owner.mail, owner.attempts = "other", 5


@a_change
async def flushed(session: AsyncSession, owner: Owner) -> None:
    """Change attributes, and flush twice."""
    owner.mail = "other"
    await session.flush()
    owner.attempts, owner.mail = 5, "third"
    await session.flush()


@a_change
async def evaluated(session: AsyncSession, owner: Owner) -> None:
    """Update by the ORM, which changes the object in memory."""
    await session.execute(update(Owner).values(attempts=Owner.attempts + 1))


@a_change
async def fetched(session: AsyncSession, owner: Owner) -> None:
    """Update by the ORM, which asks the database what it changed."""
    change = update(Owner).values(attempts=Owner.attempts + 1)
    await session.execute(change, execution_options={"synchronize_session": "fetch"})


@a_change
async def returned(session: AsyncSession, owner: Owner) -> None:
    """Update by the ORM, and ask for the new value."""
    change = update(Owner).values(attempts=Owner.attempts + 1).returning(Owner.attempts)
    assert await session.scalar(change) == 1


@a_change
async def returned_in_sync(session: AsyncSession, owner: Owner) -> None:
    """Do so by the synchronous session."""
    change = update(Owner).values(attempts=Owner.attempts + 1).returning(Owner.attempts)
    assert await session.run_sync(lambda sync: sync.scalars(change).one()) == 1


@a_change
async def in_savepoints(session: AsyncSession, owner: Owner) -> None:
    """Change in a savepoint that is released, and in one that is rolled back."""
    async with session.begin_nested():
        owner.mail = "other"
    with suppress(BoomError):
        async with session.begin_nested():
            owner.attempts = 5
            await session.flush()
            raise BoomError


@a_change
async def expired_by_hand(session: AsyncSession, owner: Owner) -> None:
    """Refresh after a flush."""
    owner.attempts = 5
    await session.flush()
    await session.refresh(owner, ["attempts"])


@a_change
async def deleted(session: AsyncSession, owner: Owner) -> None:
    """Delete the object, and its pets with it."""
    await session.delete(owner)
    await session.flush()


@a_change
async def deleted_by_statement(session: AsyncSession, owner: Owner) -> None:
    """Delete the rows by the ORM's statements."""
    await session.execute(delete(Pet))
    await session.execute(delete(Owner))


@a_change
async def orphaned(session: AsyncSession, owner: Owner) -> None:
    """Remove a pet, which is deleted then, and add another one."""
    owner.pets.pop()
    owner.pets.append(Pet(name="new"))
    await session.flush()


@a_change
async def written_only(session: AsyncSession, owner: Owner) -> None:
    """Add by a relationship that never loads."""
    owner.later.add(Pet(name="new"))
    await session.flush()


each_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


@each_change
async def test_tail_of_a_rolled_back_request(owners: Site, change: Change) -> None:
    """After a 401 the background task reads what was loaded, commits none of the changes, and can write."""
    seen = list[object]()

    async def tail(owner: Owner, session: AsyncSession) -> None:
        seen.append(values(owner))
        assert not session.dirty
        await session.commit()
        seen.append(await stored(owners.judge))
        owner.attempts = 5
        owner.mail = "other"
        await session.commit()
        seen.append(await stored(owners.judge))

    @owners.app.get("/")
    async def route() -> Response:
        owner = await load(owners.db.session)
        await change(owners.db.session, owner)
        return Response(status_code=401, background=BackgroundTask(tail, owner, owners.db.session))

    await owners.get()
    assert seen[0] == LOADED
    assert seen[1] == UNCHANGED
    assert seen[2] == [("other", 5, 2, "changed", 2)]


@each_change
async def test_after_a_block(owners: Site, change: Change) -> None:
    """After a block that an error has left, its objects have their loaded values."""
    loaded = list[Owner]()
    with suppress(BoomError):
        async with owners.db(commit_on_exit=True) as unit:
            loaded.append(await load(unit.session))
            await change(unit.session, loaded[0])
            raise BoomError
    assert values(loaded[0]) == LOADED
    assert await stored(owners.judge) == UNCHANGED


class Log:
    """A middleware outside that reads the owner when the response has been sent."""

    def __init__(self, app: ASGIApp, seen: list[object]) -> None:
        self.app = app
        self.seen = seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and read."""
        try:
            await self.app(scope, receive, send)
        finally:
            if scope["type"] == "http":
                self.seen.append(values(scope["state"]["owner"]))


@pytest.mark.parametrize("ending", ["returned", "raised", "handled", "unhandled", "discarded", "given up"])
async def test_middleware_outside(owners: Site, ending: str) -> None:
    """However a request is rolled back, a middleware outside and background tasks read its objects."""
    seen = list[object]()
    owners.app.add_middleware(Log, seen=seen)

    async def read(owner: Owner) -> None:
        seen.append(values(owner))

    @owners.app.exception_handler(DomainError)
    async def answer(request: Request, error: Exception) -> Response:
        return JSONResponse("answer", background=BackgroundTask(read, request.state.owner))

    @owners.app.get("/")
    async def route(request: Request, background: BackgroundTasks, response: Response) -> None:
        owner = request.state.owner = await load(owners.db.session)
        await evaluated(owners.db.session, owner)
        if ending == "raised":
            raise HTTPException(404)
        if ending == "handled":
            raise DomainError
        if ending == "unhandled":
            raise LookupError
        if ending == "given up":
            owners.db.unit.set_rollback_only()
        else:
            response.status_code = 500 if ending == "returned" else 200
            background.add_task(read, owner)
            if ending == "discarded":
                await owners.db.session.rollback()
                await load(owners.db.session)
                await owners.db.session.refresh(owner)
                await flushed(owners.db.session, owner)
                owners.db.unit.set_rollback_only()

    async with owners.client(raise_app_exceptions=False) as client:
        await client.get("/")
    assert seen
    if ending != "discarded":
        assert all(one == LOADED for one in seen)
    assert await stored(owners.judge) == UNCHANGED


async def test_rollback_that_fails(owners: Site) -> None:
    """Where the connection is lost, and with it the transaction, the objects are readable all the same."""
    if owners.engine.dialect.name != "postgresql":
        return

    async with owners.db() as unit:
        owner = await load(unit.session)
        owner.mail = "other"
        await unit.session.flush()
        backend = await unit.session.scalar(text("SELECT pg_backend_pid()"))
        await owners.judge.execute(f"SELECT pg_terminate_backend({backend}, 10000)")
    assert values(owner) == LOADED
    assert await stored(owners.judge) == UNCHANGED


async def test_added_objects(owners: Site) -> None:
    """What was added is transient after the rollback and not written later; the rest is readable."""
    seen = list[object]()

    async def tail(pet: Pet, cat: Pet, session: AsyncSession) -> None:
        seen.extend([inspect(pet).transient, pet.name, cat.name, list(session.new)])
        await session.commit()

    @owners.app.get("/")
    async def route() -> Response:
        session = owners.db.session
        cat = await session.get_one(Pet, 1)
        pet = Pet(name="new", owner=await session.get_one(Owner, 1))
        session.add(pet)
        await session.flush()
        return Response(status_code=409, background=BackgroundTask(tail, pet, cat, session))

    await owners.get()
    assert seen == [True, "new", "cat", []]
    assert await stored(owners.judge) == UNCHANGED


async def test_collection_with_an_added_object(owners: Site) -> None:
    """A collection that was loaded with what was added is expired; expired attributes stay so."""
    async with owners.db() as unit:
        pet = Pet(name="new", owner_id=1)
        unit.session.add(pet)
        await unit.session.flush()
        owner = await load(unit.session)
        cat = await unit.session.get_one(Pet, 1)
        unit.session.expire(cat, ["name"])
        await unit.session.execute(text("UPDATE owner SET attempts = 5"))
        unit.set_rollback_only()
        owner_state, cat_state = inspect(owner), inspect(cat)
    assert "pets" in owner_state.unloaded
    assert inspect(pet).transient
    assert owner.mail == "mail"
    assert "name" in cat_state.unloaded
    assert cat_state.dict["owner_id"] == 1


async def test_own_rollback_is_sqlalchemys(owners: Site) -> None:
    """A rollback that user code asks for expires all, as SQLAlchemy has it."""
    async with owners.db() as unit:
        owner = await load(unit.session)
        await unit.session.rollback()
        assert {"mail", "pets"} <= inspect(owner).unloaded


@pytest.mark.slow
async def test_cost_is_linear(sqlite_url: str, judge_for: JudgeFor) -> None:
    """A rollback of four times as many objects takes about four times as long."""
    async with open_owners(sqlite_url, judge_for) as site:

        async def seconds(count: int) -> float:
            async with site.db() as unit:
                session = unit.session
                await session.execute(text("DELETE FROM pet"))
                rows: list[dict[str, Any]] = [{"name": str(at)} for at in range(count)]
                await session.execute(insert(Pet), rows)
                pets = (await session.scalars(select(Pet))).all()
                pets[0].name = "changed"
                await session.flush()
                unit.set_rollback_only()
                started = time.process_time()
            assert pets[1].name == "1"
            return time.process_time() - started

        await seconds(100)
        few = min([await seconds(1000) for _ in range(3)])
        many = min([await seconds(8000) for _ in range(3)])
        assert many < few * 8 * 2.5
