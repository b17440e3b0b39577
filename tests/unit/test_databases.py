"""Several databases: pairs that never meet, applications in one process, and what commits in which order."""

import itertools
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from attrs import define
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from sqlalchemy import AsyncAdaptedQueuePool, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from starlette.middleware import Middleware
from starlette.routing import Mount

from fastapi_async_sqlalchemy import (
    EngineAlreadyBoundError,
    MissingSessionError,
    PartialCommitError,
    SessionNotInitialisedError,
    SessionProxy,
    create_middleware_and_session_proxy,
)
from tests.support.databases import Judge, JudgeFor
from tests.support.serving import asgi_client
from tests.support.site import checked_in, checked_out, complaints
from tests.support.tables import ORPHAN, Note, Reply, engine_with_tables


class FirstSession(AsyncSession):
    """The session of the first database."""


class SecondSession(AsyncSession):
    """The session of the second database."""


@define(eq=False)
class Side:
    """One database of a test: its pair, its engine, and its judge."""

    middleware: Any
    db: SessionProxy[AsyncSession]
    engine: AsyncEngine
    judge: Judge

    def mounted(self, **options: Any) -> Middleware:
        """Return the pair's middleware for an application."""
        options.setdefault("custom_engine", self.engine)
        return Middleware(self.middleware, **options)

    async def notes(self) -> list[object]:
        """Return the texts of the notes that are committed, in order."""
        return [note for (note,) in await self.judge.rows("SELECT text FROM note ORDER BY text")]


@asynccontextmanager
async def open_side(session_class: type[AsyncSession], url: str, judge_for: JudgeFor) -> AsyncGenerator[Side]:
    """Make a pair of its own for a database with tables; on exit no connection may be out."""
    middleware, db = create_middleware_and_session_proxy(session_class)
    async with engine_with_tables(url) as engine:
        yield Side(middleware, db, engine, await judge_for(url))
        assert checked_out(engine.pool) == 0


@pytest.fixture
async def first(postgresql_url: str, judge_for: JudgeFor) -> AsyncIterator[Side]:
    """The first database: PostgreSQL."""
    async with open_side(FirstSession, postgresql_url, judge_for) as side:
        yield side


@pytest.fixture
async def second(sqlite_url: str, judge_for: JudgeFor) -> AsyncIterator[Side]:
    """The second database: SQLite."""
    async with open_side(SecondSession, sqlite_url, judge_for) as side:
        yield side


async def add(side: Side, note: str) -> None:
    """Write a note by the current unit of a database."""
    side.db.session.add(Note(text=note))
    await side.db.session.flush()


def app_of(*middlewares: Middleware, mounted: FastAPI | None = None) -> FastAPI:
    """Make an application, the outermost middleware first, with another application at /inner."""
    return FastAPI(middleware=list(middlewares), routes=[Mount("/inner", mounted)] if mounted else None)


# Pairs never meet.


@pytest.mark.parametrize("first_outside", [True, False])
async def test_two_pairs_in_one_request(first: Side, second: Side, *, first_outside: bool) -> None:
    """Each proxy reaches its own database and no other, whichever middleware is outside."""
    sides = [first, second] if first_outside else [second, first]
    app = app_of(*(side.mounted(commit_on_exit=True) for side in sides))

    @app.get("/")
    async def write() -> list[str]:
        assert first.db.unit is not second.db.unit
        assert first.db.engine is first.engine
        assert second.db.engine is second.engine
        await add(first, "first")
        await add(second, "second")
        return [type(side.db.session).__name__ for side in (first, second)]

    async with asgi_client(app) as client:
        assert (await client.get("/")).json() == ["FirstSession", "SecondSession"]
    assert await first.notes() == ["first"]
    assert await second.notes() == ["second"]


@pytest.mark.parametrize("first_outside", [True, False])
async def test_each_pair_keeps_its_own_arguments(first: Side, second: Side, *, first_outside: bool) -> None:
    """`commit_on_exit` and the session's arguments are the pair's own."""
    committing = first.mounted(commit_on_exit=True, session_args={"info": {"of": "first"}})
    reading = second.mounted(session_args={"info": {"of": "second"}})
    app = app_of(*((committing, reading) if first_outside else (reading, committing)))

    @app.get("/")
    async def write() -> list[object]:
        await add(first, "first")
        await second.db.session.scalar(select(1))
        return [first.db.session.info["of"], second.db.session.info["of"]]

    async with asgi_client(app) as client:
        assert (await client.get("/")).json() == ["first", "second"]
    assert await first.notes() == ["first"]


