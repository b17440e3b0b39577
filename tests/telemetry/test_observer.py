"""Observers: what they are told, in which order, of which units, and that they harm nobody."""

import asyncio
import gc
import re

import pytest
from fastapi import FastAPI
from sqlalchemy import Connection, Engine, event, insert, inspect, literal, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from fastapi_async_sqlalchemy import (
    ConfigurationError,
    EngineAlreadyBoundError,
    Observer,
    PoolTimeoutError,
    UnitStats,
    create_middleware_and_session_proxy,
)
from tests.support.databases import JudgeFor
from tests.support.hooks import BoomError
from tests.support.observing import Broken, Recorder, open_observed
from tests.support.serving import asgi_client, run_lifespan
from tests.support.site import MakeSite, complaints
from tests.support.tables import ORPHAN, Note, Reply, engine_with_tables
from tests.support.versions import survives_cancellation

COMMITTED = ["opened", "wait", "connection", "committed", "1 hooks", "closed"]


@pytest.fixture
def recorder() -> Recorder:
    """An observer that keeps what it is told."""
    return Recorder()


async def test_moments_of_a_request(database_url: str, make_site: MakeSite, recorder: Recorder) -> None:
    """A request that writes tells of all moments in their order, and says which request it is."""
    site = await make_site(database_url, commit_on_exit=True, observers=[recorder])

    @site.app.post("/notes/{number}")
    async def route(number: int) -> None:
        site.db.unit.on_commit(lambda: None)
        site.db.session.add(Note(text="a"))

    async with site.client() as client:
        await client.post("/notes/3?secret=4")
    assert recorder.moments == COMMITTED
    [unit] = recorder.units
    assert unit.request == "POST /notes/3"
    assert unit.place is None
    assert unit.pool.database.startswith("AsyncSession (")
    assert unit.pool.name in database_url
    assert await site.notes() == ["a"]


async def test_untouched_request_tells_nothing(
    sqlite_url: str, make_site: MakeSite, recorder: Recorder
) -> None:
    """A request that asks for no session is none of an observer's."""
    site = await make_site(sqlite_url, observers=[recorder])
    site.app.get("/")(lambda: None)
    assert (await site.get()).status_code == 200
    assert recorder.moments == []


async def test_moments_of_a_block(database_url: str, judge_for: JudgeFor, recorder: Recorder) -> None:
    """A block tells the same, and its statistics can be read after its end."""
    async with open_observed(database_url, judge_for, recorder) as site:
        async with site.db(commit_on_exit=True) as unit:
            assert (unit.stats.statements, unit.stats.waited) == (0, 0)
            unit.on_commit(lambda: None)
            await unit.session.execute(insert(Note), [{"text": "a"}, {"text": "b"}])
            await unit.session.execute(text("UPDATE note SET text = 'c' WHERE text = 'a'"))
        assert recorder.moments == COMMITTED
        [transaction] = recorder.transactions
        assert transaction.statements == unit.stats.statements == 2
        assert transaction.rows == unit.stats.rows
        assert transaction.rows >= 1
        assert transaction.commit_error is None
        assert unit.stats.transactions == 1
        assert unit.stats.held == transaction.held > transaction.committing == unit.stats.committing > 0
        assert unit.stats.waited > 0
        assert unit.stats is recorder.units[0].stats
        assert recorder.units[0].request is None
        assert await site.notes() == ["b", "c"]


async def test_outcomes(database_url: str, judge_for: JudgeFor, recorder: Recorder) -> None:
    """A transaction that only reads says so however it ends; what was written is committed or rolled back."""
    async with open_observed(database_url, judge_for, recorder) as site:
        async with site.db(commit_on_exit=True) as unit:
            await unit.session.scalar(select(Note.text))
        async with site.db() as unit:
            await unit.session.scalar(select(Note.text))
            await unit.rollback()
            await unit.session.execute(insert(Note).values(text="a"))
            await unit.commit()
            await unit.session.execute(insert(Note).values(text="b"))
            await unit.rollback()

        async def fail() -> None:
            async with site.db(commit_on_exit=True) as unit:
                await unit.session.execute(insert(Note).values(text="c"))
                raise BoomError

        with pytest.raises(BoomError):
            await fail()
        assert [one.outcome for one in recorder.transactions] == [
            *("only read", "only read", "committed", "rolled back", "rolled back"),
        ]
        assert recorder.moments.count("closed") == 3
        assert await site.notes() == ["a"]


