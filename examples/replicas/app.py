"""Notes that are written on a primary and read from its replica; clients read their own writes.

A write answers its position in the primary's log; a read that sends it back waits until the replica is that
far, or is served by the primary. Positions travel in a header: the server keeps nothing between requests.
"""

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Annotated

from fastapi import APIRouter, FastAPI, Header, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy import func, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fastapi_async_sqlalchemy import (
    EngineArgs,
    UnitOfWork,
    WalPosition,
    create_middleware_and_session_proxy,
    is_unavailable,
)

ENGINE_ARGS: EngineArgs = {"pool_pre_ping": True, "connect_args": {"timeout": 5, "command_timeout": 60}}


class PrimarySession(AsyncSession):
    """A session that writes."""


class ReplicaSession(AsyncSession):
    """A session that reads, with a separate type so that functions that write refuse it."""


PrimaryMiddleware, primary = create_middleware_and_session_proxy(PrimarySession)
ReplicaMiddleware, replica = create_middleware_and_session_proxy(ReplicaSession, read_only=True)


class Base(DeclarativeBase):
    """The tables."""


class Note(Base):
    """A note."""

    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


class NewNote(BaseModel):
    """The body of a client's request."""

    text: str


class ReadNote(BaseModel):
    """The body of a response, with the server that answered."""

    text: str
    server: str


Position = Annotated[str | None, Header(alias="X-Position", pattern=r"^[0-9A-F]{1,8}/[0-9A-F]{1,8}$")]
"""A client can send anything; an invalid position gets a 422."""

router = APIRouter()


@router.post("/notes", status_code=201)
async def write(new: NewNote, response: Response) -> int:
    """Store a note, and return its position, which is known after COMMIT."""
    note = Note(text=new.text)
    primary.session.add(note)
    await primary.unit.commit()
    response.headers["X-Position"] = await primary.commit_position()
    return note.id


@router.get("/notes/{number}")
async def read(number: int, position: Position = None) -> ReadNote:
    """Return a note; a note that was written before the position is always found."""
    async with reading(position) as unit:
        note = await unit.session.get(Note, number)
        if note is None:
            raise HTTPException(404)
        is_standby = await unit.session.scalar(select(func.pg_is_in_recovery()))
        return ReadNote(text=note.text, server="standby" if is_standby else "primary")


def reading(position: str | None) -> AbstractAsyncContextManager[UnitOfWork[ReplicaSession], None]:
    """Return a unit that only reads, on the replica, or on the primary if the replica lags."""
    if position is None:
        return replica()
    return replica.after(WalPosition(position), timeout=0.5, fallback=primary)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    """Create the table on the primary, and wait for the replica, which may be read without waiting."""
    await primary.create_all(Base.metadata)
    async with replica.after(await primary.commit_position(), timeout=5, fallback=primary):
        pass
    yield


async def unavailable(_: Request, error: Exception) -> Response:
    """Answer 503 if the database cannot serve the request now, because a failover takes a moment."""
    if not is_unavailable(error):
        raise error
    return JSONResponse({"unavailable": type(error).__name__}, status_code=503, headers={"Retry-After": "1"})


def create_app(primary_url: str, replica_url: str) -> FastAPI:
    """Create the application for the two roles; each URL names both servers."""
    app = FastAPI(title="Replicas", lifespan=lifespan)
    app.add_middleware(PrimaryMiddleware, db_url=primary_url, engine_args=ENGINE_ARGS, commit_on_exit=True)
    app.add_middleware(ReplicaMiddleware, db_url=replica_url, engine_args=ENGINE_ARGS)
    app.include_router(router)
    for error in (DBAPIError, OSError):
        app.add_exception_handler(error, unavailable)
    return app