async def test_nested_units_of_two_pairs(first: Side, second: Side) -> None:
    """A unit of one pair leaves the other pair's current unit alone, whatever becomes of it."""
    first.db.bind(first.engine)
    second.db.bind(second.engine)
    async with first.db(commit_on_exit=True) as outer:
        with pytest.raises(MissingSessionError, match=r"SecondSession .* open `async with db\(\):`"):
            _ = second.db.session
        async with second.db(commit_on_exit=True) as inner:
            assert first.db.unit is outer
            assert second.db.unit is inner
            await add(first, "first")
            await add(second, "second")
        assert await second.notes() == ["second"]
        assert await first.notes() == []
        await outer.rollback()
    assert await first.notes() == []


def test_pairs_without_an_engine_say_which() -> None:
    """The error of an unbound proxy names its own session class."""
    proxies = [create_middleware_and_session_proxy(kind)[1] for kind in (FirstSession, SecondSession)]
    for db, name in zip(proxies, ("FirstSession", "SecondSession"), strict=True):
        with pytest.raises(SessionNotInitialisedError, match=rf"^{name} has no engine yet"):
            _ = db.session


@pytest.mark.parametrize("first_outside", [True, False])
async def test_mounted_application_with_a_pair_of_its_own(
    first: Side, second: Side, *, first_outside: bool
) -> None:
    """A mounted application reaches its own database and the outer one's; the outer routes only theirs."""
    outer, inner = (first, second) if first_outside else (second, first)
    mounted = app_of(inner.mounted(commit_on_exit=True))
    app = app_of(outer.mounted(commit_on_exit=True), mounted=mounted)

    @mounted.get("/")
    async def write() -> str:
        await add(inner, "inner")
        await add(outer, "outer")
        return "both"

    @app.get("/")
    async def read() -> str:
        assert await outer.db.session.scalar(select(Note.text)) == "outer"
        try:
            return str(inner.db.session)
        except MissingSessionError:
            return "one"

    async with asgi_client(app) as client:
        assert (await client.get("/inner/")).json() == "both"
        assert (await client.get("/")).json() == "one"
    assert await inner.notes() == ["inner"]
    assert await outer.notes() == ["outer"]


async def test_pair_mounted_twice_around_a_route(first: Side) -> None:
    """The same pair and engine outside and inside: the inner application has a unit of its own."""
    mounted = app_of(first.mounted(commit_on_exit=True))
    app = app_of(first.mounted(), mounted=mounted)

    @mounted.get("/")
    async def write() -> str:
        await add(first, "inner")
        return "inner"

    async with asgi_client(app) as client:
        assert (await client.get("/inner/")).json() == "inner"
    assert await first.notes() == ["inner"]


async def test_two_applications_in_one_process(first: Side, second: Side) -> None:
    """Applications with a pair each run side by side, in any order of start and stop."""
    apps = [app_of(side.mounted(commit_on_exit=True)) for side in (first, second)]
    for app, side in zip(apps, (first, second), strict=True):

        def route(side: Side = side) -> Any:
            async def write() -> str:
                await add(side, "mine")
                return "done"

            return write

        app.add_api_route("/", route())
    async with AsyncExitStack() as outlives:
        client_of_second = await outlives.enter_async_context(asgi_client(apps[1]))
        async with asgi_client(apps[0]) as client_of_first:
            assert (await client_of_first.get("/")).status_code == 200
        assert (await client_of_second.get("/")).status_code == 200
    assert await first.notes() == ["mine"]
    assert await second.notes() == ["mine"]


async def test_application_called_by_another(first: Side) -> None:
    """A request that one application makes to another in process has a unit of its own, on the same pair."""
    units: list[object] = []
    inner = app_of(first.mounted(commit_on_exit=True))
    outer = app_of(first.mounted())

    @inner.get("/")
    async def write() -> str:
        units.append(first.db.unit)
        await add(first, "by the inner application")
        return "done"

    async with asgi_client(inner) as client:

        @outer.get("/")
        async def call() -> str:
            units.append(first.db.unit)
            assert (await client.get("/")).json() == "done"
            assert first.db.unit is units[0]
            return "called"

        async with asgi_client(outer) as outer_client:
            assert (await outer_client.get("/")).json() == "called"
    assert units[0] is not units[1]
    assert await first.notes() == ["by the inner application"]


# One engine at a time.


async def test_same_engine_given_twice(first: Side) -> None:
    """Two applications may share a pair if they give it the same engine."""
    apps = [app_of(first.mounted()), app_of(first.mounted())]
    async with asgi_client(apps[0]), asgi_client(apps[1]), first.db() as unit:
        assert await unit.session.scalar(select(1)) == 1


