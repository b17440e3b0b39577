"""Taking turns: with `concurrent_use="wait"` the tasks of one unit use its session one after the other."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from fastapi import FastAPI
from sqlalchemy import func, literal, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_async_sqlalchemy import (
    ConcurrentUseError,
    SessionProxy,
    UnitClosedError,
    create_middleware_and_session_proxy,
)
from tests.support.databases import JudgeFor
from tests.support.serving import asgi_client
from tests.support.site import Site
from tests.support.tables import Note, engine_with_tables

COUNT = select(func.count(Note.id))


@pytest.fixture
async def patient(database_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """A pair whose tasks wait for their turn, as long as for a connection."""
    _, db = create_middleware_and_session_proxy(AsyncSession, concurrent_use="wait")
    settings = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5}
    async with engine_with_tables(database_url, **settings) as engine, db.connect(engine):
        site = Site(FastAPI(), db, engine, await judge_for(database_url))
        yield site
        assert site.checked_out() == 0


async def holding(db: SessionProxy[AsyncSession], begun: asyncio.Event, goes_on: asyncio.Event) -> None:
    """Be in the middle of an operation until told to go on."""

    async def hold() -> None:
        begun.set()
        await goes_on.wait()

    async def operation() -> None:
        db.unit.before_commit(hold)
        await db.unit.commit()

    await operation()


async def test_gather_of_reads(patient: Site) -> None:
    """`asyncio.gather()` on one session works, one statement after the other."""
    async with patient.db.begin() as unit:
        unit.session.add_all(Note(text=f"note {number}") for number in range(3))
        await unit.session.flush()

        async def read(number: int) -> str | None:
            text: str | None = await unit.session.scalar(
                select(Note.text).where(Note.text == f"note {number}")
            )
            return text

        found = await asyncio.gather(*[read(number) for number in range(3) for _ in range(5)])
    assert found == [f"note {number}" for number in range(3) for _ in range(5)]
    assert len(await patient.notes()) == 3


async def test_turns_are_in_order(patient: Site) -> None:
    """Who came first is served first, also where the first one has more to do."""
    served: list[str] = []
    async with patient.db() as unit:

        async def work(name: str) -> None:
            for _ in range(3):
                await unit.session.execute(select(1))
                served.append(name)

        await asyncio.gather(*[work(name) for name in "abc"])
    assert served == list("abcabcabc")


async def test_writes_of_two_tasks(patient: Site) -> None:
    """What two tasks add is in the same transaction, committed or not."""
    async with patient.db.begin() as unit:

        async def write(number: int) -> None:
            unit.session.add(Note(text=f"note {number}"))
            await unit.session.scalar(COUNT)
            async with unit.savepoint():
                await unit.session.execute(text("UPDATE note SET text = 'x' WHERE id = -1"))

        await write(0)
        await asyncio.gather(*[asyncio.create_task(unit.session.scalar(COUNT)) for _ in range(4)])
    assert await patient.notes() == ["note 0"]


async def test_other_pairs_refuse(worker: Site) -> None:
    """Without the option a second task is refused, as ever."""
    async with worker.db() as unit:
        begun, goes_on = asyncio.Event(), asyncio.Event()
        await unit.session.execute(select(1))
        first = asyncio.create_task(holding(worker.db, begun, goes_on))
        await begun.wait()
        with pytest.raises(ConcurrentUseError):
            await unit.session.execute(select(1))
        goes_on.set()
        await first


async def test_wait_is_bounded(sqlite_url: str) -> None:
    """A wait ends after the pool's timeout, and the session goes on afterwards."""
    _, db = create_middleware_and_session_proxy(AsyncSession, concurrent_use="wait")
    async with engine_with_tables(sqlite_url, pool_timeout=0.1) as engine, db.connect(engine), db() as unit:
        begun, goes_on = asyncio.Event(), asyncio.Event()
        await unit.session.execute(select(1))
        first = asyncio.create_task(holding(db, begun, goes_on))
        await begun.wait()
        with pytest.raises(ConcurrentUseError, match=r"middle of commit\(\) for too long.*pool_timeout"):
            await unit.session.execute(select(1))
        goes_on.set()
        await first
        assert await unit.session.scalar(select(1)) == 1


