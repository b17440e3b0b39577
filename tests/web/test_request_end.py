"""How a request's unit of work ends, whoever is still there; and where requests have none."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import pytest
from attrs import Factory, define
from fastapi import Depends, FastAPI, Response, WebSocket
from fastapi.responses import StreamingResponse
from sqlalchemy import AsyncAdaptedQueuePool, Pool, event, insert, literal, select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from websockets.asyncio.client import connect

from fastapi_async_sqlalchemy import (
    MissingSessionError,
    SessionProxy,
    UnitClosedError,
    create_middleware_and_session_proxy,
)
from tests.support.interruption import Exchange
from tests.support.serving import asgi_client, raw_get, run_lifespan, serve
from tests.support.site import MakeSite, Site, checked_in, complaints
from tests.support.tables import Note


class Returned:
    """Tells when the application has returned."""

    def __init__(self, app: ASGIApp, event: asyncio.Event) -> None:
        self.app = app
        self.event = event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application, and tell."""
        try:
            await self.app(scope, receive, send)
        finally:
            if scope["type"] == "http":
                self.event.set()


class CancelOnDisconnect:
    """Cancels a request whose client has gone, as some servers do."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application in a task, and cancel it when the client goes."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        serving = asyncio.ensure_future(self.app(scope, receive, send))
        while (await receive())["type"] != "http.disconnect":
            pass
        serving.cancel()
        await asyncio.wait({serving})
        if not serving.cancelled():
            serving.result()


async def cancel(task: "asyncio.Task[Any]") -> None:
    """Cancel a task, and see that the cancellation goes all the way."""
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()


# After the application has returned


CLOSED = r"has ended.*open a new one with `async with db\(\):`"

Use = Callable[[AsyncSession, Note], Awaitable[object]]


async def add(session: AsyncSession, note: Note) -> None:
    """Add an object."""
    session.add(Note(text="late"))


async def add_all(session: AsyncSession, note: Note) -> None:
    """Add objects."""
    session.add_all([Note(text="late")])


async def begin(session: AsyncSession, note: Note) -> None:
    """Open a transaction, and write in it."""
    async with session.begin():
        await session.execute(insert(Note).values(text="late"))


USES: dict[str, Use] = {
    "add": add,
    "add_all": add_all,
    "begin": begin,
    "begin_nested": lambda session, note: session.begin_nested().start(),
    "commit": lambda session, note: session.commit(),
    "connection": lambda session, note: session.connection(),
    "delete": lambda session, note: session.delete(note),
    "execute": lambda session, note: session.execute(insert(Note).values(text="late")),
    "flush": lambda session, note: session.flush(),
    "get": lambda session, note: session.get(Note, 404),
    "merge": lambda session, note: session.merge(Note(id=404, text="late")),
    "refresh": lambda session, note: session.refresh(note),
    "scalar": lambda session, note: session.scalar(select(Note)),
    "scalars": lambda session, note: session.scalars(select(Note)),
    "stream": lambda session, note: session.stream(select(Note)),
}
"""What a task may try to do with a session that it kept."""


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("status", [200, 404])
async def test_session_kept_by_a_task_that_outlived_its_request(
    make_site: MakeSite, database_url: str, name: str, status: int
) -> None:
    """A task that outlived its request can do nothing with its session, nor look it up again."""
    site = await make_site(database_url, commit_on_exit=True)
    finished = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    @site.app.get("/")
    async def route() -> Response:
        session, note = site.db.session, Note(text="kept")
        session.add(note)
        await session.flush()

        async def late() -> None:
            await finished.wait()
            with pytest.raises(UnitClosedError, match=CLOSED):
                await USES[name](session, note)
            with pytest.raises(UnitClosedError, match=CLOSED):
                _ = site.db.session
            assert not session.in_transaction()
            assert site.checked_out() == 0

        tasks.append(asyncio.create_task(late()))
        return Response(status_code=status)

    assert (await site.get()).status_code == status
    finished.set()
    await tasks[0]
    assert await site.notes() == (["kept"] if status == 200 else [])


UNIT_USES: dict[str, Callable[[SessionProxy[AsyncSession]], object]] = {
    "session": lambda db: db.session,
    "unit.session": lambda db: db.unit.session,
    "unit.savepoint": lambda db: db.unit.savepoint(),
    "unit.on_commit": lambda db: db.unit.on_commit(list),
    "unit.on_rollback": lambda db: db.unit.on_rollback(list),
}
"""What a task may try to do with the unit that it inherited."""


@pytest.mark.parametrize("name", UNIT_USES)
async def test_unit_that_was_untouched_when_its_request_ended(
    make_site: MakeSite, postgresql_url: str, name: str
) -> None:
    """A task that outlived its request cannot be the first to use its unit either."""
    site = await make_site(postgresql_url, commit_on_exit=True)
    finished = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def late() -> None:
        await finished.wait()
        with pytest.raises(UnitClosedError, match=CLOSED):
            UNIT_USES[name](site.db)
        with pytest.raises(UnitClosedError, match=CLOSED):
            await site.db.unit.commit()
        with pytest.raises(UnitClosedError, match=CLOSED):
            await site.db.unit.rollback()

    @site.app.get("/")
    async def route() -> None:
        tasks.append(asyncio.create_task(late()))

    await site.get()
    finished.set()
    await tasks[0]


async def test_task_that_outlived_its_request_opens_a_unit(make_site: MakeSite, database_url: str) -> None:
    """A task that outlived its request works in a unit that it opens; to give the old one up is harmless."""
    site = await make_site(database_url, commit_on_exit=True)
    finished = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    @site.app.get("/")
    async def route() -> None:
        session = site.db.session
        await session.scalar(select(Note))

        async def late() -> None:
            await finished.wait()
            await session.rollback()
            await session.close()
            async with site.db(commit_on_exit=True) as unit:
                assert site.db.session is unit.session
                assert unit.session is not session
                unit.session.add(Note(text="late"))

        tasks.append(asyncio.create_task(late()))

    await site.get()
    finished.set()
    await tasks[0]
    assert await site.notes() == ["late"]


async def test_transaction_that_a_task_left_open(make_site: MakeSite, database_url: str) -> None:
    """A transaction that a task began after the response's start ends with the unit, not with the task."""
    site = await make_site(database_url, commit_on_exit=True)
    begun, finished = asyncio.Event(), asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def late() -> None:
        async with site.db.session.begin():
            site.db.session.add(Note(text="with the unit"))
            await site.db.session.flush()
            begun.set()
            await finished.wait()
            site.db.session.add(Note(text="late"))

    @site.app.get("/")
    async def route() -> Response:
        tasks.append(asyncio.create_task(late()))
        return Response(background=BackgroundTask(begun.wait))

    await site.get()
    assert site.checked_out() == 0
    assert await site.notes() == ["with the unit"]
    finished.set()
    with pytest.raises(UnitClosedError, match="has ended"):
        await tasks[0]
    assert await site.notes() == ["with the unit"]


