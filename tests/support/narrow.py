"""A process without an application, with a pool of one connection."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_async_sqlalchemy import SessionProxy
from tests.support.site import Site
from tests.support.tables import Note

Db = SessionProxy[AsyncSession]
DEADLINE = 30
"""Seconds after which something hangs, however busy the machine is."""
TIMEOUT = 0.2
"""Seconds that a unit waits for a connection here."""
ENDED = "has ended and can be used only once"


class BoomError(Exception):
    """The error of a test's own."""

    def __init__(self) -> None:
        super().__init__("boom")


async def write(db: Db, note: str) -> None:
    """Write a note in the current unit."""
    db.session.add(Note(text=note))
    await db.session.flush()


async def read(db: Db) -> object:
    """Read in the current unit."""
    return await db.session.scalar(select(1))


@asynccontextmanager
async def held(narrow: Site) -> AsyncGenerator[None]:
    """Have somebody else hold the only connection."""
    async with narrow.engine.connect():
        yield
