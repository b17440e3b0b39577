"""What docs/why.md says, by programs that run on both: this package, and a dependency in time."""

import asyncio
import gc
import re
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from typing import Annotated, Any

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from sqlalchemy import URL
from sqlalchemy.exc import IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from benchmarks.field import adapters, scenarios
from benchmarks.field.ground import Ground, Open, ask, logged, standing
from fastapi_async_sqlalchemy import (
    PartialCommitError,
    add_pool_timeout_handler,
    create_middleware_and_session_proxy,
)
from tests.support.crash import DIED
from tests.support.databases import JudgeFor, fresh_database
from tests.support.dependency import needs_function_scope
from tests.support.pages import ROOT
from tests.support.serving import asgi_client
from tests.support.tables import ORPHAN, Note, Reply, engine_with_tables
from tests.support.two_databases import create_app
from tests.support.versions import survives_cancellation

OPENED: dict[str, Callable[..., Open]] = {
    "package": partial(adapters.package, AsyncSession),
    "dependency": adapters.dependency,
}
"""This package, and `Depends(session, scope="function")` around `async_sessionmaker.begin()`."""
MakeGround = Callable[..., Any]


def both(package: object, dependency: object) -> pytest.MarkDecorator:
    """Run a program on both, each with what must come of it."""
    return pytest.mark.parametrize(
        ("side", "expected"),
        [
            pytest.param("package", package, id="package"),
            pytest.param("dependency", dependency, id="dependency", marks=needs_function_scope),
        ],
    )


@pytest.fixture
async def make_ground(side: str) -> AsyncIterator[MakeGround]:
    """A function that opens an application with the session of the side that a test names; await it."""
    async with AsyncExitStack() as grounds:

        async def make(url: str, *inside: Middleware, **options: Any) -> Ground:
            return await grounds.enter_async_context(standing(OPENED[side](**options), url, *inside))

        yield make


# Where the dependency is as good.


@both(package="before the response", dependency="before the response")
async def test_commit_comes_first(make_ground: MakeGround, deferring_url: str, expected: str) -> None:
    """Both commit before the response starts."""
    assert await scenarios.order(await make_ground(deferring_url)) == expected


@both(package="409, from the handler", dependency="409, from the handler")
async def test_failing_commit(make_ground: MakeGround, deferring_url: str, expected: str) -> None:
    """In both the application's handler answers for a COMMIT that fails."""
    assert await scenarios.failing_commit(await make_ground(deferring_url)) == expected


@both(package="rolled back", dependency="rolled back")
async def test_raised_error(make_ground: MakeGround, deferring_url: str, expected: str) -> None:
    """Both roll back for an HTTPException."""
    assert await scenarios.raised_404(await make_ground(deferring_url)) == expected


@both(package="rolled back, connection returned", dependency="rolled back, connection returned")
@survives_cancellation
async def test_cancellation(make_ground: MakeGround, postgresql_url: str, expected: str) -> None:
    """A request that is cancelled in the middle of a statement leaves nothing behind, in both."""
    assert await scenarios.cancelled(await make_ground(postgresql_url)) == expected


@both(package="in the pool", dependency="in the pool")
async def test_slow_client(make_ground: MakeGround, deferring_url: str, expected: str) -> None:
    """Neither holds a connection while the body is sent."""
    assert await scenarios.slow_client(await make_ground(deferring_url)) == expected


@both(package="committed", dependency="committed")
async def test_scripts(make_ground: MakeGround, deferring_url: str, expected: str) -> None:
    """Outside requests a block of either commits."""
    assert await scenarios.outside(await make_ground(deferring_url)) == expected


# What tells them apart.


@both(package="rolled back", dependency="committed")
async def test_returned_error(make_ground: MakeGround, deferring_url: str, expected: str) -> None:
    """An error response that is returned, and not raised, looks like success to a dependency."""
    assert await scenarios.returned_404(await make_ground(deferring_url)) == expected


