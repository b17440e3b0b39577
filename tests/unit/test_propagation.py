"""Propagation: what a block does about the unit that is open where it stands, and who commits."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_async_sqlalchemy import (
    ConfigurationError,
    MissingSessionError,
    Propagation,
    PropagationError,
    SessionProxy,
    UnitClosedError,
    UnitOfWork,
)
from tests.support.site import MakeSite, Site, complaints
from tests.support.stage import NONE_OPEN, ONE_OPEN, BoomError, BoomExit, Stage, add, block
from tests.support.tables import Note

Db = SessionProxy[AsyncSession]
Unit = UnitOfWork[AsyncSession]
JOINING: tuple[Propagation, ...] = ("required", "nested", "mandatory")
OPENING: tuple[Propagation, ...] = ("requires_new", "required", "nested", "never")
ENDED = r"has ended and can be used only once"


# Inside a unit.


@pytest.mark.parametrize("again", [False, True])
async def test_block_that_cannot_be_entered(make_site: MakeSite, database_url: str, *, again: bool) -> None:
    """A nested block whose SAVEPOINT fails with the flush before it does not join, and delays no COMMIT."""
    moments = list[str]()

    def note_start(app: ASGIApp) -> ASGIApp:
        async def noting(scope: Scope, receive: Receive, send: Send) -> None:
            async def note(message: Message) -> None:
                if message["type"] == "http.response.start":
                    moments.append(f"{message['status']}")
                await send(message)

            await app(scope, receive, note)

        return noting

    site = await make_site(database_url, outside=[Middleware(note_start)], commit_on_exit=True)

    @site.app.get("/")
    async def write() -> None:
        unit = site.db.unit
        unit.on_commit(lambda: moments.append("committed"))
        await add(site.db, "twice")
        site.db.session.add(Note(text="twice"))
        with suppress(IntegrityError):
            await block(site.db, "nested")
        if again:
            await unit.rollback()
            unit.on_commit(lambda: moments.append("committed"))
            await block(site.db, "nested", "again")

    response = await site.get(raise_app_exceptions=False)
    assert (response.status_code, moments) == ((200, ["committed", "200"]) if again else (500, []))
    assert await site.notes() == (["again"] if again else [])


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
    assert "1 statement and 0 unflushed objects are rolled back" in complaint


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
