"""Blocks that commit without saying so each time, a unit as a dependency, and tables in one line."""

import asyncio
from typing import Annotated

import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import String, func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fastapi_async_sqlalchemy import (
    MissingSessionError,
    PropagationError,
    SessionProxy,
    UnitOfWork,
    create_middleware_and_session_proxy,
)
from tests.support.dependency import needs_function_scope
from tests.support.serving import asgi_client
from tests.support.site import Site
from tests.support.tables import Note


class Own(DeclarativeBase):
    """The tables that these tests make themselves."""


class Mark(Own):
    """A row of such a table."""

    __tablename__ = "mark"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(String(100))


COUNT = select(func.count(Mark.id))


async def test_begin_commits(worker: Site) -> None:
    """The end of the block commits, and an error that leaves it rolls back."""
    async with worker.db.begin() as unit:
        unit.session.add(Note(text="kept"))

    async def fail() -> None:
        async with worker.db.begin() as unit:
            unit.session.add(Note(text="lost"))
            await unit.session.flush()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert await worker.judge.scalar("SELECT COUNT(*) FROM note") == 1


async def test_begin_joins(worker: Site) -> None:
    """A block that joins leaves COMMIT to its owner."""
    async with worker.db() as outer, worker.db.begin(propagation="required") as inner:
        assert inner is outer
        inner.session.add(Note(text="of the owner's"))
        await inner.rollback()
    with pytest.raises(PropagationError):
        async with worker.db.begin(propagation="mandatory"):
            pytest.fail("there is no unit to join")
    assert await worker.judge.scalar("SELECT COUNT(*) FROM note") == 0


async def test_per_task(worker: Site) -> None:
    """Each task of the block has a unit, which commits at its end; a bound holds for all of them."""
    db = worker.db
    most = 0

    async def write(number: int) -> None:
        nonlocal most
        db.session.add(Note(text=f"note {number}"))
        await db.session.flush()
        most = max(most, worker.checked_out())
        await asyncio.sleep(0)

    async with db.per_task(max_concurrent=1, commit_on_exit=True):
        await asyncio.gather(*[write(number) for number in range(4)])
    assert await worker.judge.scalar("SELECT COUNT(*) FROM note") == 4
    assert most == 1


def pairs() -> tuple[SessionProxy[AsyncSession], SessionProxy[AsyncSession]]:
    """Make a pair that commits, and one that does not."""
    _, commits = create_middleware_and_session_proxy(AsyncSession, commit_on_exit=True)
    _, keeps = create_middleware_and_session_proxy(AsyncSession)
    return commits, keeps


async def test_pair_that_commits(database_url: str) -> None:
    """A pair says once that its blocks commit: those of tasks too; a block may say otherwise."""
    db, _ = pairs()
    async with db.connect(database_url):
        await db.create_all(Own.metadata)
        async with db() as unit:
            unit.session.add(Mark(text="in a block"))
        async with db(commit_on_exit=False) as unit:
            unit.session.add(Mark(text="not in this one"))
        async with db.connection() as session:
            session.add(Mark(text="by a connection"))

        async def write() -> None:
            db.session.add(Mark(text="in a task"))

        await db.gather(write())
        async with db() as unit:
            assert await unit.session.scalar(COUNT) == 3


async def test_connection_that_commits(sqlite_url: str) -> None:
    """`db.connect()` says it for as long as the engine is used, and no longer."""
    _, db = pairs()
    async with db.connect(sqlite_url, commit_on_exit=True):
        await db.create_all(Own.metadata)
        async with db() as unit:
            unit.session.add(Mark(text="kept"))
    async with db.connect(sqlite_url):
        async with db() as unit:
            unit.session.add(Mark(text="lost"))
            await unit.session.flush()
        async with db() as unit:
            assert await unit.session.scalar(COUNT) == 1
    used_again = db.connect(sqlite_url, commit_on_exit=True)
    for number in range(2, 4):
        async with used_again:
            async with db() as unit:
                unit.session.add(Mark(text="kept each time"))
            async with db() as unit:
                assert await unit.session.scalar(COUNT) == number
    commits, _ = pairs()
    async with commits.connect(sqlite_url, commit_on_exit=False):
        async with commits() as unit:
            unit.session.add(Mark(text="lost, too"))
            await unit.session.flush()
        async with commits() as unit:
            assert await unit.session.scalar(COUNT) == 3


@pytest.mark.parametrize(("given", "kept"), [(None, 1), (True, 1), (False, 0)])
async def test_middleware_of_a_pair_that_commits(sqlite_url: str, *, given: bool | None, kept: int) -> None:
    """The middleware of such a pair commits a successful response, unless it says otherwise."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession, commit_on_exit=True)
    app = FastAPI()

    @app.post("/")
    async def write(unit: Annotated[UnitOfWork[AsyncSession], Depends(db.unit_dependency)]) -> bool:
        unit.session.add(Mark(text="written"))
        await unit.session.flush()
        return unit is db.unit

    async with db.connect(sqlite_url):
        await db.create_all(Own.metadata)
        app.add_middleware(middleware, commit_on_exit=given)
        async with asgi_client(app) as client:
            assert (await client.post("/")).json() is True
        async with db() as unit:
            assert await unit.session.scalar(COUNT) == kept


@needs_function_scope
async def test_unit_dependency_without_middleware(worker: Site) -> None:
    """Both dependencies of one endpoint share the unit, which commits before the response."""
    app, db = FastAPI(), worker.db
    committed: list[str] = []

    @app.post("/")
    async def write(
        unit: Annotated[UnitOfWork[AsyncSession], Depends(db.unit_dependency)],
        session: Annotated[AsyncSession, Depends(db.dependency)],
    ) -> bool:
        unit.on_commit(lambda: committed.append("told"))
        session.add(Note(text="written"))
        return session is unit.session

    async with asgi_client(app) as client:
        assert (await client.post("/")).json() is True
    assert committed == ["told"]
    assert await worker.judge.scalar("SELECT COUNT(*) FROM note") == 1


async def test_dependencies_without_a_request(worker: Site) -> None:
    """Another container calls them without a request: they give the open unit, or raise."""
    async with worker.db() as unit:
        assert await worker.db.unit_dependency() is unit
        assert await worker.db.dependency() is unit.session
    for dependency in (worker.db.dependency, worker.db.unit_dependency):
        with pytest.raises(MissingSessionError):
            await dependency()


async def test_tables_in_one_line(database_url: str) -> None:
    """The tables are made if they are not there, and dropped again."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    async with db.connect(database_url):
        for _ in range(2):
            await db.create_all(Own.metadata)
        async with db.begin() as unit:
            unit.session.add(Mark(text="written"))
        for _ in range(2):
            await db.drop_all(Own.metadata)
        async with db() as unit:
            with pytest.raises(DBAPIError):
                await unit.session.execute(text("SELECT * FROM mark"))
