"""Notes on a cluster that are written on the leader, read from a standby, and survive a failover.

A client that is answered 503 asks again. A note has the client's key, so that a client may repeat a write
whose outcome it does not know.
"""

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Annotated

from asyncpg.exceptions import (  # type: ignore[import-untyped]  # pyright: ignore[reportMissingTypeStubs]  # it has no types
    PostgresError,
    TargetServerAttributeNotMatched,
)
from fastapi import APIRouter, FastAPI, Header, HTTPException, Path, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.cluster.hosts import connect_to_first
from fastapi_async_sqlalchemy import (
    EngineArgs,
    UnitOfWork,
    WalPosition,
    create_middleware_and_session_proxy,
    is_unavailable,
)

ENGINE_ARGS: EngineArgs = {
    "pool_size": 10,
    "max_overflow": 0,
    "pool_timeout": 3.0,
    "pool_pre_ping": True,
    "connect_args": {"timeout": 3, "command_timeout": 10, "async_creator_fn": connect_to_first},
}


class PrimarySession(AsyncSession):
    """A session that writes."""


class ReplicaSession(AsyncSession):
    """A session that reads, with a separate type so that functions that write refuse it."""


PrimaryMiddleware, primary = create_middleware_and_session_proxy(PrimarySession)
ReplicaMiddleware, replica = create_middleware_and_session_proxy(ReplicaSession, read_only=True)


class Base(DeclarativeBase):
    """The tables."""


class Note(Base):
    """A note, with a key chosen by its client."""

    __tablename__ = "note"

    key: Mapped[str] = mapped_column(primary_key=True)
    text: Mapped[str]


class Body(BaseModel):
    """The body of requests and responses."""

    text: str


Key = Annotated[str, Path(max_length=100)]
Position = Annotated[str | None, Header(pattern=r"^[0-9A-F]{1,8}/[0-9A-F]{1,8}$")]

router = APIRouter()


@router.put("/notes/{key}", status_code=201)
async def write(key: Key, body: Body, response: Response) -> None:
    """Store a note unless this key exists, and return its position after COMMIT."""
    await primary.session.execute(insert(Note).values(key=key, text=body.text).on_conflict_do_nothing())
    await primary.unit.commit()
    response.headers["X-Position"] = await primary.commit_position()


@router.get("/notes/{key}")
async def read(key: Key, x_position: Position = None) -> Body:
    """Return a note; a note that was written before the position is always found."""
    async with reading(x_position) as unit:
        note = await unit.session.get(Note, key)
        if note is None:
            raise HTTPException(404)
        return Body(text=note.text)


@router.get("/servers")
async def servers() -> dict[str, str | None]:
    """Return the servers that the two pairs have reached."""
    where = select(func.concat(func.inet_server_addr(), ":", func.inet_server_port()))
    return {"primary": await primary.session.scalar(where), "replica": await replica.session.scalar(where)}


def reading(position: str | None) -> AbstractAsyncContextManager[UnitOfWork[ReplicaSession], None]:
    """Return a unit that only reads, on a standby, or on the leader if the standby lags."""
    if position is None:
        return replica()
    return replica.after(WalPosition(position), timeout=0.5, fallback=primary)


async def unavailable(_: Request, error: Exception) -> Response:
    """Answer 503 if the database cannot serve the request now, because a failover takes a moment."""
    if not is_unavailable(error):
        raise error
    return JSONResponse({"unavailable": type(error).__name__}, status_code=503, headers={"Retry-After": "1"})


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    """Create the table, and wait for the standbys, because some reads do not wait."""
    await primary.create_all(Base.metadata)
    async with replica.after(await primary.commit_position(), timeout=5, fallback=primary):
        pass
    yield


def create_app(primary_url: str, replica_url: str, engine_args: EngineArgs = ENGINE_ARGS) -> FastAPI:
    """Create the application for the URLs of the two roles."""
    app = FastAPI(title="Cluster", lifespan=lifespan)
    app.add_middleware(PrimaryMiddleware, db_url=primary_url, engine_args=engine_args)
    app.add_middleware(ReplicaMiddleware, db_url=replica_url, engine_args=engine_args)
    app.include_router(router)
    by_asyncpg = (PostgresError, TargetServerAttributeNotMatched)  # SQLAlchemy 2.0 passes them on
    for error in (DBAPIError, OSError, *by_asyncpg):
        app.add_exception_handler(error, unavailable)
    return app
