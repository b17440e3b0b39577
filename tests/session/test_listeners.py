"""Listeners of the user's that fail: after COMMIT nothing is undone, before it everything is."""

from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import pytest
from attrs import define
from sqlalchemy import insert, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from fastapi_async_sqlalchemy import SessionProxy, UnexpectedRollbackError
from tests.support.databases import JudgeFor
from tests.support.hooks import (
    COMMITS,
    Act,
    BoomError,
    Log,
    Unit,
    begin_and_commit,
    begin_block,
    boom,
    commit_session,
    commit_unit,
    die_in_commit,
    leave,
    leave_unflushed,
    listening,
)
from tests.support.site import MakeSite, Site
from tests.support.tables import Note
from tests.support.worker import open_worker


class Mine(Session):
    """A session class of the user's."""


class MyAsyncSession(AsyncSession):
    """A session class of the user's, which brings the synchronous one."""

    sync_session_class = Mine


def boom_at_the_end(_: Session, transaction: SessionTransaction) -> None:
    """Fail, but not where a flush ends."""
    if transaction.parent is None:
        boom()


LATE: dict[str, Callable[..., None]] = {
    "after_commit": boom,
    "after_transaction_end": boom_at_the_end,
}
"""What fails when COMMIT is done, by event."""


def fail_in_sql(session: Session, *_: object) -> None:
    """Send a statement that fails, and swallow that."""
    with suppress(DBAPIError):
        session.connection().exec_driver_sql("SELECT nothing FROM nowhere")


def fail_in_a_savepoint(session: Session, *_: object) -> None:
    """Send a statement that fails, and let a savepoint undo it."""
    with suppress(DBAPIError), session.begin_nested():
        session.connection().exec_driver_sql("SELECT nothing FROM nowhere")


@define
class Place:
    """Where a listener is registered."""

    target: Callable[[Unit], Any]
    early: bool = False
    """Before the pair's session class is made."""
    insert: bool = False


def on_session(_: Unit | None) -> type[Session]:
    """Every session of the process."""
    return Session


def on_the_class(_: Unit | None) -> type[Session]:
    """The sessions of the user's class."""
    return Mine


def on_the_instance(unit: Unit) -> Session:
    """The session of the unit."""
    return unit.session.sync_session


def on_the_watched_class(unit: Unit) -> type[Session]:
    """The class that the session says it is of."""
    return type(unit.session.sync_session)


PLACES = {
    "Session, early": Place(on_session, early=True),
    "Session, early, first": Place(on_session, early=True, insert=True),
    "Session, late": Place(on_session),
    "Session, late, first": Place(on_session, insert=True),
    "class, early": Place(on_the_class, early=True),
    "class, early, first": Place(on_the_class, early=True, insert=True),
    "class, late": Place(on_the_class),
    "class, late, first": Place(on_the_class, insert=True),
    "own class, first": Place(on_the_watched_class, insert=True),
    "instance": Place(on_the_instance),
    "instance, first": Place(on_the_instance, insert=True),
}
each_place = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)


@define
class Stand:
    """Where a unit stands, and the log of its hooks."""

    url: str
    judge_for: JudgeFor
    log: Log


async def play(
    place: Place, stand: Stand, act: Act, name: str, *, listener: Callable[..., None] = boom
) -> None:
    """Act in a unit whose sessions have a listener at a place."""
    early = listening(place.target(None), name, listener, first=place.insert) if place.early else None  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # an early place takes no unit
    if early is not None:
        early.__enter__()
    try:
        async with open_worker(stand.url, stand.judge_for) as worker:
            worker.db.unbind()
            worker.db.bind(worker.engine, session_args={"class_": MyAsyncSession})

            async def work() -> None:
                async with worker.db(commit_on_exit=True) as unit:
                    stand.log.both(unit)
                    if place.early:
                        await act(unit)
                        return
                    with listening(place.target(unit), name, listener, first=place.insert):
                        await act(unit)
                        await unit.commit()

            try:
                await work()
            finally:
                assert worker.checked_out() == 0
                stand.log.extend(str(note) for note in await worker.notes())
    finally:
        if early is not None:
            early.__exit__(None, None, None)


@pytest.fixture
def log() -> Log:
    """An empty log."""
    return Log()


