"""Two pairs in one application, on every combination of two databases and their drivers."""

import asyncio
import itertools
import re
import sys
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from attrs import Factory, define
from fastapi import BackgroundTasks, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from sqlalchemy import event, make_url, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from starlette.middleware import Middleware
from starlette.routing import BaseRoute, Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_async_sqlalchemy import (
    ConcurrentUseError,
    EngineAlreadyBoundError,
    MissingSessionError,
    PartialCommitError,
    SessionProxy,
    create_middleware_and_session_proxy,
)
from tests.support.databases import Judge, JudgeFor, fresh_database
from tests.support.gate import closed, gate_of, passing
from tests.support.interruption import Exchange, Interrupted, Moment
from tests.support.serving import asgi_client, raw_get, serve
from tests.support.site import checked_out, complaints
from tests.support.tables import ORPHAN, Note, Reply, engine_with_tables
from tests.support.versions import survives_cancellation

DRIVERS = {
    "postgresql": "postgresql+asyncpg",
    "aiomysql": "mysql+aiomysql",
    "asyncmy": "mysql+asyncmy",
    "sqlite": "sqlite+aiosqlite",
}
COMBINATIONS = list(itertools.product(DRIVERS, DRIVERS))
WITH_ASYNCMY = [kinds for kinds in COMBINATIONS if "asyncmy" in kinds]
ON_COMMIT = r"(?i)foreign key|lost connection|gone away"
"""What a database says of a COMMIT that `Side.break_commit` has broken."""
LATE = {"sqlite": {"connect_args": {"timeout": 30}}}
"""Engine arguments by kind for many writers: SQLite waits for a lock five seconds by default."""
REQUESTS = 50


class InnerSession(AsyncSession):
    """The session of the database whose middleware is inside."""


class OuterSession(AsyncSession):
    """The session of the database whose middleware is outside."""


class OutermostSession(AsyncSession):
    """The session of a third database, whose middleware is outside of both."""


@define(eq=False)
class Side:
    """One database of a test: its pair, its engine, and its judge."""

    session_class: type[AsyncSession]
    middleware: Any
    db: SessionProxy[AsyncSession]
    engine: AsyncEngine
    judge: Judge
    _judging: asyncio.Lock = Factory(asyncio.Lock)

    @property
    def label(self) -> str:
        """How messages begin to name the database."""
        url = self.engine.url
        return f"{self.session_class.__name__} ({url.drivername}:"

    def mounted(self, **options: Any) -> Middleware:
        """Return the pair's middleware for an application, committing."""
        return Middleware(
            self.middleware, **{"custom_engine": self.engine, "commit_on_exit": True, **options}
        )

    async def notes(self) -> list[object]:
        """Return the texts of the notes that are committed, in order."""
        return [note for (note,) in await self.judge.rows("SELECT text FROM note ORDER BY text")]

    async def add(self, note: str) -> None:
        """Write a note by the current unit."""
        self.db.session.add(Note(text=note))
        await self.db.session.flush()

    async def read(self) -> list[str]:
        """Read the notes by the current unit."""
        return list(await self.db.session.scalars(select(Note.text).order_by(Note.text)))

    def break_commit(self) -> None:
        """Make the COMMIT of the current unit fail: by a deferred constraint, or without its connection.

        MariaDB checks every constraint at its statement.
        """
        session = self.db.session
        if self.engine.dialect.name == "mysql":
            self.db.unit.before_commit(lambda: self._kill(session))
        else:
            session.add(Reply(**ORPHAN))

    async def _kill(self, session: AsyncSession) -> None:
        connection = await session.scalar(text("SELECT connection_id()"))
        listed = "SELECT id FROM information_schema.processlist WHERE id = :id"
        async with self._judging:
            await self.judge.execute(f"KILL {connection}")
            while await self.judge.scalar(listed, id=connection) is not None:
                pass


@define(eq=False)
class Pair:
    """The two databases, by the place of their middlewares."""

    inner: Side
    outer: Side

    @property
    def sides(self) -> tuple[Side, Side]:
        """Both, the inner one first."""
        return self.inner, self.outer

    def app(self, **options: Any) -> FastAPI:
        """Make an application with both middlewares."""
        return app_of(self.outer.mounted(), self.inner.mounted(), **options)

    async def add(self, note: str) -> None:
        """Write a note to both, by the current units."""
        for side in self.sides:
            await side.add(note)

    async def notes(self) -> tuple[list[object], list[object]]:
        """Return what is committed on the inner side, and on the outer one."""
        return await self.inner.notes(), await self.outer.notes()

    def checked_out(self) -> list[int]:
        """Return how many connections are out of the pool on each side."""
        return [checked_out(side.engine.pool) for side in self.sides]


