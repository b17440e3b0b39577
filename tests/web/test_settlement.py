"""What others do while a response's start is settled: the body's own task, inner middlewares, handlers."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from attrs import Factory, define
from fastapi import BackgroundTasks, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from sqlalchemy import event, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import await_only
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_async_sqlalchemy import ConcurrentUseError, PartialCommitError
from tests.support.gate import closed, gate_of, passing
from tests.support.serving import raw_get, serve
from tests.support.site import MakeSite, Site, complaints
from tests.support.tables import ORPHAN, Note, Reply
from tests.support.versions import survives_cancellation

Body = Callable[[], AsyncIterator[str]]


async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
    """Do nothing, from another task, as every BaseHTTPMiddleware does."""
    return await call_next(request)


BELOW = [Middleware(BaseHTTPMiddleware, dispatch=pass_on)]
"""What is inside of the pair's middleware where a body has a task of its own."""
WAYS: dict[str, list[Middleware]] = {"server-sent events": [], "below a BaseHTTPMiddleware": BELOW}
"""How a body comes to a task of its own; and the middlewares inside of the pair's."""
ways = pytest.mark.parametrize("way", WAYS)


def add_stream(site: Site, way: str, body: Body, use: Callable[[], Any]) -> None:
    """Add the route `/` whose body has a task of its own; a dependency uses the session before."""

    async def used() -> None:  # an older FastAPI takes a partial of a coroutine function for a plain one
        await use()

    if WAYS[way]:

        async def stream() -> Response:
            return StreamingResponse(body())

        site.app.add_api_route("/", stream, dependencies=[Depends(used)])
        return
    sse: Any = pytest.importorskip("fastapi.sse", reason="the installed FastAPI has no server-sent events")

    async def events() -> AsyncIterator[str]:
        async for line in body():
            yield line

    site.app.add_api_route("/", events, response_class=sse.EventSourceResponse, dependencies=[Depends(used)])


async def count(site: Site) -> int | None:
    """Count the notes by the current unit."""
    found: int | None = await site.db.session.scalar(select(func.count()).select_from(Note))
    return found  # SQLAlchemy 2.0's types know it as Any


async def write(site: Site, text: str) -> None:
    """Write a note by the current unit."""
    site.db.session.add(Note(text=text))
    await site.db.session.flush()


@define(eq=False)
class Pause:
    """Keeps the next COMMIT or ROLLBACK of an engine from being sent until it is let go."""

    begun: asyncio.Event = Factory(asyncio.Event)
    go: asyncio.Event = Factory(asyncio.Event)

    def hold_next(self, engine: AsyncEngine) -> None:
        """From now on, hold the first one up."""
        for name in ("commit", "rollback"):
            event.listen(engine.sync_engine, name, self._hold)

    def _hold(self, connection: object) -> None:
        if not self.begun.is_set():
            self.begun.set()
            await_only(self.go.wait())


@ways
@pytest.mark.parametrize("before", ["read", "written"])
@pytest.mark.parametrize("commit_on_exit", [True, False])
async def test_body_reads_while_its_start_is_settled(
    make_site: MakeSite,
    database_url: str,
    caplog: pytest.LogCaptureFixture,
    way: str,
    before: str,
    *,
    commit_on_exit: bool,
) -> None:
    """A statement of the body's own task waits for the settlement that is under way; the stream is whole."""
    site = await make_site(database_url, inside=WAYS[way], commit_on_exit=commit_on_exit)
    pause, stored = Pause(), list[object]()
    head = ["head"] if before == "written" else []

    async def use() -> None:
        for note in head:
            await write(site, note)
            if not commit_on_exit:
                await site.db.session.commit()
        await count(site)
        pause.hold_next(site.engine)

    async def body() -> AsyncIterator[str]:
        await pause.begun.wait()
        pause.go.set()
        for _ in range(3):
            yield f"rows: {await count(site)}"
            stored.append(await site.notes())

    add_stream(site, way, body, use)
    response = await site.get()
    assert response.status_code == 200
    assert response.text.count(f"rows: {len(head)}") == 3
    assert stored == [head] * 3
    assert complaints(caplog) == []


