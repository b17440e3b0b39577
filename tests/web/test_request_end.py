"""How a request's unit of work ends, and where requests have none."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from fastapi import Response, WebSocket
from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.types import Message, Receive, Scope, Send
from websockets.asyncio.client import connect

from fastapi_async_sqlalchemy import MissingSessionError, SessionProxy, UnitClosedError
from tests.support.interruption import Exchange
from tests.support.request_end import LAST, START, Returned
from tests.support.serving import raw_get, serve
from tests.support.site import MakeSite
from tests.support.tables import Note

# After the application has returned


CLOSED = r"has ended.*open a new one with `async with db\.begin\(\):`"
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


# The edges of the tail


MORE: Message = {"type": "http.response.body", "body": b"more", "more_body": True}
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
