"""A chat: each message is a unit of work, and is told to the room once it is committed.

`python examples/websocket.py` serves it on an SQLite file; it needs this package with its extra [sqlite],
uvicorn and websockets. DATABASE_URL names another database. In two terminals:

    python -m websockets 'ws://127.0.0.1:8000/rooms/kitchen?name=ann'
    python -m websockets 'ws://127.0.0.1:8000/rooms/kitchen?name=bob'

The rooms are those of one process. Several processes have to tell each other, for example by Redis.
"""

import asyncio
import os
from collections import defaultdict
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Annotated

import uvicorn
from fastapi import APIRouter, FastAPI, Query, WebSocket, WebSocketDisconnect
from sqlalchemy import CheckConstraint, String, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fastapi_async_sqlalchemy import EngineArgs, PoolTimeoutError, SQLAlchemyMiddleware, db

BACKLOG = 20
"""How many earlier messages a newcomer gets, and how many a slow client may be behind."""


class Base(DeclarativeBase):
    """The tables."""


class Message(Base):
    """What somebody said; the database refuses what is empty or too long."""

    __tablename__ = "message"
    __table_args__ = (CheckConstraint("length(text) BETWEEN 1 AND 200", name="some_words"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    room: Mapped[str] = mapped_column(String(50), index=True)
    name: Mapped[str] = mapped_column(String(50))
    text: Mapped[str] = mapped_column(String(10_000))

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"


class Slow(Exception):  # noqa: N818  # it ends a conversation and is nobody's mistake
    """A client does not read what it is sent."""


class Rooms:
    """Who is in which room of this process."""

    def __init__(self) -> None:
        self._members: defaultdict[str, set[asyncio.Queue[Message | None]]] = defaultdict(set)

    @contextmanager
    def join(self, room: str) -> Generator[asyncio.Queue[Message | None]]:
        """Be in a room; what is said there comes to the queue, and None once it has overflowed."""
        inbox = asyncio.Queue[Message | None](BACKLOG + 1)
        self._members[room].add(inbox)
        try:
            yield inbox
        finally:
            self._leave(room, inbox)

    def tell(self, message: Message) -> None:
        """Tell all that are in the room; those that are too far behind have to leave it."""
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
    """Store a message, and tell the room when it is committed."""
    async with db.begin() as unit:
        message = Message(room=room, name=name, text=text)
        unit.session.add(message)
        unit.on_commit(partial(rooms.tell, message))


async def listen(websocket: WebSocket, room: str, name: str) -> None:
    """Store what a client says; a message that fails is answered, and the next one is welcome."""
    async for text in websocket.iter_text():
        try:
            await say(room, name, text)
        except PoolTimeoutError:
            await websocket.send_text("! too much to do, say it again")
        except SQLAlchemyError as error:
            await websocket.send_text(f"! not said: {getattr(error, 'orig', error)}")


async def forward(websocket: WebSocket, room: str, inbox: asyncio.Queue[Message | None]) -> None:
    """Send what was said before, and then what comes to the inbox; nothing of it twice."""
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
    """Be in a room until one side ends it; nothing is held while nobody says anything."""
    await websocket.accept()
    with rooms.join(room) as inbox:  # before the look at what was said: so nothing is missed
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
    """Make the table that is not there yet; a deployed application leaves that to its migrations."""
    await db.create_all(Base.metadata)
    yield


def create_app(db_url: str, engine_args: EngineArgs | None = None) -> FastAPI:
    """Make the application for one database."""
    app = FastAPI(title="Chat", lifespan=lifespan)
    app.add_middleware(SQLAlchemyMiddleware, db_url=db_url, engine_args=engine_args)
    app.include_router(router)
    return app


if __name__ == "__main__":
    uvicorn.run(create_app(os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///chat.db")))
