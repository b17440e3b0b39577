"""Tenants that share tables: PostgreSQL's row-level security limits each tenant to its own rows."""

from collections.abc import AsyncGenerator
from contextvars import ContextVar
from typing import Annotated

from fastapi import BackgroundTasks, Depends, FastAPI, Header, HTTPException
from fastapi.responses import StreamingResponse
from sqlalchemy import Connection, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fastapi_async_sqlalchemy import EngineArgs, UnitOfWork, create_middleware_and_session_proxy

TenantMiddleware, db = create_middleware_and_session_proxy(AsyncSession)
tenant = ContextVar[str]("tenant")


class Base(DeclarativeBase):
    """The tables that tenants share."""


class Note(Base):
    """A note of a tenant; the database fills in the tenant."""

    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(server_default=func.current_setting("app.tenant"), index=True)
    text: Mapped[str]


POLICY = (
    "ALTER TABLE note ENABLE ROW LEVEL SECURITY",
    "ALTER TABLE note FORCE ROW LEVEL SECURITY",
    "CREATE POLICY own_rows ON note USING (tenant = current_setting('app.tenant'))",
)
"""The statements for a migration; the policy applies to reads and to writes."""


def set_tenant(unit: UnitOfWork[AsyncSession]) -> None:
    """Set the tenant in each transaction of a unit; raise LookupError if there is no tenant."""
    name = tenant.get()

    def begin(connection: Connection) -> None:
        connection.execute(select(func.set_config("app.tenant", name, True)))  # noqa: FBT003  # SQL's own flag

    unit.on_begin(begin)


db.on_open(set_tenant)

TENANTS = {"Bearer 6b1f": "acme", "Bearer 93d0": "initech"}
"""In production, read them from a signed token or from a table of another pair."""


async def authenticate(authorization: Annotated[str, Header()]) -> None:
    """Set the request's tenant; a plain function would run in a thread and set only a copy."""
    if authorization not in TENANTS:
        raise HTTPException(401)
    tenant.set(TENANTS[authorization])


async def write(text: str, later: BackgroundTasks) -> list[str]:
    """Add a note, and another one after the response."""
    db.session.add(Note(text=text))
    later.add_task(follow_up, text)
    return await read()


async def follow_up(text: str) -> None:
    """Add a note in the tail."""
    db.session.add(Note(text=f"{text}, later"))


async def read() -> list[str]:
    """Return all notes of the tenant; the statement does not name it."""
    return list(await db.session.scalars(select(Note.text).order_by(Note.id)))


async def stream() -> StreamingResponse:
    """Read in the body of a stream, in the tail."""

    async def lines() -> AsyncGenerator[str]:
        for text in await read():
            yield f"{text}\n"

    return StreamingResponse(lines())


def create_app(url: str, engine_args: EngineArgs | None = None) -> FastAPI:
    """Create the application; its database user is neither the table's owner nor a superuser."""
    app = FastAPI(dependencies=[Depends(authenticate)])
    app.add_middleware(TenantMiddleware, db_url=url, engine_args=engine_args, commit_on_exit=True)
    app.add_api_route("/notes", write, methods=["POST"])
    app.add_api_route("/notes", read)
    app.add_api_route("/stream", stream, response_model=None)
    return app
