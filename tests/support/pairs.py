"""Two pairs in one application, and how to break the COMMIT of one."""

import asyncio
import itertools
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from attrs import Factory, define
from fastapi import FastAPI
from sqlalchemy import make_url, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from starlette.middleware import Middleware
from starlette.routing import BaseRoute, Mount

from fastapi_async_sqlalchemy import SessionProxy, create_middleware_and_session_proxy
from tests.support.databases import Judge, JudgeFor
from tests.support.site import checked_out
from tests.support.tables import ORPHAN, Note, Reply, engine_with_tables

DRIVERS = {
    "postgresql": "postgresql+asyncpg",
    "aiomysql": "mysql+aiomysql",
    "asyncmy": "mysql+asyncmy",
    "sqlite": "sqlite+aiosqlite",
}
COMBINATIONS = list(itertools.product(DRIVERS, DRIVERS))
ON_COMMIT = r"(?i)foreign key|lost connection|gone away"
"""What a database says of a COMMIT that `Side.break_commit` has broken."""
LATE = {"sqlite": {"connect_args": {"timeout": 30}}}
"""Engine arguments by kind for many writers: SQLite waits for a lock five seconds by default."""


class InnerSession(AsyncSession):
    """The session of the database whose middleware is inside."""


class OuterSession(AsyncSession):
    """The session of the database whose middleware is outside."""


@define(eq=False)
class Side:
    """One database of a test: its pair, its engine, and its judge."""

    session_class: type[AsyncSession]
    middleware: Any
    db: SessionProxy[AsyncSession]
    engine: AsyncEngine
    judge: Judge
    _judging: asyncio.Lock = Factory(asyncio.Lock)

    @property
    def label(self) -> str:
        """How messages begin to name the database."""
        url = self.engine.url
        return f"{self.session_class.__name__} ({url.drivername}:"

    def mounted(self, **options: Any) -> Middleware:
        """Return the pair's middleware for an application, committing."""
        return Middleware(
            self.middleware, **{"custom_engine": self.engine, "commit_on_exit": True, **options}
        )

    async def notes(self) -> list[object]:
        """Return the texts of the notes that are committed, in order."""
        return [note for (note,) in await self.judge.rows("SELECT text FROM note ORDER BY text")]

    async def add(self, note: str) -> None:
        """Write a note by the current unit."""
        self.db.session.add(Note(text=note))
        await self.db.session.flush()

    async def read(self) -> list[str]:
        """Read the notes by the current unit."""
        return list(await self.db.session.scalars(select(Note.text).order_by(Note.text)))

    def break_commit(self) -> None:
        """Make the COMMIT of the current unit fail: by a deferred constraint, or without its connection.

        MariaDB checks every constraint at its statement.
        """
        session = self.db.session
        if self.engine.dialect.name == "mysql":
            self.db.unit.before_commit(lambda: self._kill(session))
        else:
            session.add(Reply(**ORPHAN))

    async def _kill(self, session: AsyncSession) -> None:
        connection = await session.scalar(text("SELECT connection_id()"))
        listed = "SELECT id FROM information_schema.processlist WHERE id = :id"
        async with self._judging:
            await self.judge.execute(f"KILL {connection}")
            while await self.judge.scalar(listed, id=connection) is not None:
                pass


@define(eq=False)
class Pair:
    """The two databases, by the place of their middlewares."""

    inner: Side
    outer: Side

    @property
    def sides(self) -> tuple[Side, Side]:
        """Both, the inner one first."""
        return self.inner, self.outer

    def app(self, **options: Any) -> FastAPI:
        """Make an application with both middlewares."""
        return app_of(self.outer.mounted(), self.inner.mounted(), **options)

    async def add(self, note: str) -> None:
        """Write a note to both, by the current units."""
        for side in self.sides:
            await side.add(note)

    async def notes(self) -> tuple[list[object], list[object]]:
        """Return what is committed on the inner side, and on the outer one."""
        return await self.inner.notes(), await self.outer.notes()

    def checked_out(self) -> list[int]:
        """Return how many connections are out of the pool on each side."""
        return [checked_out(side.engine.pool) for side in self.sides]


def app_of(*middlewares: Middleware, **mounted: FastAPI) -> FastAPI:
    """Make an application, the outermost middleware first, with other applications at their names."""
    routes: list[BaseRoute] = [Mount(f"/{name}", app) for name, app in mounted.items()]
    return FastAPI(middleware=list(middlewares), routes=routes or None)


@asynccontextmanager
async def open_side(session_class: type[AsyncSession], url: str, judge_for: JudgeFor) -> AsyncGenerator[Side]:
    """Make a pair of its own for a database with tables; on exit no connection may be out."""
    middleware, db = create_middleware_and_session_proxy(session_class)
    kind = make_url(url)
    witness = url
    if kind.get_backend_name() == "mysql":  # the judge must not depend on the driver under test
        witness = kind.set(drivername=DRIVERS["aiomysql"]).render_as_string(hide_password=False)
    async with engine_with_tables(url, **LATE.get(kind.get_backend_name(), {})) as engine:
        yield Side(session_class, middleware, db, engine, await judge_for(witness))
        assert checked_out(engine.pool) == 0


def id_of(kinds: tuple[str, ...]) -> str:
    """Name a combination, the innermost first."""
    return " in ".join(kinds)


every_combination = pytest.mark.parametrize("kinds", COMBINATIONS, ids=id_of)
