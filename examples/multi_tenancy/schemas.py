"""Tenants with separate schemas: the same models, with the tables of the current tenant."""

from contextvars import ContextVar

from sqlalchemy import Connection, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.schema import CreateSchema

from fastapi_async_sqlalchemy import UnitOfWork, create_middleware_and_session_proxy

TenantMiddleware, db = create_middleware_and_session_proxy(AsyncSession)
schema = ContextVar[str]("schema")


class Base(DeclarativeBase):
    """The tables of one tenant."""


class Note(Base):
    """A note."""

    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


def translate(unit: UnitOfWork[AsyncSession]) -> None:
    """Prefix tables with the tenant's schema in all statements that SQLAlchemy generates."""
    name = schema.get()

    def begin(connection: Connection) -> None:
        connection.execution_options(schema_translate_map={None: name})

    unit.on_begin(begin)


def set_search_path(unit: UnitOfWork[AsyncSession]) -> None:
    """Make PostgreSQL search for tables in the tenant's schema, for all SQL."""
    name = schema.get()

    def begin(connection: Connection) -> None:
        path = func.quote_ident(name)
        connection.execute(select(func.set_config("search_path", path, True)))  # noqa: FBT003  # SQL's own flag

    unit.on_begin(begin)


db.on_open(translate)


async def add_tenant(name: str) -> None:
    """Create a tenant's schema and its tables."""
    async with db.engine.begin() as connection:
        await connection.execute(CreateSchema(name))
    schema.set(name)
    await db.create_all(Base.metadata)


async def write(text: str) -> None:
    """Add a note."""
    db.session.add(Note(text=text))


async def read() -> list[str]:
    """Return all notes of the tenant."""
    return list(await db.session.scalars(select(Note.text).order_by(Note.id)))