# Client gone, or the task cancelled


Wait = Callable[[], Awaitable[object]]
Doing = Callable[[SessionProxy[AsyncSession], Wait], Awaitable[None]]


async def nothing(db: SessionProxy[AsyncSession], wait: Wait) -> None:
    """Do not touch the database."""
    await wait()


async def reading(db: SessionProxy[AsyncSession], wait: Wait) -> None:
    """Have read."""
    await db.session.scalars(select(Note))
    await wait()


async def writing(db: SessionProxy[AsyncSession], wait: Wait) -> None:
    """Have written."""
    db.session.add(Note(text="new"))
    await db.session.flush()
    await wait()


async def holding(db: SessionProxy[AsyncSession], wait: Wait) -> None:
    """Be inside `begin()`."""
    async with db.session.begin():
        await writing(db, wait)


async def saving(db: SessionProxy[AsyncSession], wait: Wait) -> None:
    """Be inside a savepoint."""
    await db.session.scalars(select(Note))
    async with db.unit.savepoint():
        await writing(db, wait)


async def streaming(db: SessionProxy[AsyncSession], wait: Wait) -> None:
    """Be in the middle of a result."""
    await writing(db, lambda: asyncio.sleep(0))
    async for _ in await db.session.stream_scalars(select(Note)):
        await wait()