def app_of(*middlewares: Middleware, **mounted: FastAPI) -> FastAPI:
    """Make an application, the outermost middleware first, with other applications at their names."""
    routes: list[BaseRoute] = [Mount(f"/{name}", app) for name, app in mounted.items()]
    return FastAPI(middleware=list(middlewares), routes=routes or None)


@asynccontextmanager
async def open_side(session_class: type[AsyncSession], url: str, judge_for: JudgeFor) -> AsyncGenerator[Side]:
    """Make a pair of its own for a database with tables; on exit no connection may be out."""
    middleware, db = create_middleware_and_session_proxy(session_class)
    kind = make_url(url)
    witness = url
    if kind.get_backend_name() == "mysql":  # the judge must not depend on the driver under test
        witness = kind.set(drivername=DRIVERS["aiomysql"]).render_as_string(hide_password=False)
    async with engine_with_tables(url, **LATE.get(kind.get_backend_name(), {})) as engine:
        yield Side(session_class, middleware, db, engine, await judge_for(witness))
        assert checked_out(engine.pool) == 0


@pytest.fixture
def new_url(request: pytest.FixtureRequest, databases: ExitStack, tmp_path: Path) -> Callable[[str], str]:
    """A function that makes an empty database for a driver, another one at each call."""
    files = (tmp_path / f"{number}.db" for number in itertools.count())

    def make(kind: str) -> str:
        if kind == "sqlite":
            return f"sqlite+aiosqlite:///{next(files)}"
        server = request.getfixturevalue("postgresql_server" if kind == "postgresql" else "mariadb_server")
        url = make_url(databases.enter_context(fresh_database(server)))
        return url.set(drivername=DRIVERS[kind]).render_as_string(hide_password=False)

    return make


@pytest.fixture
def urls(kinds: tuple[str, ...], new_url: Callable[[str], str]) -> list[str]:
    """An empty database for each of the drivers that the test is given."""
    return [new_url(kind) for kind in kinds]


@pytest.fixture
async def pair(urls: list[str], judge_for: JudgeFor) -> AsyncIterator[Pair]:
    """The two databases."""
    async with (
        open_side(InnerSession, urls[0], judge_for) as inner,
        open_side(OuterSession, urls[1], judge_for) as outer,
    ):
        yield Pair(inner, outer)


@pytest.fixture
async def bound(pair: Pair) -> AsyncIterator[Pair]:
    """The two databases, in use without an application."""
    for side in pair.sides:
        side.db.bind(side.engine)
    yield pair
    for side in pair.sides:
        side.db.unbind()


def id_of(kinds: tuple[str, ...]) -> str:
    """Name a combination, the innermost first."""
    return " in ".join(kinds)


lost_by_wait_for = pytest.mark.xfail(
    sys.version_info < (3, 12),
    strict=True,
    reason="asyncmy connects by asyncio.wait_for, which loses a late cancellation; so does plain SQLAlchemy",
)
every_combination = pytest.mark.parametrize("kinds", COMBINATIONS, ids=id_of)


# Each has its own, and they share the request's fate.


@every_combination
async def test_both_commit(pair: Pair) -> None:
    """A 2xx commits both, each by its own session on its own pool; the inner middleware's is first."""
    app, seen = pair.app(), list[object]()

    @app.post("/", status_code=201)
    async def write() -> list[str]:
        for side in (pair.outer, pair.inner):
            side.db.unit.on_commit(partial(look, side))
        await pair.add("both")
        assert pair.checked_out() == [1, 1]
        assert [side.db.engine for side in pair.sides] == [side.engine for side in pair.sides]
        return [type(side.db.session).__name__ for side in pair.sides]

    async def look(side: Side) -> None:
        seen.append((side.label, *await pair.notes()))

    async with asgi_client(app) as client:
        response = await client.post("/")
    assert (response.status_code, response.json()) == (201, ["InnerSession", "OuterSession"])
    assert seen == [(pair.inner.label, ["both"], []), (pair.outer.label, ["both"], ["both"])]
    assert pair.checked_out() == [0, 0]