async def test_failed_commit(deferring_url: str, judge_for: JudgeFor, recorder: Recorder) -> None:
    """A COMMIT that fails is a rollback with the class of its error."""
    async with open_observed(deferring_url, judge_for, recorder) as site:

        async def work() -> None:
            async with site.db(commit_on_exit=True) as unit:
                unit.session.add(Reply(**ORPHAN))

        with pytest.raises(DBAPIError) as raised:
            await work()
        [transaction] = recorder.transactions
        assert transaction.outcome == "rolled back"
        assert transaction.commit_error == type(raised.value).__name__
        assert transaction.committing > 0


@survives_cancellation
async def test_unknown_outcome(database_url: str, judge_for: JudgeFor, recorder: Recorder) -> None:
    """A COMMIT whose answer never comes has an unknown outcome."""
    async with open_observed(database_url, judge_for, recorder) as site:

        async def work() -> None:
            async with site.db(commit_on_exit=True) as unit:
                await unit.session.execute(insert(Note).values(text="a"))

        task = asyncio.create_task(work())

        def cancel(_: Connection) -> None:
            task.cancel()

        event.listen(site.engine.sync_engine, "commit", cancel, once=True)
        await asyncio.wait([task])
        assert task.cancelled()
        assert [one.outcome for one in recorder.transactions] == ["unknown"]
        assert recorder.moments[-1] == "closed"


@pytest.mark.parametrize("pool_timeout", [None, 0.05])
async def test_timed_out_wait(
    sqlite_url: str, judge_for: JudgeFor, recorder: Recorder, pool_timeout: float | None
) -> None:
    """A wait that ends without a connection tells the error that the caller gets."""
    tight = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.05}
    async with open_observed(sqlite_url, judge_for, recorder, **tight) as site, site.engine.connect():
        async with site.db(pool_timeout=pool_timeout) as unit:
            with pytest.raises(PoolTimeoutError) as raised:
                await unit.session.scalar(select(Note.text))
        assert recorder.moments == ["opened", "wait", "PoolTimeoutError", "closed"]
        assert recorder.errors == [raised.value]
        assert unit.stats.waited >= 0.05
        assert unit.stats.transactions == 0


