"""An explicit unit of work, `async with db() as unit:`, in a process without any application."""

import asyncio
import gc
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, suppress
from typing import Any

import pytest
from sqlalchemy import URL, AsyncAdaptedQueuePool, insert, inspect, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from fastapi_async_sqlalchemy import (
    EngineAlreadyBoundError,
    EngineArgs,
    MissingSessionError,
    SessionNotInitialisedError,
    SessionProxy,
    UnexpectedRollbackError,
    UnitClosedError,
    UnitOfWork,
    create_middleware_and_session_proxy,
)
from tests.support.databases import Judge, JudgeFor, fresh_database
from tests.support.site import Site, checked_in, checked_out, complaints
from tests.support.tables import ORPHAN, Note, Reply, engine_with_tables

ENDED = r"has ended and can be used only once: open a new one with `async with db(\.begin)?\(\):`"
Unit = UnitOfWork[AsyncSession]


class BoomError(Exception):
    """The error of a test's own."""


class BoomExit(BaseException):
    """What ends a program: no Exception."""


ENDS = (BoomError("boom"), BoomExit("boom"), asyncio.CancelledError("boom"))


# Where the engine comes from.


async def test_connect_serves_units(database_url: str, judge_for: JudgeFor) -> None:
    """`async with db.connect(url):` is all that a script needs; at its end the engine is gone."""
    _, db = create_middleware_and_session_proxy()
    pooled: EngineArgs = {"poolclass": AsyncAdaptedQueuePool}  # SQLAlchemy's default for SQLite since 2.0.38
    async with engine_with_tables(database_url):
        async with db.connect(database_url, engine_args=pooled) as connected:
            assert connected is db
            engine = db.engine
            async with db(commit_on_exit=True) as unit:
                unit.session.add(Note(text="from a script"))
            assert checked_in(engine.pool) == 1
        assert checked_in(engine.pool) == 0
    judge = await judge_for(database_url)
    assert await judge.rows("SELECT text FROM note") == [("from a script",)]
    with pytest.raises(SessionNotInitialisedError, match=r"open `async with db\.connect\(url\):`"):
        _ = db.engine


async def test_connect_leaves_a_given_engine_alone(database_url: str) -> None:
    """An engine that was given to `db.connect` is let go and not disposed."""
    _, db = create_middleware_and_session_proxy()
    async with engine_with_tables(database_url) as engine:
        async with db.connect(engine), db() as unit:
            assert await unit.session.scalar(select(1)) == 1
        assert checked_in(engine.pool) == 1


async def test_bind_leaves_the_engine_alone(database_url: str) -> None:
    """`db.bind(engine)` serves units until `db.unbind()`, which does not dispose the engine."""
    _, db = create_middleware_and_session_proxy()
    async with engine_with_tables(database_url) as engine:
        db.bind(engine)
        assert db.engine is engine
        async with db() as unit:
            assert await unit.session.scalar(select(1)) == 1
        db.unbind()
        assert checked_in(engine.pool) == 1
        with pytest.raises(SessionNotInitialisedError, match=r"open `async with db\.connect\(url\):`"):
            _ = db.engine


async def test_error_leaves_connect(sqlite_url: str) -> None:
    """An error passes through `db.connect`, which disposes its engine all the same."""
    _, db = create_middleware_and_session_proxy()

    async def script() -> None:
        async with db.connect(sqlite_url):
            raise BoomError

    with pytest.raises(BoomError, match=r"^$"):
        await script()
    async with db.connect(sqlite_url), db() as unit:
        assert await unit.session.scalar(select(1)) == 1


async def test_second_engine_is_refused(sqlite_url: str) -> None:
    """Inside `db.connect` another engine is refused; the first one goes on serving."""
    _, db = create_middleware_and_session_proxy()
    async with db.connect(sqlite_url):
        with pytest.raises(EngineAlreadyBoundError, match=r"leave `async with db\.connect\(\.\.\.\)` out"):
            await db.connect(sqlite_url).__aenter__()
        with pytest.raises(EngineAlreadyBoundError, match=r"leave `db\.bind\(\)` out"):
            db.bind(create_async_engine(sqlite_url))
        with pytest.raises(EngineAlreadyBoundError, match="give a second database its own pair"):
            await db.connect(f"{sqlite_url}.other").__aenter__()
        async with db() as unit:
            assert await unit.session.scalar(select(1)) == 1