@each_place
@pytest.mark.parametrize("commit", COMMITS)
async def test_after_commit(
    place: Place,
    sqlite_url: str,
    judge_for: JudgeFor,
    log: Log,
    commit: Act,
) -> None:
    """What is committed stays so: its hooks run, the error reaches the caller, and the connection returns."""
    with pytest.raises(BoomError, match="boom"):
        await play(place, Stand(sqlite_url, judge_for, log), commit, "after_commit")
    assert log == ["committed", "a"]


@each_place
@pytest.mark.parametrize("name", LATE)
async def test_after_commit_on_each_database(
    place: Place, database_url: str, judge_for: JudgeFor, log: Log, name: str
) -> None:
    """So it is on each database, and with the event that follows."""
    with pytest.raises(BoomError, match="boom"):
        await play(place, Stand(database_url, judge_for, log), leave, name, listener=LATE[name])
    assert log == ["committed", "a"]


@each_place
@pytest.mark.parametrize("name", ["before_commit", "before_flush", "after_flush", "after_flush_postexec"])
async def test_before_commit(place: Place, sqlite_url: str, judge_for: JudgeFor, log: Log, name: str) -> None:
    """What fails before COMMIT is a rollback, to the database and to the hooks."""
    with pytest.raises(BoomError, match="boom"):
        await play(place, Stand(sqlite_url, judge_for, log), leave_unflushed, name)
    assert log == ["rolled back"]


@each_place
@pytest.mark.parametrize("name", ["before_commit", "after_flush", "after_flush_postexec"])
async def test_swallowed_by_a_listener(
    place: Place, postgresql_url: str, judge_for: JudgeFor, log: Log, name: str
) -> None:
    """A statement's error that a listener swallows in the midst of commit() is no silent ROLLBACK either."""
    stand, act = Stand(postgresql_url, judge_for, log), leave if name == "before_commit" else leave_unflushed
    with pytest.raises(UnexpectedRollbackError, match="a statement in it failed"):
        await play(place, stand, act, name, listener=fail_in_sql)
    assert log == ["rolled back"]


@pytest.mark.parametrize("name", ["before_commit", "after_flush_postexec"])
@pytest.mark.parametrize("listener", [fail_in_sql, fail_in_a_savepoint])
async def test_swallowed_where_the_transaction_goes_on(
    database_url: str, judge_for: JudgeFor, log: Log, name: str, listener: Callable[..., None]
) -> None:
    """What a savepoint has undone, or the database forgives, stops no COMMIT."""
    if listener is fail_in_sql and database_url.startswith("postgresql"):
        return
    place = PLACES["instance"]
    heard: list[str] = []

    def once(session: Session, *given: object) -> None:
        if not heard:
            heard.append(name)
            listener(session, *given)

    await play(place, Stand(database_url, judge_for, log), leave_unflushed, name, listener=once)
    assert log == ["committed", "a"]


@pytest.mark.parametrize("commit", COMMITS)
async def test_before_the_engine_commits(worker: Site, log: Log, commit: Act) -> None:
    """An engine's listener that fails before COMMIT is sent leaves a rollback, to the hooks as well."""

    async def work() -> None:
        async with worker.db(commit_on_exit=True) as unit:
            log.both(unit)
            with listening(worker.engine.sync_engine, "commit", boom):
                await commit(unit)
                await unit.commit()

    with pytest.raises(BoomError, match="boom"):
        await work()
    assert log == ["rolled back"]
    assert await worker.notes() == []
    assert worker.checked_out() == 0
    log.clear()
    async with worker.db(commit_on_exit=True) as unit:
        log.both(unit)
        await write(unit, "later")
    assert log == ["committed"]
    assert await worker.notes() == ["later"]


async def test_unit_goes_on_after_a_listener(worker: Site, log: Log) -> None:
    """The unit's next transactions have outcomes of their own: a commit, and a rollback."""
    async with worker.db() as unit:
        sync = unit.session.sync_session
        for name, listener in LATE.items():
            log.both(unit, name)
            with listening(sync, name, listener, first=True), pytest.raises(BoomError):
                await commit_unit(unit) if name == "after_commit" else await write(unit, "b")
        log.both(unit, "third")
        unit.session.add(Note(text="c"))
        await unit.session.flush()
        await unit.rollback()
        log.both(unit, "fourth")
        await write(unit, "d")
    assert log == [
        "after_commit committed",
        "after_transaction_end committed",
        "third rolled back",
        "fourth committed",
    ]
    assert await worker.notes() == ["a", "b", "d"]


