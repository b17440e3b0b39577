"""What is cancelled at any of its await points leaves neither a connection nor half of a write."""

import asyncio
import gc
import logging
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Generator,
)
from contextlib import aclosing, suppress
from itertools import product
from typing import Any, Literal, TypeAlias

import anyio
import pytest
from attrs import define, frozen
from sqlalchemy import AsyncAdaptedQueuePool, event, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_async_sqlalchemy import create_middleware_and_session_proxy
from tests.support.databases import Judge, JudgeFor
from tests.support.interruption import Exchange, Interrupted, Moment
from tests.support.site import checked_out
from tests.support.tables import Note, engine_with_tables
from tests.support.versions import survives_cancellation

pytestmark = survives_cancellation

SQLAlchemyMiddleware, db = create_middleware_and_session_proxy()

DEADLINE = 30
"""Seconds after which a step counts as hanging."""
POOL: dict[str, Any] = {
    "poolclass": AsyncAdaptedQueuePool,  # older SQLAlchemy pools no SQLite by itself
    "pool_size": 2,
    "max_overflow": 0,
    "pool_timeout": DEADLINE / 2,
}


def number(request: Request) -> int:
    """Return the number of the attempt, which makes its rows unique."""
    value: int = request.path_params["number"]
    return value


async def write(label: str, attempt: int) -> None:
    """Write a row and flush it."""
    db.session.add(Note(text=f"{label}-{attempt}"))
    await db.session.flush()


async def read(request: Request) -> Response:
    """Only read."""
    return PlainTextResponse(await db.session.scalar(select(Note.text).where(Note.text == "seed")))


async def write_two(request: Request) -> Response:
    """Write two rows, which belong together."""
    await write("a", number(request))
    await write("b", number(request))
    return PlainTextResponse("seed")


async def write_and_raise(request: Request) -> Response:
    """Write and fail."""
    await write("x", number(request))
    message = "the handler failed"
    raise ValueError(message)


async def commit_by_hand(request: Request) -> Response:
    """Commit a row, then write one that nobody commits."""
    await write("a", number(request))
    await db.session.commit()
    await write("x", number(request))
    return PlainTextResponse("seed")


async def stream_and_write(request: Request) -> Response:
    """Write before the response and in its stream."""

    async def chunks() -> AsyncIterator[bytes]:
        yield b"se"
        await write("b", number(request))
        yield b"ed"

    await write("a", number(request))
    return StreamingResponse(chunks())


async def nest(request: Request) -> Response:
    """Write in a unit of its own while the request's unit holds a connection, then in that one."""
    seed = await db.session.scalar(select(Note.text).where(Note.text == "seed"))
    async with db(commit_on_exit=True):
        await write("a", number(request))
    await write("b", number(request))
    return PlainTextResponse(seed)


async def use_savepoints(request: Request) -> Response:
    """Write in the transaction, in a savepoint, and in one that is undone."""
    await write("a", number(request))
    async with db.unit.savepoint():
        await write("b", number(request))
    with suppress(LookupError):
        async with db.unit.savepoint():
            await write("x", number(request))
            raise LookupError
    return PlainTextResponse("seed")


async def open_unit(attempt: int) -> None:
    """Write two rows in an explicit unit, commit one more in the middle."""
    async with db(commit_on_exit=True) as unit:
        await write("a", attempt)
        await unit.commit()
        await write("b", attempt)
        await write("c", attempt)


@frozen
class Job:
    """What is cancelled, and which of its rows each of its commits makes visible."""

    endpoint: Callable[[Request], Awaitable[Response]] | None
    commits: tuple[str, ...] = ()
    """For each commit in turn the labels of its rows."""
    before_response: int = 0
    """How many of these commits a client that holds the head of the response may rely on."""
    commit_on_exit: bool = True
    status: int | None = 200
    raises: type[Exception] | None = None


JOBS = {
    "read": Job(read),
    "write": Job(write_two, ("ab",), 1),
    "error": Job(write_and_raise, status=500, raises=ValueError),
    "manual": Job(commit_by_hand, ("a",), 1, commit_on_exit=False),
    "stream": Job(stream_and_write, ("a", "b"), 1),
    "nested": Job(nest, ("a", "b"), 2),
    "savepoint": Job(use_savepoints, ("ab",), 1),
    "unit": Job(None, ("a", "bc"), status=None),
}

Work: TypeAlias = Callable[[Callable[[], object]], Awaitable[None]]
"""What is to be cancelled by calling the function that it is given."""


async def by_task(work: Work) -> None:
    """Cancel the task, as a server or a caller does."""
    task = asyncio.current_task()
    assert task is not None
    await work(task.cancel)


async def by_timeout(work: Work) -> None:
    """Let an `asyncio.timeout` expire."""
    try:
        async with asyncio.timeout(None) as timeout:
            await work(lambda: timeout.reschedule(0))
    except TimeoutError:
        raise asyncio.CancelledError from None


