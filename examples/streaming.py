"""Long responses: a CSV of any size, and server-sent events; `make example NAME=streaming` serves them."""

import asyncio
import csv
import json
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from io import StringIO
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from sqlalchemy import event, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.quickstart import serve
from fastapi_async_sqlalchemy import EngineArgs, SQLAlchemyMiddleware, db

ROWS_AT_A_TIME = 1000
KEEP_ALIVE = 15.0
"""Seconds until an idle stream sends a comment and checks for other processes' writes."""


class Base(DeclarativeBase):
    """The tables."""


class Reading(Base):
    """A temperature at a place."""

    __tablename__ = "reading"

    id: Mapped[int] = mapped_column(primary_key=True)
    place: Mapped[str]
    celsius: Mapped[int]


class NewReading(BaseModel):
    """The body of a client's request."""

    place: str
    celsius: int


class Bell:
    """Wakes the streams of this process."""

    def __init__(self) -> None:
        self._streams: set[asyncio.Event] = set()

    def ring(self) -> None:
        """Wake all listeners."""
        for stream in self._streams:
            stream.set()

    @contextmanager
    def listening(self) -> Generator[asyncio.Event]:
        """Yield an event that is set by each ring."""
        rung = asyncio.Event()
        self._streams.add(rung)
        try:
            yield rung
        finally:
            self._streams.discard(rung)


bell = Bell()
router = APIRouter()


@router.post("/readings", status_code=201)
async def add(new: NewReading) -> int:
    """Store a reading, and wake the streams once it is committed."""
    reading = Reading(place=new.place, celsius=new.celsius)
    db.session.add(reading)
    await db.session.flush()
    db.unit.on_commit(bell.ring)
    return reading.id


@router.get("/readings.csv")
async def export() -> StreamingResponse:
    """Send all readings as CSV."""
    headers = {"Content-Disposition": 'attachment; filename="readings.csv"'}
    return StreamingResponse(csv_lines(), media_type="text/csv", headers=headers)


async def csv_lines() -> AsyncIterator[str]:
    """Yield the rows in parts, so that only one part is in memory."""
    rows = select(Reading.id, Reading.place, Reading.celsius).order_by(Reading.id)
    found = await db.session.stream(rows.execution_options(yield_per=ROWS_AT_A_TIME))
    buffer = StringIO()
    lines = csv.writer(buffer)
    lines.writerow(found.keys())
    async for part in found.partitions():
        lines.writerows(part)
        yield buffer.getvalue()
        buffer.seek(0)
        buffer.truncate()
    yield buffer.getvalue()  # only the names of the columns, if there are no rows


@router.get("/events")
async def events() -> StreamingResponse:
    """Send the newest reading as an event, now and whenever it changes."""
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(newest(), media_type="text/event-stream", headers=headers)


async def newest() -> AsyncIterator[str]:
    """Query, send and wait; a connection is held only during the query.

    This sends a state and not a log: ids are not assigned in the order of COMMITs, so "all rows with a
    higher id" would miss some.
    """
    sent: int | None = None
    query = select(Reading).order_by(Reading.id.desc()).limit(1)
    with bell.listening() as rung:
        while True:
            rung.clear()
            async with db(read_only=True) as unit:
                reading = await unit.session.scalar(query)
            if reading is not None and reading.id != sent:
                sent = reading.id
                data = json.dumps({"place": reading.place, "celsius": reading.celsius})
                yield f"id: {reading.id}\ndata: {data}\n\n"
            else:
                yield ":\n\n"  # a comment, so that the server notices if the client has left
            with suppress(TimeoutError):
                await asyncio.wait_for(rung.wait(), KEEP_ALIVE)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    """Create the table if it is missing; in production, migrations do this."""
    if db.engine.dialect.name == "sqlite":
        event.listen(db.engine.sync_engine, "connect", let_readers_pass)
    await db.create_all(Base.metadata)
    yield


def let_readers_pass(connection: Any, _: object) -> None:
    """Put SQLite in WAL mode, so that a long export does not block writers."""
    connection.cursor().execute("PRAGMA journal_mode = WAL")


def create_app(db_url: str, engine_args: EngineArgs | None = None) -> FastAPI:
    """Create the application for one database."""
    app = FastAPI(title="Readings", lifespan=lifespan)
    app.add_middleware(SQLAlchemyMiddleware, db_url=db_url, engine_args=engine_args, commit_on_exit=True)
    app.include_router(router)
    return app


GUIDE = """
Open  {url}/docs

Follow the newest reading in a second terminal; the command prints each event, until Ctrl-C.
  curl -N {url}/events
Add two readings here: each is an event there, once it is committed.
  {post} '{{"place": "attic", "celsius": 31}}' {url}/readings
  {post} '{{"place": "cellar", "celsius": 12}}' {url}/readings
Read all readings as CSV; make example NAME=streaming_memory measures a million of them.
  curl {url}/readings.csv
"""


if __name__ == "__main__":
    serve(create_app, GUIDE)