async def write(unit: Unit, note: str) -> None:
    """Write a note and commit."""
    await unit.session.execute(insert(Note).values(text=note))
    await unit.session.commit()


@pytest.mark.parametrize("act", [leave, commit_unit, commit_session, begin_block, begin_and_commit])
async def test_unknown_outcome(postgresql_url: str, judge_for: JudgeFor, log: Log, act: Act) -> None:
    """A listener of the end that fails after a COMMIT of which nobody knows runs no hook."""

    async def work(db: SessionProxy[AsyncSession]) -> None:
        async with db(commit_on_exit=True) as unit:
            log.both(unit)
            await act(unit)

    async with open_worker(postgresql_url, judge_for) as worker:
        await die_in_commit(worker.judge)
        failing = listening(Session, "after_transaction_end", boom_at_the_end, first=True)
        with pytest.raises((BoomError, DBAPIError)), failing:
            await work(worker.db)
        assert log == []


@pytest.mark.parametrize("by", ["unit", "session", "begin"])
async def test_next_transaction_after_a_rollback(
    postgresql_url: str, judge_for: JudgeFor, log: Log, by: str
) -> None:
    """Where a listener of the end fails after ROLLBACK, nothing of the old transaction stops the next one."""

    async def fail(unit: Unit) -> None:
        with suppress(DBAPIError):
            await unit.session.execute(text("SELECT nothing FROM nowhere"))
        if by == "begin":
            raise BoomError
        await (unit if by == "unit" else unit.session).rollback()

    failing = listening(Session, "after_transaction_end", boom_at_the_end, first=True)
    async with open_worker(postgresql_url, judge_for) as worker:
        async with worker.db(commit_on_exit=True) as unit:
            log.both(unit, "first")
            with failing, pytest.raises(BoomError):
                async with unit.session.begin() if by == "begin" else nullcontext():
                    await fail(unit)
            log.both(unit, "second")
            await write(unit, "a")
        assert log == ["first rolled back", "second committed"]
        assert await worker.notes() == ["a"]


@pytest.mark.parametrize("name", ["after_rollback", "after_soft_rollback"])
async def test_after_rollback(worker: Site, log: Log, name: str) -> None:
    """A listener that fails after ROLLBACK makes no commit of it."""
    async with worker.db() as unit:
        log.both(unit)
        unit.session.add(Note(text="a"))
        await unit.session.flush()
        with listening(unit.session.sync_session, name, boom, first=True), pytest.raises(BoomError):
            await unit.rollback()
    assert log == ["rolled back"]
    assert await worker.notes() == []


@pytest.mark.parametrize("place", ["Session, late, first", "class, late", "instance"])
async def test_request(make_site: MakeSite, database_url: str, log: Log, place: str) -> None:
    """A request whose listener fails after COMMIT is answered 500, and `on_commit` hooks have run."""
    site = await make_site(database_url, commit_on_exit=True, session_args={"class_": MyAsyncSession})
    where, ends = PLACES[place], list[Any]()

    @site.app.get("/")
    async def route() -> None:
        log.both(site.db.unit)
        site.db.session.add(Note(text="a"))
        manager = listening(where.target(site.db.unit), "after_commit", boom, first=where.insert)
        manager.__enter__()
        ends.append(manager)

    try:
        assert (await site.get(raise_app_exceptions=False)).status_code == 500
    finally:
        ends[0].__exit__(None, None, None)
    assert log == ["committed"]
    assert await site.notes() == ["a"]


@pytest.mark.parametrize("commit", [commit_unit, commit_session])
async def test_savepoint_that_was_released(worker: Site, log: Log, commit: Act) -> None:
    """An `after_commit` listener hears of a savepoint's RELEASE, too: if it fails, nothing is committed."""

    async def in_a_savepoint(unit: Unit) -> None:
        async with unit.savepoint():
            unit.session.add(Note(text="a"))
            await unit.session.flush()
        await commit(unit)

    async def work() -> None:
        async with worker.db(commit_on_exit=True) as unit:
            log.both(unit)
            with listening(unit.session.sync_session, "after_commit", boom, first=False):
                await in_a_savepoint(unit)

    with pytest.raises(BoomError):
        await work()
    assert log == ["rolled back"]
    assert await worker.notes() == []