async def test_broken_observer_harms_nobody(
    database_url: str, judge_for: JudgeFor, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    """An observer that raises at every moment is logged; units and other observers are as without it."""
    async with open_observed(database_url, judge_for, Broken(), recorder) as site:
        async with site.db(commit_on_exit=True) as unit:
            unit.on_commit(lambda: None)
            await unit.session.execute(insert(Note).values(text="a"))
        assert recorder.moments == COMMITTED
        assert await site.notes() == ["a"]
    failed = [re.search(r"failed in (\w+)\(\)", line) for line in complaints(caplog)]
    assert [found and found[1] for found in failed] == [
        *("pool_bound", "unit_opened", "wait_began", "wait_ended", "transaction_ended"),
        *("hooks_ran", "unit_closed", "pool_released"),
    ]


async def test_observers_compose(sqlite_url: str, judge_for: JudgeFor) -> None:
    """Those of the pair and of the block are told each once; those of the block leave with it."""
    pairs, blocks = Recorder(), Recorder()
    _, db = create_middleware_and_session_proxy(AsyncSession, observers=[pairs])
    for _ in range(2):
        async with db.connect(sqlite_url, observers=[blocks, blocks, pairs]), db() as unit:
            await unit.session.scalar(text("SELECT 1"))
            assert len(blocks.pools) == len(pairs.pools) == 1
        assert blocks.pools == pairs.pools == []
    once = ["opened", "wait", "connection", "only read", "closed"]
    assert pairs.moments == blocks.moments == [*once, *once]


async def test_observers_of_an_application(sqlite_url: str, recorder: Recorder) -> None:
    """A middleware's observers see its pool until the lifespan ends, and no longer."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    app = FastAPI()
    app.add_middleware(middleware, db_url=sqlite_url, observers=[recorder])
    for _ in range(2):
        async with asgi_client(app):
            assert [pool.status().pool_class for pool in recorder.pools] == [type(db.engine.pool).__name__]
        assert recorder.pools == []


async def test_place_in_debug_mode(sqlite_url: str, judge_for: JudgeFor, recorder: Recorder) -> None:
    """In asyncio's debug mode a unit says which line has made its session."""
    async with open_observed(sqlite_url, judge_for, recorder) as site:
        asyncio.get_running_loop().set_debug(True)
        async with site.db() as unit:
            assert unit.session.is_active
    [unit_] = recorder.units
    assert re.fullmatch(r".*test_observer\.py:\d+", unit_.place or "")
    assert unit_.task.startswith("task ")


@survives_cancellation
async def test_unit_that_ends_in_the_middle_of_a_statement(
    locking_url: str, judge_for: JudgeFor, recorder: Recorder
) -> None:
    """A child task's statement that outlasts its unit is a part of it: the unit closes once, at last."""
    async with open_observed(locking_url, judge_for, recorder) as site:
        waiting = "SELECT pg_sleep(30)" if locking_url.startswith("postgresql") else "SELECT SLEEP(30)"
        children: list[asyncio.Task[object]] = []

        async def work() -> None:
            async with site.db() as unit:
                await unit.session.scalar(select(Note.text))
                children.append(asyncio.create_task(unit.session.scalar(text(waiting))))
                await asyncio.sleep(0)
                raise BoomError

        with pytest.raises(BoomError):
            await work()
        await asyncio.wait(children)
        assert children[0].exception() is not None
        assert recorder.moments.count("closed") == 1
        assert recorder.moments[-1] == "closed"
        assert len(recorder.transactions) == 1


async def test_engine_of_an_observed_session(
    database_url: str, judge_for: JudgeFor, recorder: Recorder
) -> None:
    """The caller's own connections by a session's engine work, and are no part of the unit."""

    def look(session: Session) -> list[str]:
        engine = session.get_bind()
        assert isinstance(engine, Engine)
        with engine.begin() as connection:
            assert connection.scalar(select(literal(1))) == 1
        return inspect(engine).get_table_names()

    async with open_observed(database_url, judge_for, recorder) as site, site.db() as unit:
        await unit.session.scalar(select(Note.text))
        assert "note" in await unit.session.run_sync(look)
        assert unit.stats.statements == 1


async def test_limits_outlast_the_observers(sqlite_url: str, recorder: Recorder) -> None:
    """Units of one block share its engine, those that nobody observes any more too."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    app = FastAPI()
    app.add_middleware(middleware, observers=[recorder])

    async def read() -> None:
        await db.session.scalar(select(Note.text))

    async with engine_with_tables(sqlite_url) as engine:
        db.bind(engine)
        async with db.per_task(max_concurrent=2):
            async with run_lifespan(app):
                await asyncio.create_task(read())
            await asyncio.create_task(read())
        db.unbind()
    assert len(recorder.units) == 1


async def test_refused_middleware_observes_nothing(sqlite_url: str, recorder: Recorder) -> None:
    """A middleware whose engine is refused leaves no observer behind."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    async with db.connect(sqlite_url):
        with pytest.raises(EngineAlreadyBoundError):
            middleware(FastAPI(), sqlite_url, observers=[recorder])
        async with db() as unit:
            await unit.session.scalar(select(literal(1)))
    assert recorder.moments == []


async def test_stack_that_is_built_again(sqlite_url: str, recorder: Recorder) -> None:
    """The observers of a stack that the application has built again are told once, and leave with it."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    app = FastAPI()
    app.add_middleware(middleware, db_url=sqlite_url, observers=[recorder], server_timing=True)

    @app.get("/")
    async def read() -> int | None:
        return await db.session.scalar(select(literal(1)))

    async with asgi_client(app) as client:
        for _ in range(2):
            app.middleware_stack = app.build_middleware_stack()
            gc.collect()
            assert (await client.get("/")).json() == 1
        assert recorder.moments.count("opened") == 2
    app.middleware_stack = None
    gc.collect()
    moments = list(recorder.moments)
    async with db.connect(sqlite_url), db() as unit:
        await unit.session.scalar(select(literal(1)))
    assert recorder.moments == moments


async def test_statistics_need_an_observer(sqlite_url: str, judge_for: JudgeFor) -> None:
    """Nothing is counted unless somebody asked; a plain observer is enough."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    async with db.connect(sqlite_url), db() as unit:
        for _ in range(2):
            with pytest.raises(
                ConfigurationError, match=r"needs an observer, and a plain Observer\(\) will do"
            ):
                _ = unit.stats
            await unit.session.scalar(text("SELECT 1"))
    async with open_observed(sqlite_url, judge_for, Observer()) as site, site.db() as unit:
        assert isinstance(unit.stats, UnitStats)
        await unit.session.scalar(text("SELECT 1"))
        assert unit.stats.statements == 1


def test_what_is_no_observer_is_refused() -> None:
    """Observers are objects of subclasses, given together."""
    for wrong, said in (
        (Observer(), r"observers must be an iterable of Observer objects, not <"),
        ("log", "observers must be an iterable of Observer objects, not 'log'"),
        ([Observer], "each of observers must be an object of a subclass of Observer, not <class"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            create_middleware_and_session_proxy(AsyncSession, observers=wrong)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # that is the mistake