BLOCKS: dict[str, tuple[Callable[[SessionProxy[AsyncSession]], Any], str]] = {
    "plain": (lambda db: db(), "db()"),
    "required": (lambda db: db(propagation="required"), "db()"),
    "begin": (lambda db: db.begin(), "db.begin()"),
    "per_task": (lambda db: db.per_task(), "db.per_task()"),
}


@pytest.mark.parametrize(("opening", "code"), BLOCKS.values(), ids=BLOCKS)
async def test_block_entered_twice(
    sqlite_worker: Site, opening: Callable[[SessionProxy[AsyncSession]], Any], code: str
) -> None:
    """The error names the call that opens another such block."""
    block = opening(sqlite_worker.db)
    async with block:
        pass
    with pytest.raises(UnitClosedError, match=re.escape(f"open a new one with `async with {code}:`")):
        await block.__aenter__()


async def test_unit_without_an_engine_is_refused() -> None:
    """A unit that is opened before there is an engine says how to give one."""
    _, db = create_middleware_and_session_proxy()
    with pytest.raises(SessionNotInitialisedError, match=r"no engine yet: .* `async with db\.connect\("):
        await db().__aenter__()


async def test_no_unit_outside(worker: Site) -> None:
    """Outside a block `db.session` and `db.unit` say to open one."""
    with pytest.raises(MissingSessionError, match=r"open `async with db\(\):` around the work"):
        _ = worker.db.session
    with pytest.raises(MissingSessionError, match=r"open `async with db\(\):` around the work"):
        _ = worker.db.unit


# Leaving the block.


async def write(db: SessionProxy[AsyncSession], *, end: BaseException | None = None, **options: Any) -> None:
    """Write a note in a unit of its own, which ends by this error or well."""
    async with db(**options):
        db.session.add(Note(text="written"))
        await db.session.flush()
        if end is not None:
            raise end


async def test_unit_and_proxy_name_the_same_session(worker: Site) -> None:
    """Inside the block `db.unit` is the unit, and `db.session` its session, made on first use."""
    async with worker.db() as unit:
        assert unit.opened is None
        assert worker.db.unit is unit
        assert worker.db.session is unit.session is unit.opened
        assert worker.checked_out() == 0


async def test_commit_on_exit(worker: Site) -> None:
    """A block that ends well commits under `commit_on_exit=True`."""
    await write(worker.db, commit_on_exit=True)
    assert await worker.notes() == ["written"]


@pytest.mark.parametrize("commit_on_exit", [True, False])
@pytest.mark.parametrize("error", ENDS, ids=repr)
async def test_error_rolls_back(
    worker: Site, error: BaseException, caplog: pytest.LogCaptureFixture, *, commit_on_exit: bool
) -> None:
    """An error that leaves the block rolls back, silently, and goes on."""
    with pytest.raises(type(error), match=r"^boom$") as raised:
        await write(worker.db, end=error, commit_on_exit=commit_on_exit)
    assert raised.value is error
    assert worker.checked_out() == 0
    assert await worker.notes() == []
    assert complaints(caplog) == []


async def test_failing_flush_at_the_end(worker: Site) -> None:
    """A commit at the block's end whose flush fails raises, rolls back and ends the unit."""
    await write(worker.db, commit_on_exit=True)

    async def write_again() -> None:
        async with worker.db(commit_on_exit=True) as unit:
            unit.session.add_all([Note(text="other"), Note(text="written")])

    with pytest.raises(IntegrityError, match=r"(?i)unique|duplicate"):
        await write_again()
    assert worker.checked_out() == 0
    assert await worker.notes() == ["written"]


async def test_failing_commit_at_the_end(deferring_worker: Site) -> None:
    """A COMMIT that the database refuses raises out of the block, and nothing is written."""

    async def write_orphan() -> None:
        async with deferring_worker.db(commit_on_exit=True) as unit:
            unit.session.add_all([Note(text="lost"), Reply(**ORPHAN)])

    with pytest.raises(IntegrityError, match=r"(?i)foreign key"):
        await write_orphan()
    assert deferring_worker.checked_out() == 0
    assert await deferring_worker.notes() == []


async def test_swallowed_flush_error_cannot_commit(worker: Site) -> None:
    """A unit whose failed flush was swallowed raises at its commit, and none of its writes is there."""
    await write(worker.db, commit_on_exit=True)

    async def swallow() -> None:
        async with worker.db(commit_on_exit=True) as unit:
            unit.session.add(Note(text="other"))
            await unit.session.flush()
            unit.session.add(Note(text="written"))
            with pytest.raises(IntegrityError, match=r"(?i)unique|duplicate"):
                await unit.session.flush()

    with pytest.raises(UnexpectedRollbackError, match=r"`async with db\.unit\.savepoint\(\):`"):
        await swallow()
    assert worker.checked_out() == 0
    assert await worker.notes() == ["written"]


