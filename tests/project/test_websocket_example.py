"""The chat: a unit of work for each message, and a socket that outlives a message that fails."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Protocol

import pytest
from sqlalchemy import AsyncAdaptedQueuePool
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from examples.websocket import BACKLOG, Message, Rooms, create_app
from fastapi_async_sqlalchemy import EngineArgs, db
from fastapi_async_sqlalchemy.testing import SandboxedApp
from tests.support.databases import JudgeFor
from tests.support.serving import serve

ONE_CONNECTION: EngineArgs = {"poolclass": AsyncAdaptedQueuePool, "pool_size": 1, "max_overflow": 0}
pytestmark = pytest.mark.filterwarnings(
    "ignore:(?s).*session.exec:DeprecationWarning"  # SQLModel's, about its execute()
)


class Enter(Protocol):
    """Enters a room."""

    async def __call__(self, room: str, name: str) -> ClientConnection:
        """Return the client's socket."""
        ...


@asynccontextmanager
async def chat(app: SandboxedApp) -> AsyncGenerator[Enter]:
    """Serve the chat in its sandbox, and yield what enters a room."""
    async with serve(app) as address, AsyncExitStack() as sockets:

        async def enter(room: str, name: str) -> ClientConnection:
            url = f"ws://{address.host}:{address.port}/rooms/{room}?name={name}"
            return await sockets.enter_async_context(connect(url, proxy=None))

        yield enter


def sandboxed(url: str) -> SandboxedApp:
    """Return the chat, of which nothing stays."""
    return SandboxedApp(create_app(url, ONE_CONNECTION), db)


async def test_room_hears_what_is_said(deferring_url: str) -> None:
    """Both hear each message, somebody in another room does not, and a newcomer gets what was said before."""
    async with chat(sandboxed(deferring_url)) as enter:
        ann, bob = await enter("kitchen", "ann"), await enter("kitchen", "bob")
        other = await enter("attic", "eve")
        await ann.send("tea?")
        assert [await ann.recv(), await bob.recv()] == ["ann: tea?"] * 2
        assert db.pool_status().checked_out == 0
        await bob.send("yes")
        assert [await ann.recv(), await bob.recv()] == ["bob: yes"] * 2
        late = await enter("kitchen", "joe")
        assert [await late.recv(), await late.recv()] == ["ann: tea?", "bob: yes"]
        await other.send("alone")
        assert await other.recv() == "eve: alone"


async def test_message_that_fails_leaves_the_socket_usable(deferring_url: str) -> None:
    """A message that the database refuses is answered to its sender alone, and the next one is heard."""
    async with chat(sandboxed(deferring_url)) as enter:
        ann, bob = await enter("kitchen", "ann"), await enter("kitchen", "bob")
        await ann.send("x" * 201)
        assert str(await ann.recv()).startswith("! not said: ")
        await ann.send("tea?")
        assert [await ann.recv(), await bob.recv()] == ["ann: tea?"] * 2


@pytest.mark.parametrize("kind", ["constraint", "conflict"])
async def test_room_hears_nothing_where_commit_fails(deferring_url: str, kind: str) -> None:
    """A message whose COMMIT fails is told to nobody, and is not there for a newcomer."""
    app = sandboxed(deferring_url)
    async with chat(app) as enter:
        ann, bob = await enter("kitchen", "ann"), await enter("kitchen", "bob")
        app.box.fail_commit("constraint" if kind == "constraint" else "conflict")
        await ann.send("lost")
        assert str(await ann.recv()).startswith("! not said: ")
        await ann.send("kept")
        assert [await ann.recv(), await bob.recv()] == ["ann: kept"] * 2
        assert await (await enter("kitchen", "joe")).recv() == "ann: kept"


async def test_messages_stay(postgresql_url: str, judge_for: JudgeFor) -> None:
    """Without a sandbox many clients share one connection, and each message is stored once."""
    async with AsyncExitStack() as opened:
        address = await opened.enter_async_context(serve(create_app(postgresql_url, ONE_CONNECTION)))
        url = f"ws://{address.host}:{address.port}/rooms/kitchen?name="
        sockets = [await opened.enter_async_context(connect(f"{url}{n}", proxy=None)) for n in range(8)]
        await asyncio.gather(*(socket.send("hello") for socket in sockets))
        heard = [sorted([str(await socket.recv()) for _ in sockets]) for socket in sockets]
        assert heard == [[f"{n}: hello" for n in range(8)]] * 8
        judge = await judge_for(postgresql_url)
        assert await judge.rows("SELECT name, text FROM message ORDER BY name") == [
            (str(n), "hello") for n in range(8)
        ]


async def test_client_without_a_name_is_refused(sqlite_url: str) -> None:
    """A socket without a name is closed before it is open."""
    async with serve(create_app(sqlite_url)) as address:
        with pytest.raises(Exception, match="403"):
            async with connect(f"ws://{address.host}:{address.port}/rooms/kitchen", proxy=None):
                pass


async def test_slow_client_leaves_the_room() -> None:
    """A client that is too far behind gets None in the place of what it has missed, and nothing after it."""
    rooms = Rooms()
    with rooms.join("kitchen") as slow, rooms.join("kitchen") as fast:
        for number in range(BACKLOG + 2):
            rooms.tell(Message(room="kitchen", id=number))
            heard = fast.get_nowait()
            assert heard
            assert heard.id == number
        *kept, last = (slow.get_nowait() for _ in range(slow.qsize()))
        assert [message.id for message in kept if message] == [*range(BACKLOG)]
        assert last is None


async def test_client_that_goes_leaves_the_room(sqlite_url: str) -> None:
    """The others go on when one has closed its socket in the middle of the conversation."""
    async with serve(create_app(sqlite_url)) as address:
        url = f"ws://{address.host}:{address.port}/rooms/kitchen?name="
        async with connect(f"{url}ann", proxy=None) as ann:
            async with connect(f"{url}bob", proxy=None) as bob:
                await bob.send("bye")
                assert [await ann.recv(), await bob.recv()] == ["bob: bye"] * 2
                bob.transport.abort()
                with pytest.raises(ConnectionClosed):
                    await bob.recv()
            await ann.send("gone?")
            assert await ann.recv() == "ann: gone?"