class Refusing:
    """A middleware that puts an answer of its own in place of every response."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def swallow(_: Message) -> None:
            """Send nothing."""

        await self.app(scope, receive, swallow)
        return await PlainTextResponse("not acceptable", 406)(scope, receive, send)


@both(package="rolled back", dependency="committed")
async def test_refusing_middleware(make_ground: MakeGround, deferring_url: str, expected: str) -> None:
    """What a middleware refuses has not been committed yet by the package, and has by the dependency."""
    ground: Ground = await make_ground(deferring_url, Middleware(Refusing))

    @ground.app.get("/")
    async def route(session: AsyncSession = ground.session) -> None:
        session.add(Note(text="written"))

    assert (await ask(ground.app)).status == 406
    assert ("written" in await ground.notes()) is (expected == "committed")


@both(package="committed", dependency="lost, connection leaked")
@pytest.mark.parametrize("tail", [scenarios.background, scenarios.stream], ids=["background task", "stream"])
async def test_tail(
    make_ground: MakeGround, deferring_url: str, tail: scenarios.Scenario, expected: str
) -> None:
    """What is written after the response has started is committed, or lost without any error."""
    assert await tail(await make_ground(deferring_url)) == expected


@both(package=[0, 0], dependency=[1, 1])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # asyncpg's, of what is leaked
async def test_leak(make_ground: MakeGround, postgresql_url: str, expected: list[int]) -> None:
    """A leaked connection is out until the garbage collector comes, of which the pool logs an ERROR."""
    ground: Ground = await make_ground(postgresql_url)

    async def work(session: AsyncSession) -> None:
        session.add(Note(text="tail"))
        await session.flush()

    @ground.app.get("/")
    async def route(tasks: BackgroundTasks, session: AsyncSession = ground.session) -> None:
        tasks.add_task(work, session)

    with logged() as records:
        await ask(ground.app)
        out = ground.out()
        gc.collect()
        assert ground.out() == 0
    assert [out, len([record for record in records if record.levelname == "ERROR"])] == expected


@both(package="UnitClosedError", dependency="lost, connection leaked")
async def test_late_task(make_ground: MakeGround, deferring_url: str, expected: str) -> None:
    """A task that outlives its request is refused, or writes what nobody commits."""
    assert await scenarios.late_task(await make_ground(deferring_url)) == expected


class Keeping:
    """A middleware that keeps the errors of requests."""

    def __init__(self, app: ASGIApp, errors: list[str]) -> None:
        self.app = app
        self.errors = errors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        try:
            await self.app(scope, receive, send)
        except Exception as error:
            self.errors.append(str(error))
            raise


@both(package=("ConcurrentUseError", True), dependency=("a SQLAlchemy error.*", False))
@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")  # SQLAlchemy 2.0 may warn of it first
async def test_two_tasks(make_ground: MakeGround, postgresql_url: str, expected: tuple[str, bool]) -> None:
    """Two tasks on one session get an error in both; the package's names both and the remedy."""
    errors: list[str] = []
    outcome, names_them = expected
    ground = await make_ground(postgresql_url, Middleware(Keeping, errors=errors))
    assert re.fullmatch(outcome, await scenarios.pair(ground))
    (error,) = errors
    assert all(name in error for name in ("task 'one'", "task 'two'", "`async with db():`")) is names_them


@both(package="a WARNING", dependency="nothing")
async def test_forgotten_commit(make_ground: MakeGround, deferring_url: str, expected: str) -> None:
    """A write that nothing commits is logged, or lost in silence where the dependency does not begin()."""
    assert await scenarios.forgotten(await make_ground(deferring_url, commit=False)) == expected


@both(package="yes", dependency="no")
async def test_no_parameter(make_ground: MakeGround, sqlite_url: str, expected: str) -> None:
    """A function without a parameter for it has the request's session."""
    assert await scenarios.deep(await make_ground(sqlite_url)) == expected


class Auditing:
    """A middleware that writes a note for each request, by the request's session if it can have it."""

    def __init__(self, app: ASGIApp, grounds: list[Ground]) -> None:
        self.app = app
        self.grounds = grounds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "http":
            ground = self.grounds[0]
            if ground.ambient is not None:
                (await ground.ambient()).add(Note(text="audit"))
            else:
                async with ground.block() as session:
                    session.add(Note(text="audit"))
        await self.app(scope, receive, send)


@both(package=[], dependency=["audit"])
async def test_middleware(make_ground: MakeGround, deferring_url: str, expected: list[str]) -> None:
    """A middleware writes in the request's transaction, or needs a transaction of its own."""
    grounds: list[Ground] = []
    ground: Ground = await make_ground(deferring_url, Middleware(Auditing, grounds=grounds))
    grounds.append(ground)

    @ground.app.get("/")
    async def route(session: AsyncSession = ground.session) -> None:
        session.add(Note(text="written"))
        message = "the request fails"
        raise RuntimeError(message)

    assert (await ask(ground.app)).status == 500
    assert await ground.notes() == expected


@both(package="yes", dependency="no")
async def test_yield_dependency(make_ground: MakeGround, sqlite_url: str, expected: str) -> None:
    """FastAPI lets a `yield` dependency of the default scope have the package's session only."""
    ground: Ground = await make_ground(sqlite_url)

    async def repository(session: AsyncSession = ground.session) -> AsyncGenerator[AsyncSession]:
        yield session

    try:

        @ground.app.get("/")
        async def route(session: Annotated[AsyncSession, Depends(repository)]) -> None:
            session.add(Note(text="written"))

    except Exception as error:  # noqa: BLE001  # FastAPI's own, which has no public name
        refused = "no" if "scope" in str(error) else str(error)
        assert refused == expected  # one of the two sides raises
    else:
        assert (await ask(ground.app)).status == 200
        assert expected == "yes"