@ways
@pytest.mark.parametrize("then", ["nothing", "a read", "a write"])
async def test_body_adds_while_its_start_is_committed(
    make_site: MakeSite, database_url: str, way: str, then: str
) -> None:
    """An object that the body's own task adds during the COMMIT is kept, and committed with the tail."""
    site = await make_site(database_url, inside=WAYS[way], commit_on_exit=True)
    pause = Pause()

    async def use() -> None:
        await write(site, "head")
        pause.hold_next(site.engine)

    async def body() -> AsyncIterator[str]:
        await pause.begun.wait()
        site.db.session.add(Note(text="tail"))
        site.db.session.add_all([Note(text="tail too")])
        pause.go.set()
        if then == "a read":
            await count(site)
        if then == "a write":
            await write(site, "written")
        yield "all of it"

    add_stream(site, way, body, use)
    response = await site.get()
    assert response.status_code == 200
    assert "all of it" in response.text
    assert await site.notes() == ["head", "tail", "tail too", *(["written"] if then == "a write" else [])]


@pytest.mark.parametrize("then", ["nothing", "a read"])
async def test_body_adds_while_its_start_lets_go(
    make_site: MakeSite, database_url: str, caplog: pytest.LogCaptureFixture, then: str
) -> None:
    """Added while a unit that only read gives its connection back, it is in the tail that nobody commits."""
    site = await make_site(database_url, inside=BELOW)
    pause = Pause()

    async def use() -> None:
        await count(site)
        pause.hold_next(site.engine)

    async def body() -> AsyncIterator[str]:
        await pause.begun.wait()
        site.db.session.add(Note(text="tail"))
        pause.go.set()
        yield f"rows: {await count(site) if then == 'a read' else 0}"

    add_stream(site, "below a BaseHTTPMiddleware", body, use)
    response = await site.get()
    assert response.status_code == 200
    (complaint,) = complaints(caplog)
    read, unread = "1 statement and 0 unflushed objects", "0 statements and 1 unflushed object"
    assert f"{read if then == 'a read' else unread} are rolled back" in complaint
    assert await site.notes() == []


async def test_body_adds_while_its_start_is_rolled_back(make_site: MakeSite, database_url: str) -> None:
    """An object that the body's own task adds during the ROLLBACK is refused, as it would be dropped."""
    site = await make_site(database_url, inside=BELOW, commit_on_exit=True)
    pause = Pause()
    refused = (
        r"^task '.+' called {}\(\) on a session of .+ on which task '.+' is in the middle of rollback\(\)"
    )

    async def body() -> AsyncIterator[str]:
        await pause.begun.wait()
        with pytest.raises(ConcurrentUseError, match=refused.format("add")):
            site.db.session.add(Note(text="tail"))
        with pytest.raises(ConcurrentUseError, match=refused.format("add_all")):
            site.db.session.add_all([Note(text="tail")])
        pause.go.set()
        yield f"rows: {await count(site)}"

    @site.app.get("/")
    async def refuse() -> Response:
        await write(site, "head")
        pause.hold_next(site.engine)
        return StreamingResponse(body(), status_code=404)

    response = await site.get()
    assert (response.status_code, response.text) == (404, "rows: 0")
    assert await site.notes() == []


# A body's own task is in the middle of a statement


class AtTheStart:
    """Awaits what it is given before it sends the start of a response on."""

    def __init__(self, app: ASGIApp, do: Callable[[], Awaitable[object]]) -> None:
        self.app = app
        self.do = do

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application."""

        async def wait_and_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                await self.do()
            await send(message)

        await self.app(scope, receive, wait_and_send)


@ways
async def test_reading_body_does_not_hold_its_start_back(
    make_site: MakeSite, database_url: str, way: str
) -> None:
    """Where nothing was written the response starts, though the body's task is in the middle of a read."""

    async def reached() -> None:
        await gate.reached()

    inside = [Middleware(AtTheStart, do=reached), *WAYS[way]]
    site = await make_site(database_url, inside=inside, commit_on_exit=True)
    gate = gate_of(site.engine, site.judge)
    await site.engine.dispose()

    async def body() -> AsyncIterator[str]:
        await site.db.session.execute(passing(gate))
        yield f"rows: {await count(site)}"

    add_stream(site, way, body, partial(count, site))
    async with serve(site.app) as address, raw_get(address, "/") as response:
        async with closed(gate):
            assert await response.status() == 200
        await response.until(b"rows: 0")