async def test_swallowed_statement_error_cannot_commit(postgresql_worker: Site) -> None:
    """PostgreSQL has given up a transaction whose error was swallowed: COMMIT raises instead of losing it."""

    async def swallow() -> None:
        async with postgresql_worker.db(commit_on_exit=True) as unit:
            await unit.session.execute(insert(Note).values(text="other"))
            with pytest.raises(Exception, match="division by zero"):
                await unit.session.execute(text("SELECT 1/0"))

    with pytest.raises(UnexpectedRollbackError, match=r"`async with db\.unit\.savepoint\(\):`") as raised:
        await swallow()
    assert "division by zero" in str(raised.value.__cause__)
    assert await postgresql_worker.notes() == []


@pytest.fixture
def second_url(postgresql_server: URL, databases: ExitStack) -> str:
    """Another empty database of PostgreSQL."""
    return databases.enter_context(fresh_database(postgresql_server))


@pytest.mark.parametrize("fails_on", ["own", "bound", "both"])
async def test_swallowed_error_beside_a_bound_engine(
    postgresql_worker: Site, second_url: str, fails_on: str
) -> None:
    """Whichever engine's transaction an error has aborted, none of the unit's is committed."""
    engines: dict[str, dict[str, Any]] = {"own": {}, "bound": {"mapper": Reply}}

    async def work(args: Any) -> None:
        async with postgresql_worker.db(args, commit_on_exit=True) as unit:
            unit.on_commit(lambda: pytest.fail("it is not committed"))
            for name in ("own", "bound"):
                statement = text("INSERT INTO note (text) VALUES ('lost')")
                await unit.session.execute(statement, bind_arguments=engines[name])
            for name in ("own", "bound") if fails_on == "both" else (fails_on,):
                with pytest.raises(DBAPIError, match="division by zero"):
                    await unit.session.execute(text("SELECT 1/0"), bind_arguments=engines[name])

    async with engine_with_tables(second_url) as engine, Judge(second_url) as witness:
        with pytest.raises(UnexpectedRollbackError, match="has aborted the transaction"):
            await work({"binds": {Reply: engine}})
        assert checked_out(engine.pool) == 0
        assert await witness.scalar("SELECT count(*) FROM note") == 0
    assert await postgresql_worker.notes() == []


async def test_savepoint_undoes_its_block_alone(worker: Site) -> None:
    """An error that leaves `unit.savepoint()` undoes that block; the unit commits the rest."""
    await write(worker.db, commit_on_exit=True)

    async def add_twice(unit: Unit) -> None:
        async with unit.savepoint():
            unit.session.add_all([Note(text="gone"), Note(text="written")])

    async with worker.db(commit_on_exit=True) as unit:
        unit.session.add(Note(text="kept"))
        await unit.session.flush()
        with pytest.raises(IntegrityError, match=r"(?i)unique|duplicate"):
            await add_twice(unit)
        unit.session.add(Note(text="later"))
    assert await worker.notes() == ["kept", "later", "written"]


# Blocks in blocks.


@pytest.mark.parametrize("inner_commits", [True, False])
@pytest.mark.parametrize("outer_commits", [True, False])
async def test_nested_units_have_outcomes_of_their_own(
    worker: Site, *, inner_commits: bool, outer_commits: bool
) -> None:
    """An inner unit has its own session and connection, and neither outcome touches the other."""
    async with worker.db(commit_on_exit=outer_commits) as outer:
        await outer.session.scalar(select(1))
        async with worker.db(commit_on_exit=inner_commits) as inner:
            assert worker.db.unit is inner is not outer
            assert inner.session is not outer.session
            inner.session.add(Note(text="inner"))
            await inner.session.flush()
            assert worker.checked_out() == 2
        assert worker.checked_out() == 1
        assert worker.db.unit is outer
        worker.db.session.add(Note(text="outer"))
    expected = {"inner": inner_commits, "outer": outer_commits}
    assert await worker.notes() == [note for note, committed in expected.items() if committed]