async def test_cancelled_while_waiting(patient: Site) -> None:
    """A task that is cancelled while it waits leaves the turn to those behind it."""
    db = patient.db
    async with db() as unit:
        begun, goes_on = asyncio.Event(), asyncio.Event()
        await unit.session.execute(select(1))
        first = asyncio.create_task(holding(db, begun, goes_on))
        await begun.wait()
        second = asyncio.create_task(unit.session.scalar(select(literal(2))))
        third = asyncio.create_task(unit.session.scalar(select(literal(3))))
        await asyncio.sleep(0)  # both wait from now on
        second.cancel()
        goes_on.set()
        await first
        assert await third == 3
        assert second.cancelled()


async def test_deadlock_is_seen(patient: Site) -> None:
    """A hook that waits for a task which wants the session is refused at once: it would wait for itself."""
    db = patient.db
    async with db() as unit:

        async def read() -> int | None:
            found: int | None = await unit.session.scalar(select(1))
            return found

        async def hook() -> None:
            await db.gather(read())

        await unit.session.execute(select(1))
        unit.before_commit(hook)
        with pytest.raises(ConcurrentUseError, match="which waits for that task"):
            await unit.commit()
        await unit.rollback()


async def test_tasks_of_a_hook(patient: Site) -> None:
    """A hook's own tasks are refused at once, however the hook waits for them: it holds the session."""
    refused: list[BaseException | int | None] = []
    async with patient.db() as unit:

        async def read() -> int | None:
            found: int | None = await unit.session.scalar(select(1))
            return found

        async def hook() -> None:
            refused.extend(await asyncio.gather(read(), return_exceptions=True))

        unit.on_commit(hook)
        await unit.session.execute(select(1))
        async with asyncio.timeout(4):  # the pool's is longer
            await unit.commit()
    [error] = refused
    assert isinstance(error, ConcurrentUseError)
    assert "which waits for that task" in str(error)


async def test_unit_that_ends_meanwhile(patient: Site) -> None:
    """A task that waits while its unit ends is served or told so, and leaves no connection behind."""
    begun, goes_on = asyncio.Event(), asyncio.Event()
    async with patient.db() as unit:
        session = unit.session
        await session.execute(select(1))
        first = asyncio.create_task(holding(patient.db, begun, goes_on))
        await begun.wait()
        second = asyncio.create_task(session.scalar(select(1)))
        await asyncio.sleep(0)  # it waits from now on
        goes_on.set()
    await first
    await asyncio.wait([second])
    error = second.exception()
    assert isinstance(error, UnitClosedError) if error else second.result() == 1
    assert patient.checked_out() == 0


async def test_middleware_option(sqlite_url: str) -> None:
    """A middleware says it for its pair, for as long as its application runs."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    app = FastAPI()

    @app.get("/")
    async def resolve() -> list[int | None]:
        return list(
            await asyncio.gather(*[db.session.scalar(select(literal(number))) for number in range(4)])
        )

    async with engine_with_tables(sqlite_url) as engine:
        app.add_middleware(middleware, custom_engine=engine, concurrent_use="wait")
        async with asgi_client(app) as client:
            assert (await client.get("/")).json() == [0, 1, 2, 3]
        db.bind(engine)
        async with db() as unit:
            with pytest.raises(ConcurrentUseError):
                await asyncio.gather(*[unit.session.scalar(select(literal(number))) for number in range(4)])
        db.unbind()


async def test_middleware_option_without_its_engine(sqlite_url: str) -> None:
    """It outlasts a change of the engine while the application runs, and ends with the application."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    app = FastAPI()
    app.add_middleware(middleware, concurrent_use="wait")

    async def reads() -> list[int | None]:
        async with db() as unit:
            return list(await asyncio.gather(*[unit.session.scalar(select(literal(n))) for n in range(4)]))

    async with engine_with_tables(sqlite_url) as first, engine_with_tables(sqlite_url) as second:
        db.bind(first)
        async with asgi_client(app):
            assert await reads() == [0, 1, 2, 3]
            db.unbind()
            db.bind(second)
            assert await reads() == [0, 1, 2, 3]
        with pytest.raises(ConcurrentUseError):
            await reads()
        db.unbind()