@pytest.mark.parametrize("second_engine", ["db_url", "custom_engine"])
async def test_second_engine_on_a_live_proxy_is_refused(
    first: Side, sqlite_url: str, second_engine: str
) -> None:
    """An application with another engine for a pair in use does not start; the first one goes on."""
    given: dict[str, Any] = {second_engine: sqlite_url}
    if second_engine == "custom_engine":
        given["custom_engine"] = create_async_engine(sqlite_url)
    app = app_of(first.mounted())

    @app.get("/")
    async def read() -> object:
        return await first.db.session.scalar(select(1))

    other = app_of(Middleware(first.middleware, **given))
    async with asgi_client(app) as client:
        with pytest.raises(EngineAlreadyBoundError, match=r"^FirstSession \(postgresql.*its own pair"):
            await asgi_client(other).__aenter__()
        assert (await client.get("/")).json() == 1
        assert first.db.engine is first.engine


@pytest.mark.parametrize("owned", [True, False])
async def test_another_application_may_bind_after_the_shutdown(
    postgresql_url: str, sqlite_url: str, judge_for: JudgeFor, *, owned: bool
) -> None:
    """When the first application has shut down, another one may bring its own engine."""
    pooled: dict[str, Any] = {"poolclass": AsyncAdaptedQueuePool}
    pair: tuple[Any, SessionProxy[FirstSession]] = create_middleware_and_session_proxy(FirstSession)
    middleware, db = pair
    for url in (postgresql_url, sqlite_url, postgresql_url):
        async with engine_with_tables(url) as engine:
            ours = {"db_url": url, "engine_args": pooled} if owned else {"custom_engine": engine}
            app = app_of(Middleware(middleware, **ours))
            async with asgi_client(app):
                async with db(commit_on_exit=True) as unit:
                    await unit.session.execute(text("DELETE FROM note"))
                used = db.engine
                assert used.dialect.name == engine.dialect.name
            assert checked_in(used.pool) == (0 if owned else 1)


# Who commits first.


@pytest.fixture(params=itertools.permutations(["first", "second"]), ids=" in ".join)
def inner_and_outer(request: pytest.FixtureRequest, first: Side, second: Side) -> tuple[Side, Side]:
    """The two databases: the inner middleware's, then the outer one's; both ways round."""
    sides = {"first": first, "second": second}
    inner, outer = request.param
    return sides[inner], sides[outer]


def writing_app(inner: Side, outer: Side, *, failing: Side | None = None) -> FastAPI:
    """Make an application that writes to both databases; COMMIT fails on one of them, if named."""
    app = app_of(outer.mounted(commit_on_exit=True), inner.mounted(commit_on_exit=True))

    @app.get("/")
    async def write() -> str:
        for side, note in ((outer, "outer"), (inner, "inner")):
            await add(side, note)
            if side is failing:
                side.db.session.add(Reply(**ORPHAN))
        return "written"

    return app


async def test_inner_middleware_commits_first(inner_and_outer: tuple[Side, Side]) -> None:
    """When the outer database commits, the inner one's writes are already there."""
    inner, outer = inner_and_outer
    seen: list[object] = []
    app = writing_app(inner, outer)

    async def look(name: str) -> None:
        seen.append((name, await inner.notes(), await outer.notes()))

    @app.get("/watched")
    async def write() -> str:
        outer.db.unit.on_commit(lambda: look("outer"))
        inner.db.unit.on_commit(lambda: look("inner"))
        await add(outer, "outer")
        await add(inner, "inner")
        return "written"

    async with asgi_client(app) as client:
        assert (await client.get("/watched")).json() == "written"
    assert seen == [("inner", ["inner"], []), ("outer", ["inner"], ["outer"])]


async def test_partial_commit_answers_500(
    inner_and_outer: tuple[Side, Side], caplog: pytest.LogCaptureFixture
) -> None:
    """The outer COMMIT fails after the inner one: 500, and the log names both sides and the remedy."""
    inner, outer = inner_and_outer
    async with asgi_client(writing_app(inner, outer, failing=outer), raise_app_exceptions=False) as client:
        response = await client.get("/")
    assert (response.status_code, response.text) == (500, "Internal Server Error")
    assert await inner.notes() == ["inner"]
    assert await outer.notes() == []
    (complaint,) = complaints(caplog)
    assert complaint.startswith(f"ERROR: COMMIT failed on {name(outer)} (")
    assert f" after {name(inner)} (" in complaint
    assert "repair the committed side" in complaint


