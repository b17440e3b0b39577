"""Messages go out in the order in which the application sent them, from whichever task."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from attrs import Factory, define
from sqlalchemy.exc import IntegrityError
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.support.requests import conflict
from tests.support.serving import raw_get, serve
from tests.support.site import MakeSite, Site
from tests.support.tables import ORPHAN, Note, Reply

START: Message = {"type": "http.response.start", "status": 200, "headers": []}
Work = Coroutine[Any, Any, None]
DEADLINE = 30
"""Seconds after which something hangs."""


def part(text: str, *, more: bool = True) -> Message:
    """Return a part of a body."""
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


async def pass_on(send: Send, message: Message) -> None:
    """Send a message, for a task."""
    await send(message)


@define(eq=False)
class Stream:
    """An application whose start is settled while `meanwhile` sends parts of the body by tasks of its own."""

    site: Site
    meanwhile: Callable[["Stream", Send], Work]
    use: Callable[[], Any] = lambda: None
    settling: asyncio.Event = Factory(asyncio.Event)
    settle: asyncio.Event = Factory(asyncio.Event)
    tasks: list[asyncio.Task[None]] = Factory(list[asyncio.Task[None]])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the start and, right after it, the rest; the other tasks send while the start is settled."""
        self.site.db.unit.before_commit(self.hold)
        self.use()
        other = asyncio.create_task(self.meanwhile(self, send))
        try:
            await send(START)
            await send(part("rest", more=False))
        finally:
            await other

    async def hold(self) -> None:
        """Keep the settlement from its COMMIT."""
        self.settling.set()
        await self.settle.wait()

    async def ping(self, send: Send, *names: str) -> None:
        """Let a task for each name send it, one after the other, as far as it gets."""
        await self.settling.wait()
        for name in names:
            self.tasks.append(asyncio.create_task(pass_on(send, part(name))))
            await asyncio.sleep(0)  # the task has sent it

    async def ping_and_settle(self, send: Send) -> None:
        """Send three parts, and let the settlement go on."""
        await self.ping(send, "a", "b", "c")
        self.settle.set()
        await asyncio.gather(*self.tasks)


async def call(app: ASGIApp, sent: list[str]) -> None:
    """Make a request, and note what the server gets, each as it is given; its `send` takes a while."""

    async def send(message: Message) -> None:
        sent.append(message["body"].decode() if "body" in message else str(message["status"]))
        await asyncio.sleep(0)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope: Scope = {"type": "http", "asgi": {"version": "3.0"}, "method": "GET", "path": "/", "headers": []}
    async with asyncio.timeout(DEADLINE):
        await app(scope, receive, send)


async def site_with(
    make_site: MakeSite, url: str, meanwhile: Callable[[Stream, Send], Work], **options: Any
) -> tuple[Site, Stream]:
    """Make a site that is nothing but the stream."""
    site = await make_site(url, commit_on_exit=True, **options)
    stream = Stream(site, meanwhile)
    site.app.mount("/", stream)
    return site, stream


@pytest.mark.parametrize("written", [True, False])
async def test_parts_wait_for_the_start(make_site: MakeSite, database_url: str, *, written: bool) -> None:
    """Parts of other tasks wait for the start, in order, and what is sent after the start waits for them."""
    site, stream = await site_with(make_site, database_url, Stream.ping_and_settle)
    if written:
        stream.use = lambda: site.db.session.add(Note(text="new"))
    sent = list[str]()
    await call(site.app, sent)
    assert sent == ["200", "a", "b", "c", "rest"]
    assert await site.notes() == ["new"] * written


@pytest.mark.parametrize("handled", [True, False])
async def test_parts_of_a_response_whose_commit_failed(
    make_site: MakeSite, deferring_url: str, *, handled: bool
) -> None:
    """Parts that waited are dropped when COMMIT fails: nothing but the handler's answer goes out."""
    site, stream = await site_with(make_site, deferring_url, Stream.ping_and_settle)
    stream.use = lambda: site.db.session.add(Reply(**ORPHAN))
    sent = list[str]()
    if handled:
        site.app.add_exception_handler(IntegrityError, conflict)
        await call(site.app, sent)
        assert sent == ["409", "conflict: IntegrityError"]
    else:
        with pytest.raises(IntegrityError, match=r"(?i)foreign key"):
            await call(site.app, sent)
        assert sent == ["500", "Internal Server Error"]