@ways
async def test_start_waits_for_a_body_that_reads_after_a_write(
    make_site: MakeSite, database_url: str, way: str
) -> None:
    """Where something was written the start waits for the body's statement, and for the COMMIT after it."""
    opening: list[asyncio.Task[None]] = []
    stored: list[object] = []

    async def reached() -> None:
        await gate.reached()
        opening.append(asyncio.create_task(gate.open()))  # it runs when the settlement waits, and not before

    async def look() -> None:
        await opening[0]
        stored.append(await site.notes())

    inside = [Middleware(AtTheStart, do=reached), *WAYS[way]]
    outside = [Middleware(AtTheStart, do=look)]
    site = await make_site(database_url, outside=outside, inside=inside, commit_on_exit=True)
    gate = gate_of(site.engine, site.judge)
    await site.engine.dispose()

    async def body() -> AsyncIterator[str]:
        await site.db.session.execute(passing(gate))
        yield f"rows: {await count(site)}"

    add_stream(site, way, body, partial(write, site, "head"))
    async with closed(gate):
        response = await site.get()
    assert response.status_code == 200
    assert "rows: 1" in response.text
    assert stored == [["head"]]


# A client leaves a stream below an inner middleware, which ends the body as if all were well


def telling(app: ASGIApp, ended: asyncio.Event) -> ASGIApp:
    """Wrap an application, and tell when it has returned from a request."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        finally:
            if scope["type"] == "http":
                ended.set()

    return call


@pytest.mark.parametrize(("leaves", "kept"), [(True, ["head"]), (False, ["head", "tail"])])
async def test_client_of_a_stream_below_a_base_http_middleware(
    make_site: MakeSite, database_url: str, kept: list[str], *, leaves: bool
) -> None:
    """The tail of a client that left is rolled back, too; that of one that has everything is committed."""
    started, ended = asyncio.Event(), asyncio.Event()
    outside = [Middleware(telling, ended=ended)]
    site = await make_site(database_url, outside=outside, inside=BELOW, commit_on_exit=True)

    @site.app.get("/")
    async def stream() -> Response:
        async def body() -> AsyncIterator[str]:
            await started.wait()  # what the body's task writes before belongs to the head
            await write(site, "tail")
            yield "first"
            if leaves:
                await asyncio.Event().wait()
            yield "last"

        await write(site, "head")
        return StreamingResponse(body())

    async with serve(site.app) as address, raw_get(address, "/") as response:
        assert await response.status() == 200
        started.set()
        await response.until(b"first")
        if leaves:
            response.cut()
        else:
            await response.until(b"last")
        await ended.wait()
        assert site.checked_out() == 0
    assert await site.notes() == kept


# Another database has committed


@pytest.fixture
def other_url(tmp_path: Path) -> str:
    """An SQLite file that does not exist yet, other than `sqlite_url`."""
    return f"sqlite+aiosqlite:///{tmp_path / 'other.db'}"


async def test_partial_commit_of_two_pairs_over_one_database(make_site: MakeSite, deferring_url: str) -> None:
    """Two pairs over the same database, whose names are equal, commit one after the other as any two do."""
    inner = await make_site(deferring_url, commit_on_exit=True)
    outer = await make_site(deferring_url, inside=inner.app.user_middleware, commit_on_exit=True)

    @outer.app.get("/")
    async def route() -> None:
        await write(inner, "note")
        outer.db.session.add(Reply(**ORPHAN))

    with pytest.raises(PartialCommitError, match="had committed: repair") as raised:
        await outer.get()
    assert raised.value.committed == (raised.value.failed,)
    assert isinstance(raised.value.__cause__, IntegrityError)
    assert await outer.notes() == ["note"]


async def test_partial_commit_of_a_pair_and_itself(make_site: MakeSite, deferring_url: str) -> None:
    """Where the same pair is around a mounted application, too, that one's COMMIT counts as another's."""

    def using(app: ASGIApp) -> ASGIApp:
        async def call(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                site.db.session.add(Reply(**ORPHAN))
            await app(scope, receive, send)

        return call

    site = await make_site(deferring_url, inside=[Middleware(using)], commit_on_exit=True)
    mounted = FastAPI(middleware=site.app.user_middleware[:1])
    site.app.mount("/mounted", mounted)

    @mounted.get("/")
    async def route() -> None:
        await write(site, "note")

    with pytest.raises(PartialCommitError, match="had committed: repair") as raised:
        await site.get("/mounted/")
    assert raised.value.committed == (raised.value.failed,)
    assert await site.notes() == ["note"]


@pytest.mark.parametrize("then", ["nothing", "a read"])
async def test_partial_commit_by_hand_in_the_tail(
    make_site: MakeSite, deferring_url: str, other_url: str, then: str
) -> None:
    """An inner database that a background task has committed by hand is named when the outer one fails."""
    inner = await make_site(other_url, commit_on_exit=True)
    outer = await make_site(deferring_url, inside=inner.app.user_middleware, commit_on_exit=True)

    async def work() -> None:
        await write(inner, "note")
        await inner.db.session.commit()
        if then == "a read":
            await count(inner)
        outer.db.session.add(Reply(**ORPHAN))

    @outer.app.get("/")
    async def route(tasks: BackgroundTasks) -> None:
        tasks.add_task(work)

    with pytest.raises(PartialCommitError, match="had committed: repair") as raised:
        await outer.get()
    (committed,) = raised.value.committed
    assert "other.db" in committed
    assert "other.db" not in raised.value.failed
    assert await inner.notes() == ["note"]


@pytest.mark.parametrize("between", [[], BELOW], ids=["next to each other", "BaseHTTP between"])
async def test_partial_commit_by_hand_of_the_outer_database(
    make_site: MakeSite, deferring_url: str, other_url: str, between: list[Middleware]
) -> None:
    """An outer database that the application has committed by hand is named when the inner one fails."""
    inner = await make_site(deferring_url, commit_on_exit=True)
    inside = [*between, *inner.app.user_middleware]
    outer = await make_site(other_url, inside=inside, commit_on_exit=True)

    @outer.app.get("/")
    async def route() -> None:
        await write(outer, "note")
        await outer.db.session.commit()
        inner.db.session.add(Reply(**ORPHAN))

    with pytest.raises(PartialCommitError, match="had committed: repair") as raised:
        await outer.get()
    (committed,) = raised.value.committed
    assert "other.db" in committed
    assert "other.db" not in raised.value.failed
    assert await outer.notes() == ["note"]


# The handler of a failed COMMIT reads the request's body


KEPT: dict[str, tuple[int, int]] = {"whole": (100, 1), "many parts": (510, 255), "large": (1 << 20, 3)}
"""Bytes of a body, and the parts that it comes in; as much is kept of one."""
NOT_KEPT: dict[str, tuple[int, int]] = {"more parts": (512, 256), "larger": ((1 << 20) + 1, 3)}


def content(size: int) -> bytes:
    """Return so many bytes of JSON."""
    return b'"' + b"x" * (size - 2) + b'"'


def staying(app: ASGIApp) -> ASGIApp:
    """Wrap an application whose client stays: who asks for more than the request's body waits for ever."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        whole = False

        async def listen() -> Message:
            nonlocal whole
            if whole:
                await asyncio.Event().wait()
            message = await receive()
            whole = not message.get("more_body", False)
            return message

        await app(scope, listen if scope["type"] == "http" else receive, send)

    return call