async def test_partial_commit_is_raised(inner_and_outer: tuple[Side, Side]) -> None:
    """The error that the server sees names both sides; its cause is the database's own error."""
    inner, outer = inner_and_outer
    async with asgi_client(writing_app(inner, outer, failing=outer)) as client:
        with pytest.raises(PartialCommitError, match="had committed: repair") as raised:
            await client.get("/")
    (committed,) = raised.value.committed
    assert committed.startswith(name(inner))
    assert raised.value.failed.startswith(name(outer))
    assert isinstance(raised.value.__cause__, IntegrityError)


async def test_handler_answers_for_a_partial_commit(inner_and_outer: tuple[Side, Side]) -> None:
    """A handler for PartialCommitError answers in place of the response whose commit failed."""
    inner, outer = inner_and_outer
    app = writing_app(inner, outer, failing=outer)

    @app.exception_handler(PartialCommitError)
    async def repair(request: Request, error: PartialCommitError) -> JSONResponse:
        return JSONResponse({"committed": error.committed, "failed": error.failed}, status_code=503)

    async with asgi_client(app) as client:
        response = await client.get("/")
    assert response.status_code == 503
    sides = response.json()
    assert [side.partition(" ")[0] for side in sides["committed"]] == [name(inner)]
    assert sides["failed"].startswith(name(outer))


async def test_inner_commit_fails(inner_and_outer: tuple[Side, Side]) -> None:
    """The inner COMMIT fails first: neither side has committed, and the error is the database's own."""
    inner, outer = inner_and_outer
    async with asgi_client(writing_app(inner, outer, failing=inner)) as client:
        with pytest.raises(IntegrityError, match=r"(?i)foreign key"):
            await client.get("/")
    assert await inner.notes() == []
    assert await outer.notes() == []


async def test_inner_commit_fails_and_a_handler_answers(inner_and_outer: tuple[Side, Side]) -> None:
    """A handler's answer for the inner failure commits nothing on the outer side, even with status 200."""
    inner, outer = inner_and_outer
    app = writing_app(inner, outer, failing=inner)

    @app.exception_handler(IntegrityError)
    async def answer(request: Request, error: IntegrityError) -> JSONResponse:
        return JSONResponse("conflict", status_code=409)

    async with asgi_client(app) as client:
        assert (await client.get("/")).status_code == 409
    assert await inner.notes() == []
    assert await outer.notes() == []


@pytest.mark.parametrize("inner_reads", [True, False])
async def test_inner_side_that_wrote_nothing_is_no_partial_commit(
    inner_and_outer: tuple[Side, Side], *, inner_reads: bool
) -> None:
    """Where the inner side only read, or was not used, a failing outer COMMIT is an ordinary failure."""
    inner, outer = inner_and_outer
    app = app_of(outer.mounted(commit_on_exit=True), inner.mounted(commit_on_exit=True))

    @app.get("/")
    async def write() -> str:
        if inner_reads:
            await inner.db.session.scalars(select(Note))
        outer.db.session.add(Reply(**ORPHAN))
        return "written"

    async with asgi_client(app) as client:
        with pytest.raises(IntegrityError, match=r"(?i)foreign key"):
            await client.get("/")


async def test_error_response_commits_neither_side(inner_and_outer: tuple[Side, Side]) -> None:
    """A route that fails rolls both databases back."""
    inner, outer = inner_and_outer
    app = app_of(outer.mounted(commit_on_exit=True), inner.mounted(commit_on_exit=True))

    @app.get("/")
    async def write() -> None:
        await add(outer, "outer")
        await add(inner, "inner")
        raise HTTPException(409)

    async with asgi_client(app) as client:
        assert (await client.get("/")).status_code == 409
    assert await inner.notes() == []
    assert await outer.notes() == []


async def test_third_database_names_all_that_have_committed(
    first: Side, second: Side, mariadb_url: str, judge_for: JudgeFor, caplog: pytest.LogCaptureFixture
) -> None:
    """With three databases the error names every side that had committed, the innermost first."""
    async with open_side(AsyncSession, mariadb_url, judge_for) as third:
        app = app_of(*(side.mounted(commit_on_exit=True) for side in (second, third, first)))

        @app.get("/")
        async def write() -> None:
            await add(first, "first")
            await add(third, "third")
            second.db.session.add(Reply(**ORPHAN))

        async with asgi_client(app) as client:
            with pytest.raises(
                PartialCommitError, match="had committed: repair the committed side"
            ) as raised:
                await client.get("/")
        names = [side.partition(" ")[0] for side in raised.value.committed]
        assert names == ["FirstSession", "AsyncSession"]
        assert await first.notes() == ["first"]
        assert await third.notes() == ["third"]


def name(side: Side) -> str:
    """Return how messages begin to name a database."""
    return "FirstSession" if side.engine.dialect.name == "postgresql" else "SecondSession"