DOINGS = [nothing, reading, writing, holding, saving, streaming]


def blocked_route(site: Site, doing: Doing, where: str) -> asyncio.Event:
    """Give the site a route that never ends, and return what tells that it has come to that point."""
    reached = asyncio.Event()

    async def wait() -> None:
        reached.set()
        await asyncio.Event().wait()

    async def at(place: str) -> None:
        if place == where:
            await doing(site.db, wait)

    async def dependency() -> AsyncGenerator[None]:
        await at("dependency")
        yield
        await at("teardown")

    async def body() -> AsyncIterator[bytes]:
        yield b"first"
        await at("body")
        yield b"last"

    @site.app.get("/", dependencies=[Depends(dependency)])
    async def route() -> Response:
        await at("route")
        return StreamingResponse(body())

    @site.app.get("/next")
    async def following() -> None:
        site.db.session.add(Note(text="next"))

    @site.app.get("/read")
    async def read() -> list[str]:
        return list(await site.db.session.scalars(select(Note.text)))

    return reached


@pytest.mark.parametrize("doing", DOINGS)
@pytest.mark.parametrize("where", ["dependency", "route", "body", "teardown"])
async def test_cancelled_request(make_site: MakeSite, database_url: str, doing: Doing, where: str) -> None:
    """A cancelled request rolls back and gives its connection back, and the cancellation goes on."""
    site = await make_site(database_url, commit_on_exit=True)
    await site.judge.execute("INSERT INTO note (text) VALUES ('old')")
    reached = blocked_route(site, doing, where)
    async with site.client() as client:
        request = asyncio.create_task(client.get("/"))
        await reached.wait()
        await cancel(request)
        assert site.checked_out() == 0
        assert await site.notes() == ["old"]
        assert (await client.get("/next")).status_code == 200
    assert await site.notes() == ["next", "old"]


@pytest.mark.parametrize("doing", DOINGS)
async def test_client_that_leaves_a_waiting_route(
    make_site: MakeSite, database_url: str, doing: Doing
) -> None:
    """Where a client's leaving cancels the request, the connection comes back and nothing is written."""
    returned = asyncio.Event()
    outside = [Middleware(CancelOnDisconnect), Middleware(Returned, event=returned)]
    site = await make_site(database_url, outside=outside, commit_on_exit=True)
    await site.judge.execute("INSERT INTO note (text) VALUES ('old')")
    reached = blocked_route(site, doing, "route")
    async with serve(site.app) as address:
        async with raw_get(address, "/") as response:
            await reached.wait()
            response.cut()
            await returned.wait()
            assert site.checked_out() == 0
        async with raw_get(address, "/next") as response:
            assert await response.status() == 200
    assert await site.notes() == ["next", "old"]


@pytest.mark.parametrize("doing", DOINGS)
async def test_client_that_leaves_a_stream(make_site: MakeSite, database_url: str, doing: Doing) -> None:
    """A stream whose client left is no success: what its body wrote is rolled back, what was before stays."""
    returned = asyncio.Event()
    site = await make_site(database_url, outside=[Middleware(Returned, event=returned)], commit_on_exit=True)
    await site.judge.execute("INSERT INTO note (text) VALUES ('old')")
    reached = blocked_route(site, doing, "body")
    async with serve(site.app) as address:
        async with raw_get(address, "/") as response:
            assert await response.status() == 200
            await reached.wait()
            response.cut()
            await returned.wait()
            assert site.checked_out() == 0
            assert await site.notes() == ["old"]
        async with raw_get(address, "/next") as response:
            assert await response.status() == 200


