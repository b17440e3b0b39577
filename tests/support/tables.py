"""Tables of the tests, made for each of the three databases."""

import sqlite3
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

from sqlalchemy import AsyncAdaptedQueuePool, ForeignKey, String, event, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.schema import CreateTable


class Base(DeclarativeBase):
    """The metadata of all tables here."""


class Note(Base):
    """A row to write; its text is unique, so that a second one of the same text fails when it is flushed."""

    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(String(100), unique=True)


class Reply(Base):
    """A row that is checked at COMMIT: a reply to a note that does not exist makes COMMIT itself fail.

    There is no such table on MariaDB, which checks every constraint at its statement.
    """

    __tablename__ = "reply"

    id: Mapped[int] = mapped_column(primary_key=True)
    note_id: Mapped[int] = mapped_column(ForeignKey("note.id", deferrable=True, initially="DEFERRED"))


ORPHAN = {"note_id": 404}
"""The values of a reply whose COMMIT fails: `session.add(Reply(**ORPHAN))`."""


@asynccontextmanager
async def engine_with_tables(url: str, **engine_args: Any) -> AsyncGenerator[AsyncEngine]:
    """Make an engine on a database in which the tables are made; it is disposed on exit.

    Pass it as `custom_engine`. On SQLite it enforces foreign keys, so that a COMMIT can fail there too, waits
    longer than five seconds for others that write, as on a slow disk it may have to, and has a pool, which
    older SQLAlchemy gives SQLite files only where it is asked to.
    """
    patience = {"connect_args": {"timeout": 30}} if url.startswith("sqlite") else {}
    engine = create_async_engine(url, **{"poolclass": AsyncAdaptedQueuePool, **patience, **engine_args})
    if engine.dialect.name == "sqlite":
        event.listen(engine.sync_engine, "connect", _enforce_foreign_keys)
    try:
        await create_tables(engine)
        yield engine
    finally:
        await engine.dispose()


async def create_tables(engine: AsyncEngine) -> None:
    """Make the tables that this kind of database can have."""
    async with engine.begin() as connection:
        for statement in _statements(engine.dialect.name):
            await connection.exec_driver_sql(statement)


@cache
def _statements(kind: str) -> list[str]:
    """Write the statements that make the tables."""
    tables = ["note"] if kind == "mysql" else ["note", "reply"]
    dialect = make_url(f"{kind}://").get_dialect()()
    return [
        str(CreateTable(Base.metadata.tables[name], if_not_exists=True).compile(dialect=dialect))
        for name in tables
    ]


def _enforce_foreign_keys(connection: sqlite3.Connection, _: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()