@both(package="1", dependency=None)
async def test_full_pool(side: str, sqlite_url: str, expected: str | None) -> None:
    """Both can answer 503 for a full pool; the package by the block's deadline, with a time to try again."""
    patience = 60 if side == "package" else 0.1
    async with engine_with_tables(sqlite_url, pool_size=1, max_overflow=0, pool_timeout=patience) as engine:
        app = FastAPI()
        if side == "package":
            middleware, db = create_middleware_and_session_proxy(AsyncSession)
            app.add_middleware(middleware, custom_engine=engine)
            add_pool_timeout_handler(app)

            @app.get("/")
            async def of_package() -> None:
                async with db(pool_timeout=0.05) as unit:
                    await unit.session.connection()

        else:
            maker = async_sessionmaker(engine)
            by_function: dict[str, Any] = {"scope": "function"}

            async def session() -> AsyncGenerator[AsyncSession]:
                async with maker.begin() as session:
                    yield session

            @app.exception_handler(PoolTimeout)
            async def full(request: Request, error: Exception) -> Response:
                return Response(status_code=503)

            @app.get("/")
            async def of_dependency(
                session: Annotated[AsyncSession, Depends(session, **by_function)],
            ) -> None:
                await session.connection()

        async with engine.connect(), asgi_client(app) as client:
            answer = await client.get("/")
        assert answer.status_code == 503
        assert answer.headers.get("Retry-After") == expected


# Several databases.


@both(package=(PartialCommitError, True), dependency=(IntegrityError, False))
async def test_second_database(
    side: str,
    postgresql_url: str,
    sqlite_url: str,
    judge_for: JudgeFor,
    expected: tuple[type[Exception], bool],
) -> None:
    """Where the second COMMIT fails after the first, the package's error names both databases."""
    async with engine_with_tables(postgresql_url) as late, engine_with_tables(sqlite_url) as early:
        app = FastAPI()
        if side == "package":
            late_middleware, late_db = create_middleware_and_session_proxy(AsyncSession)
            early_middleware, early_db = create_middleware_and_session_proxy(AsyncSession)
            app.add_middleware(early_middleware, custom_engine=early, commit_on_exit=True)
            app.add_middleware(late_middleware, custom_engine=late, commit_on_exit=True)

            @app.get("/")
            async def of_package() -> None:
                early_db.session.add(Note(text="early"))
                late_db.session.add(Reply(**ORPHAN))

        else:
            late_maker, early_maker = async_sessionmaker(late), async_sessionmaker(early)

            async def late_session() -> AsyncGenerator[AsyncSession]:
                async with late_maker.begin() as session:
                    yield session

            async def early_session() -> AsyncGenerator[AsyncSession]:
                async with early_maker.begin() as session:
                    yield session

            by_function: dict[str, Any] = {"scope": "function"}

            @app.get("/")
            async def of_dependency(
                late: Annotated[AsyncSession, Depends(late_session, **by_function)],
                early: Annotated[AsyncSession, Depends(early_session, **by_function)],
            ) -> None:
                early.add(Note(text="early"))
                late.add(Reply(**ORPHAN))

        answer = await ask(app)
        assert answer.status == 500
        error, names_both = expected
        assert type(answer.error) is error
        for engine in (early, late):
            assert (str(engine.url.database) in str(answer.error)) is names_both
        judge = await judge_for(sqlite_url)
        assert await judge.scalar("SELECT text FROM note") == "early"


@both(package=["after", "crashed"], dependency=["after"])
async def test_atomic(
    side: str,
    postgresql_server: URL,
    postgresql_url: str,
    *,
    databases: ExitStack,
    judge_for: JudgeFor,
    expected: list[str],
) -> None:
    """Both commit two databases or none; only the package finishes what a crash leaves prepared."""
    second_url = await asyncio.to_thread(lambda: databases.enter_context(fresh_database(postgresql_server)))
    first_judge, second_judge = await judge_for(postgresql_url), await judge_for(second_url)

    async def stored() -> list[list[tuple[object, ...]]]:
        notes = await first_judge.rows("SELECT text FROM note ORDER BY text")
        return [notes, await second_judge.rows("SELECT note_id FROM reply")]

    async def run(*words: str) -> int:
        command = (sys.executable, "-W", "ignore", "-m", *words, postgresql_url, second_url)
        return await (await asyncio.create_subprocess_exec(*command, cwd=ROOT)).wait()

    async with engine_with_tables(postgresql_url) as first, engine_with_tables(second_url) as second:
        await second_judge.execute("INSERT INTO note VALUES (1, 'there')")
        refused = await ask(create_app(side, first, second, "refused", **ORPHAN))
        assert type(refused.error) is IntegrityError
        assert await stored() == [[], []]

        assert await run("tests.support.two_databases", side) == DIED
        assert (await ask(create_app(side, first, second, "after", 1))).status == 200
        assert await stored() == [[("after",)], [(1,)]]
        assert await run("fastapi_async_sqlalchemy.recovery", "--older-than", "0.000001") == 0
        assert await stored() == [[(text,) for text in expected], [(1,) for _ in expected]]
        left = "SELECT count(*) FROM pg_prepared_xacts WHERE database IN (:one, :two)"
        names = {"one": first.url.database, "two": second.url.database}
        assert await first_judge.scalar(left, **names) == (0 if side == "package" else 2)