async def by_scope(work: Work) -> None:
    """Cancel an anyio scope, which cancels its tasks again and again until they have left it."""
    with anyio.CancelScope() as scope:
        await work(scope.cancel)
    if scope.cancelled_caught:
        raise asyncio.CancelledError


async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
    """Do nothing, in a `BaseHTTPMiddleware`: the application inside runs in a task of its own."""
    return await call_next(request)


@frozen
class Variant:
    """Who cancels, when, and how often."""

    canceller: Callable[[Work], Coroutine[None, None, None]] = by_task
    moment: Moment = "waiting"
    width: int = 1
    """How many suspensions in a row are cancelled."""
    inside_base_http: bool = False


def leak(record: logging.LogRecord) -> bool:
    """Tell a lost connection or a lost error from what SQLAlchemy says of its own clean-up.

    Which is that a rollback on return was cancelled too, and that aiosqlite never ended a second `stop()`.
    """
    known = ("Exception during reset or similar", "aiosqlite.py")
    text = record.getMessage()
    return record.name.startswith(("sqlalchemy", "asyncio")) and not any(part in text for part in known)


@define(eq=False)
class Bench:
    """Runs a job again and again, cancelled at another suspension each time, and judges what it leaves."""

    job: Job
    judge: Judge
    caplog: pytest.LogCaptureFixture
    variant: Variant
    _attempts: int = 0
    _commits: int = 0

    async def sweep(self, engines: AsyncGenerator[AsyncEngine], *, warm: bool) -> int:
        """Cancel at the first suspension, the second, and so on until there is none; return their number."""
        point = 0
        async with aclosing(engines):
            async for engine in engines:
                db.bind(engine)
                event.listen(engine.sync_engine, "commit", self._count)
                try:
                    if warm:
                        await self._attempt(engine)
                    point += 1
                    if not await self._attempt(engine, range(point, point + self.variant.width)):
                        break
                    if engine.dialect.name == "sqlite" and self.job.endpoint is nest:
                        gc.collect()  # the cursor of a cancelled SELECT keeps its lock until then
                    await self._attempt(engine)
                finally:
                    event.remove(engine.sync_engine, "commit", self._count)
                    db.unbind()
        gc.collect()
        leaks = [record.getMessage() for record in self.caplog.records if leak(record)]
        assert leaks == []
        return point - 1

    def _count(self, _: object) -> None:
        self._commits += 1

    async def _attempt(self, engine: AsyncEngine, at: Collection[int] = ()) -> bool:
        """Run the job once, cancelled or not, and judge it; return whether it was cancelled."""
        self._attempts += 1
        self._commits = 0
        exchange = Exchange(f"/{self._attempts}")
        interrupted: list[Interrupted[None]] = []

        async def work(cancel: Callable[[], object]) -> None:
            async def interrupt(coroutine: Coroutine[None, None, None]) -> None:
                interrupted.append(Interrupted(coroutine, at, cancel, self.variant.moment))
                await interrupted[0]

            if self.job.endpoint is None:
                await interrupt(open_unit(self._attempts))
            else:
                await exchange.call(self._app(self.job.endpoint, interrupt))

        before = asyncio.all_tasks()
        task = asyncio.create_task(self.variant.canceller(work), name=f"attempt {self._attempts}")
        _, hanging = await asyncio.wait({task}, timeout=DEADLINE)
        assert not hanging, f"hangs, cancelled at {at}: {task.get_stack()}"
        assert checked_out(engine.pool) == 0, f"connection lost, cancelled at {at}"
        cancelled = interrupted[0].cancellations > 0
        if cancelled:
            assert task.cancelled(), f"not cancelled at {at}"
        else:
            self._check_whole(task, exchange)
        await self._check_rows(exchange, at, whole=not cancelled)
        await self._check_tasks(asyncio.all_tasks() - before, at)
        return cancelled

    def _app(
        self,
        endpoint: Callable[[Request], Awaitable[Response]],
        interrupt: Callable[[Coroutine[None, None, None]], Awaitable[None]],
    ) -> ASGIApp:
        app = Starlette(routes=[Route("/{number:int}", endpoint)])
        app.add_middleware(SQLAlchemyMiddleware, commit_on_exit=self.job.commit_on_exit)

        async def interrupting(scope: Scope, receive: Receive, send: Send) -> None:
            await interrupt(app(scope, receive, send))

        return BaseHTTPMiddleware(interrupting, pass_on) if self.variant.inside_base_http else interrupting

    def _check_whole(self, task: asyncio.Task[None], exchange: Exchange) -> None:
        assert not task.cancelled()
        error = task.exception()
        if self.job.raises is None:
            assert error is None
        else:
            assert isinstance(error, self.job.raises)
        assert exchange.status == self.job.status
        assert exchange.status != 200 or (exchange.complete and exchange.body == b"seed")

    async def _check_tasks(self, left: set[asyncio.Task[Any]], at: Collection[int]) -> None:
        """Let nothing go on but the closing of a connection, where SQLAlchemy's wait for it was cancelled."""
        for task in left:
            closing = repr(task.get_coro())
            assert "_terminate_graceful_close" in closing, f"task left, cancelled at {at}"
            while "aiosqlite" in closing and not task.done():
                # It waits, for ever, for a worker thread that has been told to stop already.
                task.cancel()
                await asyncio.wait({task}, timeout=0)
            await asyncio.wait({task}, timeout=DEADLINE)
            assert task.done(), f"still closing, cancelled at {at}"

    async def _check_rows(self, exchange: Exchange, at: Collection[int], *, whole: bool) -> None:
        rows = await self.judge.rows(
            "SELECT text FROM note WHERE text LIKE :mine", mine=f"%-{self._attempts}"
        )
        visible = {str(text).partition("-")[0] for (text,) in rows}
        for position, labels in enumerate(self.job.commits, 1):
            seen = visible & set(labels)
            visible -= seen
            acknowledged = exchange.status == 200 and position <= self.job.before_response
            if whole or acknowledged or self._commits > position:
                assert seen == set(labels), f"lost, cancelled at {at}"
            elif self._commits == position:
                assert seen in (set(), set(labels)), f"torn, cancelled at {at}"
            else:
                assert seen == set(), f"written, cancelled at {at}"
        assert visible == set(), f"never committed, cancelled at {at}"