@pytest.mark.parametrize("commit_on_exit", [True, False])
@pytest.mark.parametrize("error", ENDS, ids=repr)
async def test_outer_unit_is_current_again_after_an_error(
    worker: Site, error: BaseException, *, commit_on_exit: bool
) -> None:
    """Whatever ended the inner block, the outer unit is current again, open, and commits its own."""
    async with worker.db(commit_on_exit=True) as outer:
        with pytest.raises(type(error), match=r"^boom$"):
            await write(worker.db, end=error, commit_on_exit=commit_on_exit)
        assert worker.db.unit is outer
        worker.db.session.add(Note(text="outer"))
    assert await worker.notes() == ["outer"]


async def test_outer_unit_is_current_again_after_a_failed_commit(deferring_worker: Site) -> None:
    """An inner COMMIT that fails leaves the outer unit as it was."""
    db = deferring_worker.db

    async def write_orphan() -> None:
        async with db(commit_on_exit=True):
            db.session.add(Reply(**ORPHAN))

    async with db(commit_on_exit=True) as outer:
        with pytest.raises(IntegrityError, match=r"(?i)foreign key"):
            await write_orphan()
        assert db.unit is outer
        db.session.add(Note(text="outer"))
    assert await deferring_worker.notes() == ["outer"]


async def test_no_unit_is_current_after_the_outermost(worker: Site) -> None:
    """After the outermost block there is no unit, as before it."""
    with pytest.raises(BoomError, match=r"^$"):
        await write(worker.db, end=BoomError())
    with pytest.raises(MissingSessionError, match=r"open `async with db\(\):`"):
        _ = worker.db.session


async def notes_in_a_unit(db: SessionProxy[AsyncSession]) -> AsyncGenerator[Unit]:
    """Hold a unit that has written while the consumer works."""
    async with db() as unit:
        await unit.session.execute(insert(Note).values(text="from a generator"))
        yield unit


async def test_generator_closed_by_another_task(worker: Site) -> None:
    """A unit held by a generator ends when another task closes it; that task's own unit stays current."""
    generator = notes_in_a_unit(worker.db)

    async def start() -> Unit:
        return await anext(generator)

    inner = await asyncio.create_task(start())
    assert worker.checked_out() == 1
    async with worker.db() as outer:
        await generator.aclose()
        assert worker.db.unit is outer
    assert inner.closed
    assert worker.checked_out() == 0
    assert await worker.notes() == []


async def test_generators_closed_in_any_order(postgresql_worker: Site) -> None:
    """Generators that hold units and are closed first come, first served, leave the outer unit current."""
    db = postgresql_worker.db

    async def hold() -> AsyncGenerator[Unit]:
        async with db() as unit:
            await unit.session.scalar(select(1))
            yield unit

    async with db() as outer:
        first, second = hold(), hold()
        units = [await anext(first), await anext(second)]
        await first.aclose()
        assert db.unit is units[1]
        await second.aclose()
        assert db.unit is outer
    assert [unit.closed for unit in units] == [True, True]


async def test_generators_left_by_a_long_lived_task(sqlite_worker: Site) -> None:
    """A unit that a generator held and that was closed elsewhere is not kept by those that come after it."""

    def units() -> int:
        gc.collect()
        return sum(isinstance(found, UnitOfWork) for found in gc.get_objects())

    before = units()
    for _ in range(10):
        generator = notes_in_a_unit(sqlite_worker.db)
        await anext(generator)
        await asyncio.create_task(generator.aclose())
    assert units() <= before + 1


@pytest.mark.parametrize("options", [{}, {"multi_sessions": True}], ids=["unit", "units"])
async def test_generator_left_by_a_loop(sqlite_worker: Site, options: dict[str, Any]) -> None:
    """At the end of a block what is around it is current, whatever a generator has left inside."""
    db = sqlite_worker.db

    async def leave_one() -> None:
        generator = notes_in_a_unit(db)
        async for _ in generator:
            break
        await asyncio.create_task(generator.aclose())  # as the event loop does when nobody has it any more

    async with db() as outer:
        async with db(**options):
            await leave_one()
        assert db.unit is outer
        await leave_one()
    with pytest.raises(MissingSessionError, match="has no unit of work here"):
        _ = db.unit


async def test_cancelled_in_the_block(worker: Site) -> None:
    """A task that is cancelled inside the block rolls back, gives the connection back, and ends cancelled."""
    inside = asyncio.Event()

    async def work() -> None:
        async with worker.db(commit_on_exit=True) as unit:
            unit.session.add(Note(text="cancelled"))
            await unit.session.flush()
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await inside.wait()
    task.cancel("enough")
    with pytest.raises(asyncio.CancelledError, match="enough"):
        await task
    assert worker.checked_out() == 0
    assert await worker.notes() == []


