"""What the documentation promises first, by each driver, on each event loop that applications run on."""

import asyncio
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any, cast

import pytest
from attrs import define
from fastapi import FastAPI, HTTPException
from sqlalchemy import func, select, text
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.middleware import Middleware

from fastapi_async_sqlalchemy import (
    PoolTimeoutError,
    UnitClosedError,
    create_middleware_and_session_proxy,
)
from tests.support.databases import Judge
from tests.support.gate import Gate, closed, gate_of, passing
from tests.support.interruption import Exchange
from tests.support.settings import DEFAULT_LEVEL, OTHER_LEVEL, level_of
from tests.support.site import Site
from tests.support.tables import Note, engine_with_tables
from tests.support.versions import survives_cancellation

pytestmark = survives_cancellation

DEADLINE = 60
POOL: dict[str, Any] = {"pool_size": 2, "max_overflow": 0, "pool_timeout": 20}


@define(eq=False)
class Stand(Site):
    """A site with a gate."""

    gate: Gate


Feature = Callable[[Stand], Awaitable[None]]
FEATURES: list[Feature] = []


def a_feature(feature: Feature) -> Feature:
    """Note a feature."""
    FEATURES.append(feature)
    return feature


async def add(stand: Stand, note: str) -> None:
    """Write a note in the current unit."""
    stand.db.session.add(Note(text=note))
    await stand.db.session.flush()


async def cut_off(stand: Stand, work: Coroutine[Any, Any, None]) -> None:
    """Cancel work in the middle of its statement, which SQLite's thread sees to its end."""
    async with closed(stand.gate):
        task = asyncio.create_task(work)
        await stand.gate.reached()
        task.cancel()
        if stand.engine.dialect.name == "sqlite":
            await stand.gate.open()
        await asyncio.wait({task})
        assert task.cancelled()


async def work_at_gate(stand: Stand) -> None:
    """Write, and wait at the gate, in a unit."""
    async with stand.db(commit_on_exit=True) as unit:
        await add(stand, "at the gate")
        await unit.session.execute(passing(stand.gate))


@a_feature
async def commit_and_rollback(stand: Stand) -> None:
    """A unit commits what it wrote, or rolls it back, and its hooks see which."""
    seen = list[str]()
    for end, error in (("commit", None), ("rollback", LookupError())):
        with suppress(LookupError):
            async with stand.db(commit_on_exit=True) as unit:
                unit.on_commit(partial(seen.append, f"{end} committed"))
                unit.on_rollback(partial(seen.append, f"{end} rolled back"))
                await add(stand, end)
                if error is not None:
                    raise error
    assert seen == ["commit committed", "rollback rolled back"]
    assert await stand.notes() == ["commit"]


@a_feature
async def savepoints(stand: Stand) -> None:
    """An error undoes its savepoint alone, also a statement's own."""
    async with stand.db(commit_on_exit=True) as unit:
        await add(stand, "kept")
        with suppress(IntegrityError):
            async with unit.savepoint():
                await add(stand, "undone")
                await add(stand, "kept")
        async with stand.db(propagation="nested"):
            await add(stand, "nested")
    assert await stand.notes() == ["kept", "nested"]


@a_feature
async def propagation(stand: Stand) -> None:
    """A joined block shares the unit, one of its own does not."""
    with suppress(LookupError):
        async with stand.db(commit_on_exit=True):
            async with stand.db(propagation="required"):
                await stand.db.session.scalar(select(func.count()).select_from(Note))
            if stand.engine.dialect.name == "sqlite":
                await stand.db.session.rollback()  # SQLite lets one write at a time
            async with stand.db(propagation="requires_new", commit_on_exit=True):
                await add(stand, "own")
            async with stand.db(propagation="required"):
                await add(stand, "joined")
            raise LookupError
    assert await stand.notes() == ["own"]


@a_feature
async def streams(stand: Stand) -> None:
    """A stream is read to its end, or left, and the unit commits."""
    async with stand.db(commit_on_exit=True) as unit:
        unit.session.add_all([Note(text=f"{number:03}") for number in range(100)])
        await unit.session.flush()
        stream = await unit.session.stream_scalars(select(Note.text).execution_options(yield_per=10))
        assert len([note async for note in stream]) == 100
        left = await unit.session.stream_scalars(select(Note.text).execution_options(yield_per=10))
        assert await anext(aiter(left))
    assert len(await stand.notes()) == 100


@a_feature
async def gather(stand: Stand) -> None:
    """Ten coroutines write in units of their own."""

    async def write(number: int) -> int:
        await add(stand, f"{number}")
        await stand.db.session.commit()
        return number

    async with stand.db():
        results = await stand.db.gather(*(write(number) for number in range(10)), max_concurrent=1)
    assert list(results) == list(range(10))
    assert len(await stand.notes()) == 10


@a_feature
async def settings(stand: Stand) -> None:
    """Read-only and isolation levels hold for their unit and for no later one."""
    dialect = stand.engine.dialect.name
    level: Any = OTHER_LEVEL[dialect]
    for _ in range(3):
        async with stand.db(read_only=True, isolation_level=level) as unit:
            assert await level_of(unit.session) == level
            with pytest.raises(SQLAlchemyError, match=r"(?i)read.?only"):
                await unit.session.execute(text("INSERT INTO note (text) VALUES ('none')"))
        async with stand.db(commit_on_exit=True) as unit:
            assert await level_of(unit.session) == DEFAULT_LEVEL[dialect]
            await unit.session.execute(text("DELETE FROM note"))
    assert await stand.notes() == []