@every_combination
@pytest.mark.parametrize("way", ["returned", "raised", "crashed", "mapped"])
async def test_both_roll_back(pair: Pair, way: str) -> None:
    """A status from 400 on, an error, and an error that a handler answers with 200 undo both."""
    app = pair.app()

    @app.get("/")
    async def fail() -> JSONResponse:
        await pair.add("neither")
        if way == "returned":
            return JSONResponse("no", status_code=422)
        if way == "raised":
            raise HTTPException(409)
        raise ZeroDivisionError if way == "crashed" else LookupError

    @app.exception_handler(LookupError)
    async def answer(request: Request, error: LookupError) -> JSONResponse:
        return JSONResponse("nothing found", status_code=200)

    async with asgi_client(app, raise_app_exceptions=False) as client:
        status = (await client.get("/")).status_code
    assert status == {"returned": 422, "raised": 409, "crashed": 500, "mapped": 200}[way]
    assert await pair.notes() == ([], [])


@every_combination
async def test_untouched_database_gets_no_connection(pair: Pair) -> None:
    """A request that uses one database, or none, checks nothing out of the other's pool."""
    app, used = pair.app(), list[Side]()

    def note(side: Side, *_: object) -> None:
        used.append(side)

    for side in pair.sides:
        event.listen(side.engine.sync_engine, "checkout", partial(note, side))

    @app.get("/{name}")
    async def write(name: str) -> str:
        for side in pair.sides:
            if side.session_class.__name__ == name:
                await side.add("mine")
        return "done"

    async with asgi_client(app) as client:
        for name, expected in (("none", []), ("InnerSession", [pair.inner]), ("OuterSession", [pair.outer])):
            used.clear()
            assert (await client.get(f"/{name}")).status_code == 200
            assert used == expected
    assert await pair.notes() == (["mine"], ["mine"])


@every_combination
async def test_each_pair_keeps_its_own_arguments(pair: Pair) -> None:
    """One side commits on exit and the other does not, whichever is inside."""

    def route(committing: Side, reading: Side) -> Callable[[], Awaitable[list[str]]]:
        async def write() -> list[str]:
            await committing.add("committed")
            await reading.read()
            return [side.db.session.info["of"] for side in pair.sides]

        return write

    for committing, reading in (pair.sides, pair.sides[::-1]):
        inner, outer = (
            side.mounted(commit_on_exit=side is committing, session_args={"info": {"of": side.label}})
            for side in pair.sides
        )
        app = app_of(outer, inner)
        app.add_api_route("/", route(committing, reading))
        async with asgi_client(app) as client:
            assert (await client.get("/")).json() == [side.label for side in pair.sides]
    assert await pair.notes() == (["committed"], ["committed"])


@every_combination
async def test_second_engine_on_a_live_proxy_is_refused(pair: Pair) -> None:
    """The other side's engine is refused while a proxy has its own, which goes on serving."""
    app = pair.app()

    @app.get("/")
    async def write() -> str:
        await pair.add("both")
        return "done"

    async with asgi_client(app) as client:
        for side, other in (pair.sides, pair.sides[::-1]):
            with pytest.raises(
                EngineAlreadyBoundError, match=rf"^{side.session_class.__name__} .*its own pair"
            ):
                side.db.bind(other.engine)
            with pytest.raises(
                EngineAlreadyBoundError, match=rf"^{side.session_class.__name__} .*its own pair"
            ):
                await asgi_client(app_of(side.mounted(custom_engine=other.engine))).__aenter__()
        assert (await client.get("/")).status_code == 200
    assert await pair.notes() == (["both"], ["both"])


# A COMMIT fails.


def breaking_app(pair: Pair, broken: Side, **options: Any) -> FastAPI:
    """Make an application that writes to both; COMMIT fails on one side."""
    app = pair.app(**options)

    @app.get("/")
    async def write() -> str:
        await pair.add("note")
        broken.break_commit()
        return "written"

    return app


@every_combination
@pytest.mark.parametrize("status", [409, 200])
async def test_inner_commit_fails(pair: Pair, status: int) -> None:
    """The inner COMMIT fails: nothing is committed anywhere, whatever the handler's answer."""
    app = breaking_app(pair, pair.inner)

    @app.exception_handler(DBAPIError)
    async def answer(request: Request, error: DBAPIError) -> JSONResponse:
        return JSONResponse("refused", status_code=status)

    async with asgi_client(app) as client:
        response = await client.get("/")
    assert (response.status_code, response.json()) == (status, "refused")
    assert await pair.notes() == ([], [])


@every_combination
async def test_inner_commit_fails_and_nobody_answers(pair: Pair) -> None:
    """Without a handler the inner side's own error reaches the server; nothing is committed anywhere."""
    async with asgi_client(breaking_app(pair, pair.inner)) as client:
        with pytest.raises(DBAPIError, match=ON_COMMIT):
            await client.get("/")
    assert await pair.notes() == ([], [])