# One use.


async def test_scope_entered_twice_is_refused(worker: Site) -> None:
    """What `db()` returns is for one `async with`: a second one raises, inside the first and after it."""
    scope = worker.db()
    async with scope as unit:
        with pytest.raises(UnitClosedError, match=ENDED):
            await scope.__aenter__()
        assert worker.db.unit is unit
        assert not unit.closed
    with pytest.raises(UnitClosedError, match=ENDED):
        await scope.__aenter__()


Use = Callable[[Unit, AsyncSession], Any]
USES: dict[str, Use] = {
    "unit.session": lambda unit, session: unit.session,
    "unit.commit": lambda unit, session: unit.commit(),
    "unit.rollback": lambda unit, session: unit.rollback(),
    "unit.savepoint": lambda unit, session: unit.savepoint(),
    "unit.on_commit": lambda unit, session: unit.on_commit(print),
    "unit.on_rollback": lambda unit, session: unit.on_rollback(print),
    "session.execute": lambda unit, session: session.execute(select(1)),
    "session.scalar": lambda unit, session: session.scalar(select(1)),
    "session.scalars": lambda unit, session: session.scalars(select(1)),
    "session.stream": lambda unit, session: session.stream(select(1)),
    "session.get": lambda unit, session: session.get(Note, 1),
    "session.add": lambda unit, session: session.add(Note(text="late")),
    "session.add_all": lambda unit, session: session.add_all([Note(text="late")]),
    "session.merge": lambda unit, session: session.merge(Note(text="late")),
    "session.flush": lambda unit, session: session.flush(),
    "session.commit": lambda unit, session: session.commit(),
    "session.connection": lambda unit, session: session.connection(),
    "session.begin": lambda unit, session: session.begin().start(),
    "session.begin_nested": lambda unit, session: session.begin_nested().start(),
    "session.run_sync": lambda unit, session: session.run_sync(lambda sync: sync.execute(select(1))),
}


async def use(act: Use, unit: Unit, session: AsyncSession) -> None:
    """Use a unit or its session, and wait for what comes out."""
    result = act(unit, session)
    if hasattr(result, "__await__"):
        await result


@pytest.mark.parametrize("act", USES.values(), ids=USES)
async def test_ended_unit_is_refused(postgresql_worker: Site, act: Use) -> None:
    """A unit and a session that were kept beyond the block raise at any use, and check nothing out."""
    async with postgresql_worker.db() as unit:
        session = unit.session
        await session.scalar(select(1))
    assert unit.closed
    with pytest.raises(UnitClosedError, match=ENDED):
        await use(act, unit, session)
    assert postgresql_worker.checked_out() == 0


async def test_ended_session_is_refused_on_every_database(worker: Site) -> None:
    """A kept session is refused after a unit that wrote, and after one that failed."""
    async with worker.db(commit_on_exit=True) as unit:
        sessions = [unit.session]
        unit.session.add(Note(text="kept"))

    async def fail() -> None:
        async with worker.db() as unit:
            sessions.append(unit.session)
            raise BoomError

    with pytest.raises(BoomError, match=r"^$"):
        await fail()
    for session in sessions:
        with pytest.raises(UnitClosedError, match=ENDED):
            await session.execute(select(1))
        await session.rollback()
        await session.close()
    assert worker.checked_out() == 0


async def test_unit_that_was_never_used_ends_too(worker: Site) -> None:
    """A unit without a session is closed at the block's end like any other."""
    async with worker.db() as unit:
        pass
    assert unit.closed
    with pytest.raises(UnitClosedError, match=ENDED):
        _ = unit.session


async def test_task_that_outlived_the_block_is_refused(worker: Site) -> None:
    """A task that was started inside the block and goes on after it gets an error, not a session."""
    ended = asyncio.Event()

    async def late() -> None:
        await ended.wait()
        await worker.db.session.execute(insert(Note).values(text="late"))

    async with worker.db():
        task = asyncio.create_task(late())
    ended.set()
    with pytest.raises(UnitClosedError, match=ENDED):
        await task
    assert await worker.notes() == []


async def test_task_that_outlived_the_block_opens_a_unit_of_its_own(worker: Site) -> None:
    """The remedy in the error works: the task opens a unit of its own."""
    ended = asyncio.Event()

    async def late() -> None:
        await ended.wait()
        await write(worker.db, commit_on_exit=True)

    async with worker.db():
        task = asyncio.create_task(late())
    ended.set()
    await task
    assert await worker.notes() == ["written"]