async def test_part_whose_task_is_cancelled(make_site: MakeSite, sqlite_url: str) -> None:
    """A task that is cancelled while it waits sends nothing, and the others go on in order."""

    async def meanwhile(stream: Stream, send: Send) -> None:
        await stream.ping(send, "a", "b", "c")
        for number in (0, 1):
            stream.tasks[number].cancel()
        await asyncio.wait(stream.tasks[:2])
        stream.settle.set()
        await stream.tasks[2]

    site, _ = await site_with(make_site, sqlite_url, meanwhile)
    sent = list[str]()
    await call(site.app, sent)
    assert sent == ["200", "c", "rest"]


async def test_every_part_is_cancelled(make_site: MakeSite, sqlite_url: str) -> None:
    """The response goes out where all that waited has been given up."""

    async def meanwhile(stream: Stream, send: Send) -> None:
        await stream.ping(send, "a")
        stream.tasks[0].cancel()
        await asyncio.wait(stream.tasks)
        stream.settle.set()

    site, _ = await site_with(make_site, sqlite_url, meanwhile)
    sent = list[str]()
    await call(site.app, sent)
    assert sent == ["200", "rest"]


class GivesUp:
    """Answers 504 in place of an application that is cancelled."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application in a task of its own."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def call_application() -> None:
            await self.app(scope, receive, send)

        task = asyncio.create_task(call_application(), name="application")
        await asyncio.wait({task})
        await PlainTextResponse("too slow", 504)(scope, receive, send)


async def test_parts_of_a_response_that_was_cut_short(make_site: MakeSite, sqlite_url: str) -> None:
    """Parts whose start was cancelled are dropped, and the answer in its place is whole."""

    async def meanwhile(stream: Stream, send: Send) -> None:
        await stream.ping(send, "a", "b")
        (application,) = (task for task in asyncio.all_tasks() if task.get_name() == "application")
        application.cancel()
        await asyncio.gather(*stream.tasks)

    site, stream = await site_with(make_site, sqlite_url, meanwhile, inside=[Middleware(GivesUp)])
    stream.use = lambda: site.db.session.add(Note(text="new"))
    sent = list[str]()
    await call(site.app, sent)
    assert sent == ["504", "too slow"]
    assert await site.notes() == []


async def test_a_server_takes_what_was_sent_during_the_settlement(
    make_site: MakeSite, postgresql_url: str
) -> None:
    """A real server gets a stream whose ping comes while its start is settled, and the row is stored."""
    site, stream = await site_with(make_site, postgresql_url, Stream.ping_and_settle)
    stream.use = lambda: site.db.session.add(Note(text="new"))
    async with serve(site.app) as address, raw_get(address, "/") as response:
        assert await response.status() == 200
        body = await response.rest()
    assert [body.index(text) for text in (b"a\r", b"b\r", b"c\r", b"rest\r")] == sorted(
        body.index(text) for text in (b"a\r", b"b\r", b"c\r", b"rest\r")
    )
    assert await site.notes() == ["new"]


async def test_server_that_refuses_a_part(make_site: MakeSite, sqlite_url: str) -> None:
    """An error of one message is that message's own: those behind it go out."""
    site, stream = await site_with(make_site, sqlite_url, Stream.ping_and_settle)
    sent = list[str]()

    async def refusing(scope: Scope, receive: Receive, send: Send) -> None:
        async def forward(message: Message) -> None:
            if message.get("body") == b"b":
                raise OSError
            await send(message)

        await site.app(scope, receive, forward)

    with pytest.raises(OSError, match=r"^$"):
        await call(refusing, sent)
    assert sent == ["200", "a", "c", "rest"]
    assert [type(task.exception()) for task in stream.tasks] == [type(None), OSError, type(None)]
