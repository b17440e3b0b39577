"""A chat: each message is a unit of work, and is sent to the room once it is committed.

`make example NAME=websocket` serves it. uvicorn needs the package websockets, which also has a client. The
rooms belong to one process; several processes need a channel between them, such as Redis.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Annotated

from fastapi import APIRouter, FastAPI, Query, WebSocket, WebSocketDisconnect
from sqlalchemy import CheckConstraint, String, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.quickstart import serve
from fastapi_async_sqlalchemy import EngineArgs, PoolTimeoutError, SQLAlchemyMiddleware, db

BACKLOG = 20
"""How many earlier messages a new member gets, and how many a slow client may lag behind."""


class Base(DeclarativeBase):
    """The tables."""


class Message(Base):
    """A message; the database refuses an empty or too long text."""

    __tablename__ = "message"
    __table_args__ = (CheckConstraint("length(text) BETWEEN 1 AND 200", name="some_words"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    room: Mapped[str] = mapped_column(String(50), index=True)
    name: Mapped[str] = mapped_column(String(50))
    text: Mapped[str] = mapped_column(String(10_000))

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"


class Slow(Exception):  # noqa: N818  # it ends a conversation and is not an error
    """A client does not read its messages fast enough."""


class Rooms:
    """The members of each room in this process."""

    def __init__(self) -> None:
        self._members: defaultdict[str, set[asyncio.Queue[Message | None]]] = defaultdict(set)

    @contextmanager
    def join(self, room: str) -> Generator[asyncio.Queue[Message | None]]:
        """Join a room; the queue receives its messages, and None if the queue has overflowed."""
        inbox = asyncio.Queue[Message | None](BACKLOG + 1)
        self._members[room].add(inbox)
        try:
            yield inbox
        finally:
            self._leave(room, inbox)

    def tell(self, message: Message) -> None:
        """Send a message to all members of its room; remove members that are too far behind."""
        for inbox in [*self._members[message.room]]:
            if inbox.qsize() < BACKLOG:
                inbox.put_nowait(message)
            else:
                inbox.put_nowait(None)
                self._leave(message.room, inbox)

    def _leave(self, room: str, inbox: asyncio.Queue[Message | None]) -> None:
        self._members[room].discard(inbox)
        if not self._members[room]:
            del self._members[room]


rooms = Rooms()
router = APIRouter()


async def read_earlier(room: str) -> list[Message]:
    """Return the last messages of a room, the oldest first."""
    newest = select(Message).where(Message.room == room).order_by(Message.id.desc()).limit(BACKLOG)
    async with db(read_only=True) as unit:
        return [*reversed((await unit.session.scalars(newest)).all())]


async def say(room: str, name: str, text: str) -> None:
    """Store a message, and send it to the room after COMMIT."""
    async with db.begin() as unit:
        message = Message(room=room, name=name, text=text)
        unit.session.add(message)
        unit.on_commit(partial(rooms.tell, message))


async def listen(websocket: WebSocket, room: str, name: str) -> None:
    """Store a client's messages; answer a message that fails, and continue with the next one."""
    async for text in websocket.iter_text():
        try:
            await say(room, name, text)
        except PoolTimeoutError:
            await websocket.send_text("! too much to do, say it again")
        except SQLAlchemyError as error:
            await websocket.send_text(f"! not said: {getattr(error, 'orig', error)}")


async def forward(websocket: WebSocket, room: str, inbox: asyncio.Queue[Message | None]) -> None:
    """Send the earlier messages, and then those from the inbox, each only once."""
    earlier = await read_earlier(room)
    for message in earlier:
        await websocket.send_text(str(message))
    known = {message.id for message in earlier}
    while (said := await inbox.get()) is not None:
        if said.id not in known:
            await websocket.send_text(str(said))
    raise Slow


@router.websocket("/rooms/{room}")
async def chat(websocket: WebSocket, room: str, name: Annotated[str, Query(max_length=50)]) -> None:
    """Take part in a room until one side leaves; hold no connection while the room is quiet."""
    await websocket.accept()
    with rooms.join(room) as inbox:  # before the earlier messages are read, so that none is missed
        try:
            async with asyncio.TaskGroup() as tasks:
                forwarding = tasks.create_task(forward(websocket, room, inbox))
                await listen(websocket, room, name)
                forwarding.cancel()
        except* Slow:
            await websocket.close(1013, "too slow")
        except* WebSocketDisconnect:
            pass


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    """Create the table if it is missing; in production, migrations do this."""
    await db.create_all(Base.metadata)
    yield


def create_app(db_url: str, engine_args: EngineArgs | None = None) -> FastAPI:
    """Create the application for one database."""
    app = FastAPI(title="Chat", lifespan=lifespan)
    app.add_middleware(SQLAlchemyMiddleware, db_url=db_url, engine_args=engine_args)
    app.include_router(router)
    return app


GUIDE = """
Join the room as ann and as bob, each in a separate terminal. What one of them types, both receive.
  {python} -m websockets 'ws://{address}/rooms/kitchen?name=ann'
  {python} -m websockets 'ws://{address}/rooms/kitchen?name=bob'
Join as joe later, to receive the messages that were sent before.
  {python} -m websockets 'ws://{address}/rooms/kitchen?name=joe'
Send a message of more than 200 characters: only its sender learns that the database refused it.
"""


if __name__ == "__main__":
    serve(create_app, GUIDE)