@pytest.mark.parametrize("commit_on_exit", [True, False])
async def test_stream_that_returns_as_if_it_were_done(
    make_site: MakeSite, database_url: str, caplog: pytest.LogCaptureFixture, *, commit_on_exit: bool
) -> None:
    """A background task that runs after its stream was cut off shares the stream's fate."""
    site = await make_site(database_url, commit_on_exit=commit_on_exit)
    ran: list[str] = []

    async def background() -> None:
        ran.append("background")
        site.db.session.add(Note(text="background"))
        await site.db.session.flush()

    async def body() -> AsyncIterator[bytes]:
        yield b"first"
        await asyncio.Event().wait()

    @site.app.get("/")
    async def route() -> Response:
        site.db.session.add(Note(text="head"))
        await site.db.session.commit()
        return StreamingResponse(body(), background=BackgroundTask(background))

    exchange = Exchange("/", spec_version="2.3")
    exchange.gone.set()
    await exchange.call(site.app)
    assert ran == ["background"]
    assert not exchange.complete
    assert await site.notes() == ["head"]
    assert len(complaints(caplog)) == (not commit_on_exit)


BLOCKED = {
    "postgresql": "SELECT count(*) FROM pg_locks WHERE NOT granted",
    "mysql": "SELECT count(*) FROM information_schema.processlist"
    " WHERE db = database() AND id <> connection_id() AND info LIKE 'INSERT%'",
}
"""How many connections of a database wait for a lock, or on MariaDB are about to."""


async def blocked(site: Site) -> None:
    """Wait until a connection waits for a lock; each look is a round trip to the server."""
    while not await site.judge.scalar(BLOCKED[site.engine.dialect.name]):
        pass


@pytest.mark.parametrize("where", ["route", "body"])
async def test_end_in_the_middle_of_a_statement(make_site: MakeSite, locking_url: str, where: str) -> None:
    """A request that ends while the database works for it hands no damaged connection to the next ones."""
    returned = asyncio.Event()
    outside = [
        *([Middleware(CancelOnDisconnect)] if where == "route" else []),
        Middleware(Returned, event=returned),
    ]
    site = await make_site(locking_url, outside=outside, commit_on_exit=True)
    await site.judge.execute("BEGIN")
    await site.judge.execute("INSERT INTO note (text) VALUES ('locked')")

    async def insert_locked(db: SessionProxy[AsyncSession], wait: Wait) -> None:
        db.session.add(Note(text="locked"))
        await db.session.flush()

    blocked_route(site, insert_locked, where)
    async with serve(site.app) as address:
        async with raw_get(address, "/") as response:
            await blocked(site)
            response.cut()
            await returned.wait()
            assert site.checked_out() == 0
        await site.judge.execute("ROLLBACK")
        async with raw_get(address, "/next") as response:
            assert await response.status() == 200
        async with raw_get(address, "/read") as response:
            assert (await response.rest()).endswith(b'["next"]')
    assert await site.notes() == ["next"]


# Cancelled during COMMIT


@define(eq=False)
class CommitWatch:
    """Which hooks ran, and which driver connections were used."""

    site: Site
    hooks: list[str] = Factory(list[str])
    connections: list[object] = Factory(list[object])

    def __attrs_post_init__(self) -> None:
        event.listen(self.site.engine.pool, "checkout", self._note)

    def _note(self, connection: object, *args: object) -> None:
        self.connections.append(connection)

    def write(self) -> None:
        """Write a note, with hooks for either outcome."""
        self.site.db.session.add(Note(text="new"))
        self.site.db.unit.on_commit(lambda: self.hooks.append("commit"))
        self.site.db.unit.on_rollback(lambda: self.hooks.append("rollback"))

    async def check(self, caplog: pytest.LogCaptureFixture) -> None:
        """See that nobody claims to know the outcome, and that the connection is never used again."""
        (complaint,) = complaints(caplog)
        assert complaint.startswith("ERROR: COMMIT on ")
        assert "outcome is unknown" in complaint
        assert self.hooks == []
        assert self.site.checked_out() == 0
        assert await self.site.notes() in ([], ["new"])
        used = self.connections[-1]
        async with self.site.client() as client:
            assert (await client.get("/next")).status_code == 200
        assert self.connections[-1] is not used