async def in_parts(sent: bytes, number: int) -> AsyncIterator[bytes]:
    """Give a body in so many parts; a message of its own, which is empty, ends it."""
    size = -(-len(sent) // number)
    for start in range(0, len(sent), size):
        yield sent[start : start + size]


def add_failing_post(site: Site, reads: str) -> None:
    """Add the route `/`, whose COMMIT fails, and a handler that answers with what the client has sent."""

    @site.app.exception_handler(IntegrityError)
    async def answer(request: Request, error: Exception) -> Response:
        return JSONResponse(await request.json(), 409)

    @site.app.post("/")
    async def route(request: Request) -> None:
        if reads == "all":
            await request.json()
        if reads == "a part":
            await anext(request.stream())
        await write(site, "new")
        site.db.session.add(Reply(**ORPHAN))


@pytest.mark.parametrize("reads", ["nothing", "a part", "all"])
@pytest.mark.parametrize("inside", [[], BELOW], ids=["alone", "BaseHTTP inside"])
async def test_handler_of_a_failed_commit_reads_the_body(
    make_site: MakeSite, deferring_url: str, reads: str, inside: list[Middleware]
) -> None:
    """The handler gets the whole body, however much of it the route has read, in however many messages."""
    outside = [Middleware(staying)]
    site = await make_site(deferring_url, outside=outside, inside=inside, commit_on_exit=True)
    add_failing_post(site, reads)
    async with site.client() as client:
        for size, parts in KEPT.values():
            response = await client.post("/", content=in_parts(content(size), parts))
            assert (response.status_code, response.content == content(size)) == (409, True), size
    assert await site.notes() == []


@pytest.mark.parametrize("kind", NOT_KEPT)
async def test_handler_of_a_failed_commit_reads_too_long_a_body(
    make_site: MakeSite, deferring_url: str, kind: str
) -> None:
    """A longer body than is kept is gone: the handler that asks for it fails, and does not hang."""
    site = await make_site(deferring_url, outside=[Middleware(staying)], commit_on_exit=True)
    add_failing_post(site, "all")
    size, parts = NOT_KEPT[kind]
    async with site.client() as client:
        with pytest.raises(ClientDisconnect, match=r"^$"):
            await client.post("/", content=in_parts(content(size), parts))
    assert await site.notes() == []


# An inner middleware cuts the settlement short


class GivesUp:
    """Answers 504 when the time is up, of which `deadlines` decide."""

    def __init__(self, app: ASGIApp, deadlines: list[asyncio.Timeout]) -> None:
        self.app = app
        self.deadlines = deadlines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(None) as deadline:
                self.deadlines.append(deadline)
                await self.app(scope, receive, send)
        except TimeoutError:
            await PlainTextResponse("too slow", 504)(scope, receive, send)


@pytest.mark.parametrize("by", ["the route", "the hook"])
async def test_timeout_in_a_hook_before_the_commit(
    make_site: MakeSite, database_url: str, caplog: pytest.LogCaptureFixture, by: str
) -> None:
    """A 504 for a settlement that a hook kept waiting is what the client gets, and nothing is committed."""
    deadlines: list[asyncio.Timeout] = []
    site = await make_site(
        database_url, inside=[Middleware(GivesUp, deadlines=deadlines)], commit_on_exit=True
    )

    async def wait() -> None:
        if by == "the hook":
            await write(site, "new")
        (deadline,) = deadlines
        deadline.reschedule(0)
        await asyncio.Event().wait()

    @site.app.get("/")
    async def route() -> None:
        site.db.unit.before_commit(wait)
        if by == "the route":
            await write(site, "new")

    response = await site.get()
    assert (response.status_code, response.text) == (504, "too slow")
    assert await site.notes() == []
    assert complaints(caplog) == []


@survives_cancellation
async def test_timeout_in_a_wait_for_a_child_task(
    make_site: MakeSite, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """So is one for a settlement that waits for a statement of another task."""
    deadlines: list[asyncio.Timeout] = []
    children: list[asyncio.Task[Any]] = []

    async def reached() -> None:
        await gate.reached()
        (deadline,) = deadlines
        asyncio.get_running_loop().call_soon(deadline.reschedule, 0)  # runs when the settlement waits

    inside = [Middleware(GivesUp, deadlines=deadlines), Middleware(AtTheStart, do=reached)]
    site = await make_site(database_url, inside=inside, commit_on_exit=True)
    gate = gate_of(site.engine, site.judge)
    await site.engine.dispose()

    @site.app.get("/")
    async def route() -> None:
        await write(site, "new")
        children.append(asyncio.create_task(site.db.session.execute(passing(gate))))

    async with closed(gate):
        response = await site.get()
        await asyncio.wait(children)
    assert (response.status_code, response.text) == (504, "too slow")
    assert await site.notes() == []
    assert complaints(caplog) == []