@a_feature
async def pool_timeout(stand: Stand) -> None:
    """Without a free connection the error comes at the deadline, and the next unit has one."""
    async with AsyncExitStack() as held:
        for _ in range(2):
            await held.enter_async_context(stand.engine.connect())
        with pytest.raises(PoolTimeoutError):
            async with stand.db(pool_timeout=0.05) as unit:
                await unit.session.scalar(text("SELECT 1"))
    async with stand.db() as unit:
        assert await unit.session.scalar(text("SELECT 1")) == 1


@a_feature
async def cancelled_in_a_statement(stand: Stand) -> None:
    """A unit whose task is cancelled in the middle of a statement is rolled back."""
    await cut_off(stand, work_at_gate(stand))
    assert await stand.notes() == []


@a_feature
async def child_in_a_statement(stand: Stand) -> None:
    """A child that is in the middle of a statement when the unit fails, fails at once."""
    children = list[asyncio.Task[Any]]()

    async def work() -> None:
        async with stand.db(commit_on_exit=True) as unit:
            await add(stand, "none")
            children.append(asyncio.create_task(unit.session.execute(passing(stand.gate))))
            await stand.gate.reached()
            raise LookupError

    async with closed(stand.gate):
        unit = asyncio.create_task(work())
        await asyncio.wait({unit})
        assert isinstance(unit.exception(), LookupError)
        await asyncio.wait(children)
        assert isinstance(children[0].exception(), UnitClosedError)
    assert await stand.notes() == []


@a_feature
async def requests(stand: Stand) -> None:
    """A request commits before its response starts, rolls back for a 409, and when its client is cut off."""
    app = stand.app

    @app.get("/well")
    async def well() -> str:
        await add(stand, "well")
        return "well"

    @app.get("/conflict")
    async def conflict() -> None:
        await add(stand, "conflict")
        raise HTTPException(409)

    @app.get("/gate")
    async def at_gate() -> None:
        await add(stand, "cut off")
        await stand.db.session.execute(passing(stand.gate))

    for path, status in (("/well", 200), ("/conflict", 409)):
        exchange = Exchange(path)
        await exchange.call(app)
        assert exchange.status == status
    await cut_off(stand, Exchange("/gate").call(app))
    assert await stand.notes() == ["well"]


@a_feature
async def lost_connection(stand: Stand) -> None:
    """A unit whose connection is cut fails, and the next one has a new connection."""
    if stand.engine.dialect.name == "sqlite":
        return
    ours = {"postgresql": "SELECT pg_backend_pid()", "mysql": "SELECT CONNECTION_ID()"}
    kill = {"postgresql": "SELECT pg_terminate_backend({}, 10000)", "mysql": "KILL {}"}
    dialect = stand.engine.dialect.name
    with suppress(Exception):
        async with stand.db(commit_on_exit=True) as unit:
            backend = await unit.session.scalar(text(ours[dialect]))
            await stand.judge.execute(kill[dialect].format(backend))
            await add(stand, "lost")
    async with stand.db(commit_on_exit=True):
        await add(stand, "next")
    assert await stand.notes() == ["next"]


@asynccontextmanager
async def open_stand(url: str) -> AsyncGenerator[Stand]:
    """Make the application and its pair; no connection may be out of the pool on exit."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    async with engine_with_tables(url, **POOL) as engine, Judge(url) as judge:
        gate = gate_of(engine, judge)
        await engine.dispose()
        db.bind(engine)
        app = FastAPI(middleware=[Middleware(cast("Any", middleware), commit_on_exit=True)])
        stand = Stand(app, db, engine, judge, gate)
        yield stand
        assert stand.checked_out() == 0
        db.unbind()


async def play(url: str) -> dict[str, BaseException]:
    """Play all features, each on empty tables; return the errors of those that fail."""
    failed = dict[str, BaseException]()
    for feature in FEATURES:
        try:
            async with asyncio.timeout(DEADLINE), open_stand(url) as stand:
                await stand.judge.execute("DELETE FROM note")
                await feature(stand)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  # all are told at the end
            failed[feature.__name__] = error
    return failed


def plain() -> asyncio.AbstractEventLoop:
    """Make asyncio's own loop."""
    return asyncio.new_event_loop()


def debug() -> asyncio.AbstractEventLoop:
    """Make it in debug mode."""
    loop = asyncio.new_event_loop()
    loop.set_debug(True)
    loop.slow_callback_duration = DEADLINE
    return loop


def eager() -> asyncio.AbstractEventLoop:
    """Make one whose tasks start when they are created."""
    if sys.version_info < (3, 12):
        pytest.skip("Python has eager tasks from 3.12 on")
    loop = asyncio.new_event_loop()
    loop.set_task_factory(asyncio.eager_task_factory)
    return loop


def uv() -> asyncio.AbstractEventLoop:
    """Make the loop that uvicorn prefers."""
    loop: asyncio.AbstractEventLoop = pytest.importorskip("uvloop").new_event_loop()
    return loop


@pytest.mark.parametrize("loop", [plain, debug, eager, uv])
def test_features(driver_url: str, loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """All features hold by each driver on each loop."""
    with asyncio.Runner(loop_factory=loop) as runner:
        assert runner.run(play(driver_url)) == {}