@every_combination
async def test_outer_commit_fails(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    """The outer COMMIT fails after the inner one: the error and the log name both sides, in this order."""
    async with asgi_client(breaking_app(pair, pair.outer)) as client:
        with pytest.raises(PartialCommitError, match="had committed: repair") as raised:
            await client.get("/")
    error = raised.value
    (committed,) = error.committed
    assert committed.startswith(pair.inner.label)
    assert error.failed.startswith(pair.outer.label)
    assert isinstance(error.__cause__, DBAPIError)
    assert f"ERROR: COMMIT failed on {error.failed} after {committed} had committed" in str(
        complaints(caplog)
    )
    assert await pair.notes() == (["note"], [])


@every_combination
async def test_response_of_a_partial_commit(pair: Pair) -> None:
    """The client of a partial commit gets 500, or what a handler makes of the error; never the 2xx."""
    async with asgi_client(breaking_app(pair, pair.outer), raise_app_exceptions=False) as client:
        response = await client.get("/")
    assert (response.status_code, response.text) == (500, "Internal Server Error")
    assert await pair.notes() == (["note"], [])
    await pair.inner.judge.execute("DELETE FROM note")
    app = breaking_app(pair, pair.outer)

    @app.exception_handler(PartialCommitError)
    async def repair(request: Request, error: PartialCommitError) -> JSONResponse:
        async with pair.inner.db(commit_on_exit=True) as unit:
            await unit.session.execute(text("DELETE FROM note"))
        return JSONResponse([*error.committed, error.failed], status_code=503)

    async with asgi_client(app) as client:
        response = await client.get("/")
    assert response.status_code == 503
    for side, name in zip(pair.sides, response.json(), strict=True):
        assert name.startswith(side.label)
    assert await pair.notes() == ([], [])


@every_combination
@pytest.mark.parametrize("inner", ["read", "untouched"])
async def test_outer_commit_fails_alone(pair: Pair, inner: str) -> None:
    """Where the inner side wrote nothing, a failing outer COMMIT is the database's plain error."""
    app = pair.app()

    @app.get("/")
    async def write() -> str:
        if inner == "read":
            await pair.inner.read()
        await pair.outer.add("note")
        pair.outer.break_commit()
        return "written"

    async with asgi_client(app) as client:
        with pytest.raises(DBAPIError, match=ON_COMMIT):
            await client.get("/")
    assert await pair.notes() == ([], [])


@every_combination
@pytest.mark.parametrize("commit_on_exit", [True, False])
async def test_commit_by_hand_counts_as_committed(pair: Pair, *, commit_on_exit: bool) -> None:
    """An inner side whose route committed by hand is named, too, when the outer COMMIT fails."""
    app = app_of(pair.outer.mounted(), pair.inner.mounted(commit_on_exit=commit_on_exit))

    @app.get("/")
    async def write() -> str:
        await pair.inner.add("note")
        await pair.inner.db.session.commit()
        await pair.outer.add("note")
        pair.outer.break_commit()
        return "written"

    async with asgi_client(app) as client:
        with pytest.raises(PartialCommitError, match="had committed: repair") as raised:
            await client.get("/")
    assert [name.partition(" ")[0] for name in raised.value.committed] == ["InnerSession"]
    assert await pair.notes() == (["note"], [])


class CopiesTheScope:
    """A middleware that hands a copy of the scope on, as some do in order to add to it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application."""
        await self.app({**scope}, receive, send)


@every_combination
async def test_partial_commit_through_a_copied_scope(pair: Pair) -> None:
    """A middleware between the two that copies the scope does not hide the inner side's COMMIT."""
    app = app_of(pair.outer.mounted(), Middleware(CopiesTheScope), pair.inner.mounted())

    @app.get("/")
    async def write() -> str:
        await pair.add("note")
        pair.outer.break_commit()
        return "written"

    async with asgi_client(app) as client:
        with pytest.raises(PartialCommitError, match="had committed: repair"):
            await client.get("/")
    assert await pair.notes() == (["note"], [])


@pytest.mark.parametrize("kinds", [(*DRIVERS, *DRIVERS)[start : start + 3] for start in range(4)], ids=id_of)
@pytest.mark.parametrize("broken", ["middle", "outermost"])
async def test_three_pairs(urls: list[str], judge_for: JudgeFor, broken: str) -> None:
    """With three pairs the error names all that have committed, the innermost first, and one that failed."""
    async with AsyncExitStack() as stack:
        classes = (InnerSession, OuterSession, OutermostSession)
        sides = [
            await stack.enter_async_context(open_side(class_, url, judge_for))
            for class_, url in zip(classes, urls, strict=True)
        ]
        failing = sides[1 if broken == "middle" else 2]
        app = app_of(*(side.mounted() for side in reversed(sides)))

        @app.get("/")
        async def write() -> None:
            for side in sides:
                await side.add("note")
            failing.break_commit()

        async with asgi_client(app) as client:
            with pytest.raises(PartialCommitError, match="had committed: repair") as raised:
                await client.get("/")
        count = sides.index(failing)
        assert raised.value.failed.startswith(failing.label)
        assert len(raised.value.committed) == count
        for name, side in zip(raised.value.committed, sides, strict=False):
            assert name.startswith(side.label)
        assert [await side.notes() for side in sides] == [["note"]] * count + [[]] * (3 - count)


# Mounted applications, and several in one process.


@every_combination
async def test_both_pairs_on_a_mounted_application_too(pair: Pair) -> None:
    """A mounted application with both pairs the other way round has its own units and its own order."""
    sub = app_of(pair.inner.mounted(), pair.outer.mounted())
    app, order = pair.app(sub=sub), list[str]()

    async def write(broken: bool = False) -> str:  # noqa: FBT001, FBT002  # a query parameter
        for side in pair.sides:
            side.db.unit.on_commit(partial(order.append, side.session_class.__name__))
        await pair.add(f"note {len(order)}")
        if broken:
            pair.inner.break_commit()  # in the mounted application the outer one
        return "written"

    app.add_api_route("/", write)
    sub.add_api_route("/", write)

    @sub.exception_handler(PartialCommitError)
    async def answer(request: Request, error: PartialCommitError) -> JSONResponse:
        return JSONResponse([*error.committed, error.failed], status_code=503)

    async with asgi_client(app) as client:
        assert (await client.get("/")).json() == "written"
        assert (await client.get("/sub/")).json() == "written"
        response = await client.get("/sub/?broken=true")
    assert order == ["InnerSession", "OuterSession", "OuterSession", "InnerSession", "OuterSession"]
    assert response.status_code == 503
    assert [name.partition(" ")[0] for name in response.json()] == ["OuterSession", "InnerSession"]
    assert await pair.notes() == (["note 0", "note 2"], ["note 0", "note 2", "note 4"])


@every_combination
async def test_mounted_applications_with_a_pair_each(bound: Pair) -> None:
    """Mounted side by side, each application reaches its own database and is told that it has no other."""
    apps = {"inner": app_of(bound.inner.mounted()), "outer": app_of(bound.outer.mounted())}
    for app, side, other in zip(apps.values(), bound.sides, bound.sides[::-1], strict=True):

        def route(side: Side = side, other: Side = other) -> Callable[[], Awaitable[str]]:
            async def write() -> str:
                await side.add("mine")
                with pytest.raises(MissingSessionError, match=other.session_class.__name__):
                    _ = other.db.session
                return "written"

            return write

        app.add_api_route("/", route())
    async with asgi_client(app_of(**apps)) as client:
        for name in apps:
            assert (await client.get(f"/{name}/")).json() == "written"
    assert await bound.notes() == (["mine"], ["mine"])


@every_combination
async def test_two_applications_with_both_pairs(pair: Pair) -> None:
    """Two applications share both pairs, in another order each; one goes on when the other has stopped."""
    apps = {"first": pair.app(), "second": app_of(pair.inner.mounted(), pair.outer.mounted())}
    order: dict[str, list[str]] = {name: [] for name in apps}
    for name, app in apps.items():

        def route(name: str = name) -> Callable[[], Awaitable[str]]:
            async def write() -> str:
                for side in pair.sides:
                    side.db.unit.on_commit(partial(order[name].append, side.session_class.__name__))
                await pair.add(f"{name} {len(order[name])}")
                return "written"

            return write

        app.add_api_route("/", route())
    async with asgi_client(apps["second"]) as second:
        async with asgi_client(apps["first"]) as first:
            responses = [*await asyncio.gather(first.get("/"), second.get("/"))]
        responses.append(await second.get("/"))
    assert [response.status_code for response in responses] == [200] * 3
    assert order["first"] == ["InnerSession", "OuterSession"]
    assert order["second"] == ["OuterSession", "InnerSession"] * 2
    assert await pair.notes() == (["first 0", "second 0", "second 2"],) * 2


# Units beside a request's.


@every_combination
async def test_nested_explicit_units(bound: Pair) -> None:
    """Of two nested blocks each has its own outcome; an error undoes those that it leaves."""
    inner, outer = bound.inner.db, bound.outer.db
    async with outer(commit_on_exit=True) as around:
        async with inner(commit_on_exit=True) as within:
            assert (outer.unit, inner.unit) == (around, within)
            await bound.add("1 both")
        assert await bound.notes() == (["1 both"], [])

    async def write(note: str, broken: Side | None = None, error: Exception | None = None) -> None:
        async with inner(commit_on_exit=True):
            await bound.add(note)
            if broken is not None:
                broken.break_commit()
            if error is not None:
                raise error

    async with outer(commit_on_exit=True):
        with pytest.raises(LookupError, match="inside"):
            await write("2 outer", error=LookupError("inside"))
    with pytest.raises(LookupError, match="after"):  # noqa: PT012  # the block that the error leaves
        async with outer(commit_on_exit=True):
            await write("3 inner")
            message = "after"
            raise LookupError(message)
    with pytest.raises(DBAPIError, match=ON_COMMIT):  # likewise
        async with outer(commit_on_exit=True):
            await write("4 neither", broken=bound.inner)
    assert await bound.notes() == (["1 both", "3 inner"], ["1 both", "2 outer"])
    assert bound.checked_out() == [0, 0]


@every_combination
@pytest.mark.parametrize("gathering", ["inner", "outer"])
async def test_gather_on_one_while_the_other_is_open(pair: Pair, gathering: str) -> None:
    """Gathered units of one database have outcomes of their own; the other's open unit is theirs to see."""
    app = pair.app()
    many, one = pair.sides if gathering == "inner" else pair.sides[::-1]

    async def work(number: int, unit: object) -> int:
        assert one.db.unit is unit
        await many.add(f"gathered {number}")
        if number == 1:
            raise LookupError
        return number

    @app.get("/")
    async def write() -> list[str]:
        await one.add("open")
        unit = one.db.unit
        results = await many.db.gather(
            *(work(number, unit) for number in range(4)), max_concurrent=2, return_exceptions=True
        )
        assert await one.read() == ["open"]
        return [repr(result) for result in results]

    async with asgi_client(app) as client:
        assert (await client.get("/")).json() == ["0", "LookupError()", "2", "3"]
    assert await one.notes() == ["open"]
    assert await many.notes() == ["gathered 0", "gathered 2", "gathered 3"]


@pytest.mark.parametrize("kinds", [("sqlite", "postgresql"), ("postgresql", "aiomysql")], ids=id_of)
async def test_gathered_on_one_share_the_other(bound: Pair) -> None:
    """Gathered units of one database that use the other's session at once are refused by the other's name."""
    inner, outer = bound.sides
    gate = gate_of(outer.engine, outer.judge)

    async def wait() -> None:
        await inner.read()
        await outer.db.session.execute(passing(gate))

    async def intrude() -> None:
        await inner.read()
        await gate.reached()
        try:
            await outer.read()
        finally:
            await gate.open()

    async with outer.db(), closed(gate):
        nobody, refused = await inner.db.gather(wait(), intrude(), return_exceptions=True)
    assert nobody is None
    assert isinstance(refused, ConcurrentUseError)
    named = (
        rf"^task '.+' called execute\(\) on a session of {re.escape(outer.label)}.+\) on which task '.+' is "
    )
    assert re.match(named, str(refused))
    assert inner.label not in str(refused)


# The tail of a request.


@every_combination
async def test_stream_and_background_task_use_both(pair: Pair) -> None:
    """What a stream and a background task write to both is committed when the application returns."""
    app = pair.app()

    @app.get("/")
    async def write(tasks: BackgroundTasks) -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            assert await pair.notes() == (["1 head"], ["1 head"])
            assert pair.checked_out() == [0, 0]
            yield b"some"
            await pair.add("2 stream")
            yield b"thing"

        await pair.add("1 head")
        tasks.add_task(pair.add, "3 task")
        return StreamingResponse(chunks(), background=tasks)

    async with asgi_client(app) as client:
        assert (await client.get("/")).text == "something"
    assert await pair.notes() == (["1 head", "2 stream", "3 task"],) * 2


@every_combination
async def test_failing_tail_undoes_its_own_part_of_both(pair: Pair) -> None:
    """A background task that fails loses the tail on both sides; what the client was told of stays."""
    app = pair.app()

    async def fail() -> None:
        await pair.add("2 task")
        raise LookupError

    @app.get("/")
    async def write(tasks: BackgroundTasks) -> str:
        await pair.add("1 head")
        tasks.add_task(fail)
        return "written"

    async with asgi_client(app, raise_app_exceptions=False) as client:
        assert (await client.get("/")).status_code == 200
    assert await pair.notes() == (["1 head"], ["1 head"])


@every_combination
@pytest.mark.parametrize("broken", ["inner", "outer"])
async def test_commit_of_the_tail_fails(pair: Pair, broken: str, caplog: pytest.LogCaptureFixture) -> None:
    """A tail's COMMIT that fails is logged with its side; the inner side's failure undoes the outer tail."""
    app = pair.app()
    failing = pair.inner if broken == "inner" else pair.outer

    async def write_more() -> None:
        await pair.add("2 task")
        failing.break_commit()

    @app.get("/")
    async def write(tasks: BackgroundTasks) -> str:
        await pair.add("1 head")
        tasks.add_task(write_more)
        return "written"

    async with asgi_client(app, raise_app_exceptions=False) as client:
        assert (await client.get("/")).status_code == 200
    inner = ["1 head"] if broken == "inner" else ["1 head", "2 task"]
    assert await pair.notes() == (inner, ["1 head"])
    said = [text for text in complaints(caplog) if text.startswith(f"ERROR: COMMIT on {failing.label}")]
    assert "failed after the response had started" in said[-1]


@every_combination
async def test_partial_commit_of_the_tail(pair: Pair) -> None:
    """The outer side's COMMIT of the tail fails after the inner side's: the error names both, too."""
    app = pair.app()

    async def write_more() -> None:
        await pair.add("note")
        pair.outer.break_commit()

    @app.get("/")
    async def write(tasks: BackgroundTasks) -> str:
        tasks.add_task(write_more)
        return "written"

    async with asgi_client(app) as client:
        with pytest.raises(PartialCommitError, match="had committed: repair"):
            await client.get("/")
    assert await pair.notes() == (["note"], [])


# Many at once, and cut off.


@every_combination
async def test_concurrent_requests_that_partly_fail(pair: Pair) -> None:
    """Of many concurrent requests each side holds what was acknowledged, and what was reported as partial."""
    app = pair.app(debug=True)  # whose answers tell their errors

    @app.get("/{number}")
    async def write(number: int) -> str:
        await pair.add(f"{number:02}")
        if number % 5 == 1:
            raise HTTPException(409)
        if number % 5 == 2:
            pair.outer.break_commit()
        if number % 5 == 3:
            pair.inner.break_commit()
        return "written"

    @app.exception_handler(PartialCommitError)
    async def partial(request: Request, error: PartialCommitError) -> PlainTextResponse:
        return PlainTextResponse(error.committed[0], status_code=503)

    async with asgi_client(app, raise_app_exceptions=False) as client:
        responses = await asyncio.gather(*(client.get(f"/{number}") for number in range(REQUESTS)))
    statuses = [response.status_code for response in responses]
    errors = Counter(response.text[-500:] for response in responses if response.status_code == 500)
    assert Counter(statuses) == {200: 20, 409: 10, 503: 10, 500: 10}, errors
    acknowledged = [f"{number:02}" for number, status in enumerate(statuses) if status == 200]
    partly = [f"{number:02}" for number, status in enumerate(statuses) if status == 503]
    assert await pair.notes() == (sorted(acknowledged + partly), acknowledged)
    assert pair.checked_out() == [0, 0]


@survives_cancellation
@every_combination
@pytest.mark.parametrize("waiting", ["inner", "outer"])
async def test_cancelled_in_a_statement(pair: Pair, waiting: str) -> None:
    """A request that is cancelled in a statement on one side is rolled back on both; the pools are whole."""
    app = pair.app()
    side = pair.inner if waiting == "inner" else pair.outer
    gate = gate_of(side.engine, side.judge)
    await side.engine.dispose()

    @app.get("/{name}")
    async def write(name: str) -> list[list[str]]:
        await pair.add(name)
        if name == "cancelled":
            await side.db.session.execute(passing(gate))
        return [await side.read() for side in pair.sides]

    async with asgi_client(app) as client, closed(gate):
        request = asyncio.create_task(client.get("/cancelled"))
        await gate.reached()
        request.cancel()
        if side.engine.dialect.name == "sqlite":  # its statement must end before its connection can be closed
            await gate.open()
        with pytest.raises(asyncio.CancelledError, match=r"^$"):
            await request
        assert pair.checked_out() == [0, 0]
        await gate.open()
        for name in ("1", "2"):
            assert (await client.get(f"/{name}")).status_code == 200
    assert await pair.notes() == (["1", "2"], ["1", "2"])


# asyncmy, cut off anywhere.


@survives_cancellation
@pytest.mark.parametrize("moment", ["waiting", "done"])
@pytest.mark.parametrize("kinds", WITH_ASYNCMY, ids=id_of)
async def test_cancelled_at_every_suspension(
    pair: Pair, moment: Moment, caplog: pytest.LogCaptureFixture
) -> None:
    """Cancelled anywhere, COMMIT included, each side has all or nothing, and its connections are clean."""
    app = pair.app()

    @app.get("/{name}")
    async def write(name: str) -> list[list[str]]:
        for note in (f"{name} a", f"{name} b"):
            await pair.add(note)
        return [[note for note in await side.read() if note.startswith(f"{name} ")] for side in pair.sides]

    async with asgi_client(app) as client:
        for point in itertools.count(1):
            for name in (f"before{point}", f"after{point}"):
                mine = [f"{name} a", f"{name} b"]
                if name.startswith("after"):
                    exchange, cancelled = await cancelled_at(app, f"/cut{point}", point, moment)
                    assert pair.checked_out() == [0, 0], point
                    await judge_attempt(pair, f"cut{point}", acknowledged=exchange.status == 200)
                    if not cancelled:
                        assert exchange.status == 200
                        assert point > 10
                        assert "COMMIT on" in caplog.text
                        return
                assert (await client.get(f"/{name}")).json() == [mine, mine], point


async def judge_attempt(pair: Pair, name: str, *, acknowledged: bool) -> None:
    """Look at what a request that was cut off has left: the inner side is never behind the outer one."""
    mine = {f"{name} a", f"{name} b"}
    inner, outer = [mine & set(notes) for notes in await pair.notes()]
    assert inner in (set(), mine), name
    assert outer in (set(), inner), name
    assert not acknowledged or outer == mine, name


async def cancelled_at(app: FastAPI, path: str, point: int, moment: Moment) -> tuple[Exchange, bool]:
    """Call an application and cancel it at one of its suspensions, if it has so many."""
    exchange, interrupted = Exchange(path), list[Interrupted[None]]()

    async def call() -> None:
        cancel = task.cancel
        interrupted.append(Interrupted(exchange.call(app), {point}, cancel, moment))
        await interrupted[0]

    task = asyncio.create_task(call())
    await asyncio.wait({task})
    assert task.cancelled() == (interrupted[0].cancellations > 0), point
    return exchange, task.cancelled()


@survives_cancellation
@pytest.mark.parametrize("moment", ["waiting", pytest.param("done", marks=lost_by_wait_for)])
@pytest.mark.parametrize("kinds", [("asyncmy", "asyncmy")], ids=id_of)
async def test_cancelled_while_connecting(pair: Pair, moment: Moment) -> None:
    """A request that is cancelled while asyncmy connects ends at once, and the next one is served."""
    app = pair.app()

    @app.get("/{name}")
    async def write(name: str) -> str:
        await pair.add(name)
        return name

    async with asgi_client(app) as client:
        for side in pair.sides:
            await side.engine.dispose()
        await cancelled_at(app, "/cut", 1, moment)
        assert pair.checked_out() == [0, 0]
        assert (await client.get("/next")).json() == "next"
    assert await pair.notes() == (["next"], ["next"])


class TellsTheEnd:
    """A middleware that tells when the application has returned from a request."""

    def __init__(self, app: ASGIApp, ended: asyncio.Event) -> None:
        self.app = app
        self.ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application, and tell when it has returned."""
        try:
            await self.app(scope, receive, send)
        finally:
            if scope["type"] == "http":
                self.ended.set()


@survives_cancellation
@pytest.mark.parametrize("kinds", WITH_ASYNCMY, ids=id_of)
async def test_client_leaves_in_a_statement(pair: Pair) -> None:
    """A client that leaves a stream in asyncmy's statement loses both tails, and no connection."""
    ended = asyncio.Event()
    app = app_of(Middleware(TellsTheEnd, ended=ended), pair.outer.mounted(), pair.inner.mounted())
    side = next(side for side in pair.sides if side.engine.driver == "asyncmy")
    gate = gate_of(side.engine, side.judge)

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            yield b"first"
            await pair.add("2 tail")
            await side.db.session.execute(passing(gate))

        await pair.add("1 head")
        return StreamingResponse(chunks())

    @app.get("/next")
    async def read() -> list[list[str]]:
        return [await side.read() for side in pair.sides]

    async with serve(app) as address:
        async with closed(gate), raw_get(address, "/stream") as response:
            await response.until(b"first")
            await gate.reached()
            response.cut()
            await ended.wait()
            assert pair.checked_out() == [0, 0]
        async with raw_get(address, "/next") as response:
            assert (await response.rest()).endswith(b'[["1 head"],["1 head"]]')
    assert await pair.notes() == (["1 head"], ["1 head"])