@pytest.mark.parametrize("where", ["response", "route", "background task"])
async def test_cancelled_during_commit(
    make_site: MakeSite, database_url: str, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    """After a cancellation during COMMIT the outcome is unknown: the log says so, and no hook runs."""
    site = await make_site(database_url, commit_on_exit=True)
    watch = CommitWatch(site)

    def cancel_this_task(connection: object) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()

    def write() -> None:
        watch.write()
        event.listen(site.engine.sync_engine, "commit", cancel_this_task, once=True)

    async def background() -> None:
        write()

    @site.app.get("/")
    async def route() -> Response:
        if where == "background task":
            return Response(background=BackgroundTask(background))
        write()
        if where == "route":
            await site.db.session.commit()
        return Response()

    @site.app.get("/next")
    async def following() -> None:
        await site.db.session.scalars(select(Note))

    async with site.client() as client:
        request = asyncio.create_task(client.get("/"))
        await asyncio.wait({request})
        assert request.cancelled()
    await watch.check(caplog)


async def test_client_that_leaves_while_the_server_commits(
    make_site: MakeSite, postgresql_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that leaves while the server works on COMMIT leaves the outcome unknown just so."""
    returned = asyncio.Event()
    outside = [Middleware(CancelOnDisconnect), Middleware(Returned, event=returned)]
    site = await make_site(postgresql_url, outside=outside, commit_on_exit=True)
    watch = CommitWatch(site)
    await site.judge.execute(
        "CREATE FUNCTION wait_for_judge() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END $$"
    )
    await site.judge.execute(
        "CREATE CONSTRAINT TRIGGER slow_commit AFTER INSERT ON note DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION wait_for_judge()"
    )
    await site.judge.execute("SELECT pg_advisory_lock(1)")

    @site.app.get("/")
    async def route() -> None:
        watch.write()

    @site.app.get("/next")
    async def following() -> None:
        await site.db.session.scalars(select(Note))

    async with serve(site.app) as address, raw_get(address, "/") as response:
        await blocked(site)
        response.cut()
        await returned.wait()
    await watch.check(caplog)


# The edges of the tail


START: Message = {"type": "http.response.start", "status": 200, "headers": []}
MORE: Message = {"type": "http.response.body", "body": b"more", "more_body": True}
LAST: Message = {"type": "http.response.body", "body": b"last"}
PATHSEND: Message = {"type": "http.response.pathsend", "path": "/dev/null"}

RESPONSES: dict[str, tuple[list[Message], list[str]]] = {
    "none": ([], []),
    "start alone": ([START], ["1"]),
    "body without end": ([START, MORE], ["1"]),
    "whole": ([START, MORE, LAST], ["1", "2", "3", "end"]),
    "pathsend": ([START, PATHSEND], ["1", "2", "end"]),
}
"""What an application sends; and which of the notes written before each message and at its end stay."""


@pytest.mark.parametrize("name", RESPONSES)
async def test_response_that_is_never_finished(make_site: MakeSite, database_url: str, name: str) -> None:
    """What an application writes after the start is kept if it has finished its response, or else undone."""
    messages, kept = RESPONSES[name]
    site = await make_site(database_url, commit_on_exit=True)

    async def raw(scope: Scope, receive: Receive, send: Send) -> None:
        for number, message in enumerate(messages, 1):
            site.db.session.add(Note(text=str(number)))
            await send(message)
        site.db.session.add(Note(text="end"))
        await site.db.session.flush()

    site.app.mount("/raw", raw)
    await Exchange("/raw/").call(site.app)
    assert await site.notes() == kept


async def test_tail_of_a_failed_request(make_site: MakeSite, database_url: str) -> None:
    """The tail is a transaction of its own: it is committed though the status rolled the head back."""
    site = await make_site(database_url, commit_on_exit=True)

    async def background() -> None:
        assert (await site.db.session.scalars(select(Note))).all() == []
        site.db.session.add(Note(text="tail"))

    @site.app.get("/")
    async def route() -> Response:
        site.db.session.add(Note(text="head"))
        return Response(status_code=404, background=BackgroundTask(background))

    await site.get()
    assert await site.notes() == ["tail"]


async def test_tail_through_a_real_server(make_site: MakeSite, database_url: str) -> None:
    """A client has its whole response while the background task still works, which is committed later."""
    returned, go = asyncio.Event(), asyncio.Event()
    site = await make_site(database_url, outside=[Middleware(Returned, event=returned)], commit_on_exit=True)

    async def background() -> None:
        await go.wait()
        assert site.checked_out() == 0
        site.db.session.add(Note(text="tail"))

    @site.app.get("/")
    async def route() -> Response:
        site.db.session.add(Note(text="head"))
        return Response("all of it", background=BackgroundTask(background))

    async with serve(site.app) as address, raw_get(address, "/") as response:
        assert await response.status() == 200
        await response.until(b"all of it")
        assert await site.notes() == ["head"]
        go.set()
        await returned.wait()
        assert await site.notes() == ["head", "tail"]


# Where no unit is bound


async def test_websocket_opens_a_unit_for_each_message(make_site: MakeSite, database_url: str) -> None:
    """In a WebSocket `db.session` tells to open `async with db():` for each message, and that works."""
    site = await make_site(database_url, commit_on_exit=True)

    @site.app.websocket("/")
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        with pytest.raises(MissingSessionError, match=r"in a WebSocket: open `async with db.*each message"):
            _ = site.db.session
        async for message in websocket.iter_text():
            async with site.db(commit_on_exit=True) as unit:
                assert site.db.session is unit.session
                unit.session.add(Note(text=message))
            assert site.checked_out() == 0
            await websocket.send_text("kept")
        with pytest.raises(MissingSessionError, match="in a WebSocket"):
            _ = site.db.unit

    async with serve(site.app) as address, connect(f"ws://{address.host}:{address.port}/") as websocket:
        for number in (1, 2):
            await websocket.send(str(number))
            assert await websocket.recv() == "kept"
            assert len(await site.notes()) == number


async def test_websocket_does_not_inherit_a_unit(make_site: MakeSite, postgresql_url: str) -> None:
    """A WebSocket that is called from inside an open unit has none either, and leaves the caller its own."""
    site = await make_site(postgresql_url)
    seen: list[str] = []

    @site.app.websocket("/")
    async def talk(websocket: WebSocket) -> None:
        with pytest.raises(MissingSessionError, match="in a WebSocket"):
            _ = site.db.session
        seen.append("nothing")
        await websocket.close()

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        seen.append(message["type"])

    scope: Scope = {"type": "websocket", "path": "/", "headers": [], "query_string": b"", "subprotocols": []}
    async with site.client(), site.db() as unit:
        await site.app(scope, receive, send)
        assert site.db.unit is unit
    assert seen == ["nothing", "websocket.close"]


@pytest.mark.parametrize(("path", "bound"), [("/health", False), ("/health/deep", True), ("/healthy", True)])
async def test_excluded_path(make_site: MakeSite, postgresql_url: str, path: str, *, bound: bool) -> None:
    """An excluded path, exactly as written, has no unit of work; a unit can be opened there."""
    site = await make_site(postgresql_url, exclude_paths=["/health"], commit_on_exit=True)

    @site.app.get("/{path:path}")
    async def route() -> None:
        if bound:
            assert site.db.session is site.db.unit.session
            return
        with pytest.raises(MissingSessionError, match="excluded path: take it off exclude_paths, or open"):
            _ = site.db.session
        async with site.db(commit_on_exit=True) as unit:
            unit.session.add(Note(text=str(len(await site.notes()))))

    async with site.client() as client:
        assert (await client.get(path)).status_code == 200
        async with site.db() as unit:
            assert (await client.get(path)).status_code == 200
            assert site.db.unit is unit
    assert await site.notes() == ([] if bound else ["0", "1"])


# The lifespan and the engine


POOLED = {"poolclass": AsyncAdaptedQueuePool}
"""Older SQLAlchemy gives SQLite files a pool only where it is asked to."""


@define(eq=False)
class Life:
    """An application whose lifespan uses the database, and fails where it is told to."""

    url: str
    owner: str
    failing: str = ""
    pools: list[Pool] = Factory(list[Pool])

    def application(self) -> tuple[FastAPI, SessionProxy[AsyncSession]]:
        """Make the application, with an engine of the middleware's own or of the caller's."""
        middleware, db = create_middleware_and_session_proxy(AsyncSession)

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
            await use("startup")
            yield
            await use("shutdown")

        async def use(phase: str) -> None:
            async with db() as unit:
                assert await unit.session.scalar(select(1)) == 1
            self.pools.append(db.engine.pool)
            if self.failing == phase:
                message = f"no {phase}"
                raise OSError(message)

        app = FastAPI(lifespan=lifespan)
        if self.owner == "caller":
            app.add_middleware(middleware, custom_engine=create_async_engine(self.url, **POOLED))
        else:
            app.add_middleware(middleware, db_url=self.url, engine_args=POOLED)

        @app.get("/")
        async def route() -> int | None:
            return await db.session.scalar(select(literal(1)))

        return app, db

    def check(self) -> None:
        """See that the middleware's engine has no connection left, and that the caller's has kept one."""
        assert [checked_in(pool) for pool in self.pools] == [int(self.owner == "caller")] * len(self.pools)


owners = pytest.mark.parametrize("owner", ["middleware", "caller"])


@owners
@pytest.mark.parametrize("failing", ["startup", "shutdown"])
async def test_engine_after_a_lifespan_that_failed(database_url: str, owner: str, failing: str) -> None:
    """An engine of the middleware's own is disposed when startup or shutdown failed; a caller's never is."""
    life = Life(database_url, owner, failing)
    app, db = life.application()
    with pytest.raises(OSError, match=f"no {failing}"):
        async with run_lifespan(app):
            pass
    life.check()
    await db.engine.dispose()


@pytest.mark.parametrize(
    ("failing", "last"),
    [("", "shutdown.complete"), ("startup", "startup.failed"), ("shutdown", "shutdown.failed")],
)
async def test_engine_is_disposed_before_the_server_hears(database_url: str, failing: str, last: str) -> None:
    """When the server hears of the lifespan's end, and may stop its loop, the engine is disposed already."""
    life = Life(database_url, "middleware", failing)
    app, _ = life.application()
    heard: dict[str, list[int]] = {}

    async def eavesdrop(scope: Scope, receive: Receive, send: Send) -> None:
        async def note(message: Message) -> None:
            heard[message["type"].removeprefix("lifespan.")] = [checked_in(pool) for pool in life.pools]
            await send(message)

        await app(scope, receive, note)

    with pytest.raises(OSError, match=failing) if failing else nullcontext():
        async with run_lifespan(eavesdrop):
            pass
    assert heard[last] == [0] * len(life.pools)


@owners
@pytest.mark.parametrize("served", [True, False])
async def test_engine_after_two_lifespans(database_url: str, owner: str, *, served: bool) -> None:
    """One application can go through two lifespans, and each ends with the middleware's engine disposed."""
    life = Life(database_url, owner)
    app, db = life.application()
    for _ in range(2):
        if served:
            async with serve(app) as address, raw_get(address, "/") as response:
                assert await response.status() == 200
        else:
            async with asgi_client(app) as client:
                assert (await client.get("/")).json() == 1
        life.check()
    await db.engine.dispose()


async def test_application_without_lifespan(database_url: str) -> None:
    """An application that refuses the lifespan can be served without one."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    seen: list[object] = []

    async def bare(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            raise NotImplementedError(scope["type"])
        seen.append(await db.session.scalar(select(1)))
        await send(START)
        await send(LAST)

    app = middleware(bare, db_url=database_url, engine_args=POOLED)
    with pytest.raises(NotImplementedError, match="lifespan"):
        async with run_lifespan(app):
            pass
    for _ in range(2):
        exchange = Exchange("/")
        await exchange.call(app)
        assert (exchange.status, exchange.body) == (200, b"last")
    assert seen == [1, 1]
    assert checked_in(db.engine.pool) == 1
    await db.engine.dispose()