async def cold_engines(url: str) -> AsyncGenerator[AsyncEngine]:
    """Make a new engine for each attempt, so that connecting is cancelled too."""
    while True:
        engine = create_async_engine(url, **POOL)
        try:
            yield engine
        finally:
            await engine.dispose()


async def warm_engine(url: str) -> AsyncGenerator[AsyncEngine]:
    """Use one engine for all attempts."""
    engine = create_async_engine(url, **POOL)
    try:
        while True:
            yield engine
    finally:
        await engine.dispose()


@pytest.fixture
async def judge(database_url: str, judge_for: JudgeFor) -> Judge:
    """A judge of a database that holds the tables and the note that is read."""
    async with engine_with_tables(database_url):
        witness = await judge_for(database_url)
        await witness.execute("INSERT INTO note (text) VALUES ('seed')")
        return witness


VARIANTS = {
    "once": Variant(),
    "late": Variant(moment="done"),
    "twice": Variant(width=2),
    "thrice, late": Variant(moment="done", width=3),
    "timeout": Variant(by_timeout),
    "scope": Variant(by_scope),
    "base http": Variant(inside_base_http=True),
}


@pytest.mark.parametrize(
    ("variant", "pool"), [*product(VARIANTS, ["warm"]), *product(list(VARIANTS)[:4], ["cold"])]
)
@pytest.mark.parametrize("name", JOBS)
async def test_cancelled_at_every_suspension(
    *,
    name: str,
    variant: str,
    pool: Literal["cold", "warm"],
    database_url: str,
    judge: Judge,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A task that is cancelled anywhere gives its connection back clean and commits all or nothing."""
    bench = Bench(JOBS[name], judge, caplog, VARIANTS[variant])
    engines = (cold_engines if pool == "cold" else warm_engine)(database_url)
    points = await bench.sweep(engines, warm=pool == "warm")
    server = database_url.partition("+")[0]
    print(f"{points} points: {variant}, {name}, {pool} {server}")  # noqa: T201  # to quote; pytest -rP shows it
    assert points > 0


@pytest.fixture
def without_collector() -> Generator[None]:
    """Let nothing be collected but what is counted down."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("point", range(1, 7))
@pytest.mark.parametrize("moment", ["waiting", "done"])
async def test_cancelled_statement_leaves_no_lock_on_a_file(
    sqlite_url: str, judge_for: JudgeFor, point: int, moment: Moment
) -> None:
    """A SELECT that was cancelled on SQLite keeps nobody from writing, though nothing was collected since."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    judge = await judge_for(sqlite_url)
    async with engine_with_tables(sqlite_url) as engine:
        db.bind(engine)
        await judge.execute("INSERT INTO note (text) VALUES ('one'), ('two')")

        async def work() -> None:
            async with db():
                await db.session.execute(select(Note.text))

        async def interrupt() -> None:
            await Interrupted(work(), {point}, lambda: task.cancel(), moment)  # noqa: PLW0108  # made below

        task = asyncio.create_task(interrupt())
        await asyncio.wait([task])
        assert checked_out(engine.pool) == 0
        await judge.execute(f"PRAGMA busy_timeout = {DEADLINE * 1000}")
        await judge.execute("DELETE FROM note")
        db.unbind()