# commit() in the middle.


@pytest.mark.parametrize("by", ["unit", "session"])
async def test_commit_in_the_middle(worker: Site, by: str, caplog: pytest.LogCaptureFixture) -> None:
    """A commit gives the connection back, the objects stay readable, and the next statement begins anew."""
    async with worker.db() as unit:
        note = Note(text="first")
        unit.session.add(note)
        await (unit if by == "unit" else unit.session).commit()
        assert worker.checked_out() == 0
        assert await worker.notes() == ["first"]
        assert (note.id, note.text) == (1, "first")
        session = unit.session
        session.add(Note(text="second"))
        await session.flush()
        assert worker.checked_out() == 1
        await (unit if by == "unit" else unit.session).rollback()
        assert worker.checked_out() == 0
        assert unit.session is session
        session.add(Note(text="third"))
        await unit.commit()
    assert await worker.notes() == ["first", "third"]
    assert complaints(caplog) == []


@pytest.mark.parametrize("end", ["commit", "discard", "error"])
async def test_objects_stay_readable_after_the_block(worker: Site, end: str) -> None:
    """What was loaded or written can be read after the block, however it ended."""
    await write(worker.db, commit_on_exit=True)
    loaded: list[Note | None] = []

    async def work(*, writes: bool) -> None:
        async with worker.db(commit_on_exit=end == "commit") as unit:
            loaded.append(await unit.session.scalar(select(Note).order_by(Note.id)))
            if writes:
                loaded.append(Note(text="made"))
                unit.session.add(loaded[-1])
                await unit.session.flush()
            if end == "error":
                raise BoomError

    for writes in (True, False):
        with suppress(BoomError):
            await work(writes=writes)
    assert [note and note.text for note in loaded] == ["written", "made", "written"]


async def test_session_closed_in_the_middle_begins_afresh(worker: Site) -> None:
    """`session.close()` rolls back and gives the connection back; the unit and its session go on."""
    async with worker.db(commit_on_exit=True) as unit:
        session = unit.session
        session.add(Note(text="gone"))
        await session.flush()
        await session.close()
        assert worker.checked_out() == 0
        assert unit.session is session
        session.add(Note(text="kept"))
    assert await worker.notes() == ["kept"]


async def test_unit_keeps_notes_of_the_caller(worker: Site) -> None:
    """`unit.info` is the unit's own dictionary and needs no session."""
    async with worker.db() as outer, worker.db() as inner:
        outer.info["who"] = "outer"
        assert outer.info == {"who": "outer"}
        assert inner.info == {}
        assert outer.opened is None


async def test_unit_shows_its_state(worker: Site) -> None:
    """A unit's repr is one line: which database, and how far it is."""
    async with worker.db() as unit:
        shown = [repr(unit)]
        session = unit.session
        shown.append(repr(unit))
        await session.scalar(select(1))
        shown.append(repr(unit))
    shown.append(repr(unit))
    states = ["no session yet", "no transaction", "in a transaction", "closed"]
    assert [line.rpartition(": ")[2] for line in shown] == [f"{state}>" for state in states]
    assert all(line.startswith("<UnitOfWork of AsyncSession (") for line in shown)


# Session arguments of one unit.


async def test_session_args_of_one_unit(worker: Site) -> None:
    """`db(session_args=...)` holds for this unit alone."""
    async with worker.db({"info": {"who": "me"}, "expire_on_commit": True}, commit_on_exit=True) as unit:
        assert unit.session.info == {"who": "me"}
        note = Note(text="expired")
        unit.session.add(note)
        await unit.commit()
        assert "text" in inspect(note).expired_attributes
        await unit.session.refresh(note)
    async with worker.db() as unit:
        assert unit.session.info == {}
        assert not unit.session.sync_session.expire_on_commit


class Mine(AsyncSession):
    """A session class of the test's own."""


async def test_session_args_are_added_to_the_database_s_own(sqlite_url: str) -> None:
    """A unit's arguments win over the database's one by one; those that it does not name stay."""
    _, db = create_middleware_and_session_proxy()
    async with db.connect(sqlite_url, session_args={"class_": Mine, "info": {"by": "database"}}):
        async with db(session_args={"info": {"by": "unit"}}) as unit:
            assert isinstance(unit.session, Mine)
            assert unit.session.info == {"by": "unit"}
        async with db(session_args={"class_": AsyncSession}) as unit:
            assert type(unit.session) is AsyncSession
            assert unit.session.info == {"by": "database"}
