"""Repositories and services of advanced-alchemy on `db.session`, under the pair's middleware."""

import asyncio
from contextlib import AsyncExitStack
from typing import cast

import pytest

pytest.importorskip("advanced_alchemy", reason="requirements/guides.in is not in the lowest row")

from advanced_alchemy.exceptions import IntegrityError, InvalidRequestError, NotFoundError, RepositoryError
from advanced_alchemy.extensions.fastapi import SQLAlchemyAsyncConfig
from advanced_alchemy.filters import LimitOffset
from advanced_alchemy.repository import SQLAlchemyAsyncRepository
from advanced_alchemy.service import SQLAlchemyAsyncRepositoryService
from fastapi import HTTPException, Request, Response
from fastapi.responses import PlainTextResponse
from sqlalchemy import QueuePool

from fastapi_async_sqlalchemy import ConcurrentUseError, PoolTimeoutError, add_pool_timeout_handler
from tests.support.site import MakeSite, Site
from tests.support.tables import Note


class NoteRepository(SQLAlchemyAsyncRepository[Note]):
    """Notes, as advanced-alchemy keeps them."""

    model_type = Note


class NoteService(SQLAlchemyAsyncRepositoryService[Note, NoteRepository]):
    """What an application does with notes."""

    repository_type = NoteRepository


@pytest.fixture
async def site(make_site: MakeSite, deferring_url: str) -> Site:
    """An application that commits, with handlers for the two errors of advanced-alchemy's."""
    site = await make_site(deferring_url, commit_on_exit=True)

    async def conflict(request: Request, error: Exception) -> Response:
        return PlainTextResponse("conflict", 409)

    async def missing(request: Request, error: Exception) -> Response:
        return PlainTextResponse("missing", 404)

    site.app.add_exception_handler(IntegrityError, conflict)
    site.app.add_exception_handler(NotFoundError, missing)
    return site


async def test_repository(site: Site) -> None:
    """A repository on `db.session` writes and reads, and the middleware commits."""

    @site.app.get("/")
    async def route() -> int:
        notes = NoteRepository(session=site.db.session)
        await notes.add_many([Note(text="one"), Note(text="two")])
        assert (await notes.get_one(text="one")).text == "one"
        found, total = await notes.get_many_and_count(LimitOffset(1, 0))
        assert len(found) == 1
        return total

    assert (await site.get()).json() == 2
    assert await site.notes() == ["one", "two"]


async def test_service(site: Site) -> None:
    """A service on `db.session` creates, updates and deletes in the request's transaction."""

    @site.app.get("/")
    async def route() -> None:
        notes = NoteService(session=site.db.session)
        await notes.create({"text": "kept"})
        gone = await notes.create({"text": "gone"})
        await notes.delete(gone.id)

    assert (await site.get()).status_code == 200
    assert await site.notes() == ["kept"]


async def test_errors_of_the_repository(site: Site) -> None:
    """Its errors reach the application's handlers, and the request is rolled back."""

    @site.app.get("/")
    async def route(text: str) -> None:
        notes = NoteRepository(session=site.db.session)
        await notes.add(Note(text="before"))
        await notes.get_one(text=text)

    @site.app.get("/twice")
    async def twice() -> None:
        notes = NoteRepository(session=site.db.session)
        await notes.add(Note(text="one"))
        await notes.add(Note(text="one"))

    async with site.client() as client:
        assert (await client.get("/?text=nothing")).text == "missing"
        assert (await client.get("/twice")).text == "conflict"
    assert await site.notes() == []


async def test_auto_commit(site: Site) -> None:
    """With `auto_commit=True` the repository commits at once; a later error undoes what came after."""

    @site.app.get("/")
    async def route() -> None:
        notes = NoteRepository(session=site.db.session)
        await notes.add(Note(text="first"), auto_commit=True)
        await notes.add(Note(text="second"))
        raise HTTPException(409)

    assert (await site.get()).status_code == 409
    assert await site.notes() == ["first"]


async def test_service_without_a_session(site: Site) -> None:
    """`Service.new(config=...)` opens a separate session, which the unit never sees."""
    config = SQLAlchemyAsyncConfig(engine_instance=site.engine)

    @site.app.get("/")
    async def route() -> bool:
        async with NoteService.new(session=site.db.session) as ours, NoteService.new(config=config) as other:
            assert ours.repository.session is site.db.session
            return other.repository.session is not site.db.session

    assert (await site.get()).json() is True


async def test_two_tasks(site: Site) -> None:
    """Two tasks on one repository are refused; in `db.gather()` each makes one on a session of its own."""

    async def add(text: str) -> None:
        await NoteRepository(session=site.db.session).add(Note(text=text))

    @site.app.get("/")
    async def route() -> None:
        await site.db.gather(add("one"), add("two"), max_concurrent=1)

    @site.app.get("/shared")
    async def shared() -> None:
        notes = NoteRepository(session=site.db.session)
        await notes.count()
        with pytest.raises(InvalidRequestError) as refused:
            await asyncio.gather(notes.add(Note(text="three")), notes.add(Note(text="four")))
        assert isinstance(refused.value.__cause__, ConcurrentUseError)
        raise HTTPException(409)

    async with site.client() as client:
        assert (await client.get("/")).status_code == 200
        assert (await client.get("/shared")).status_code == 409
    assert await site.notes() == ["one", "two"]


async def test_full_pool(site: Site) -> None:
    """A repository wraps `PoolTimeoutError`: its handler sees it with `wrap_exceptions=False` only."""
    add_pool_timeout_handler(site.app)

    @site.app.get("/")
    async def route(*, wrap: bool) -> int:
        async with site.db(pool_timeout=0.05) as unit:
            return await NoteRepository(session=unit.session, wrap_exceptions=wrap).count()

    @site.app.exception_handler(RepositoryError)
    async def wrapped(request: Request, error: Exception) -> Response:
        assert isinstance(error.__cause__, PoolTimeoutError)
        return PlainTextResponse("wrapped", 500)

    async with site.client() as client, AsyncExitStack() as connections:
        pool = cast("QueuePool", site.engine.pool)
        while pool.checkedout() < pool.size() + 10:  # SQLAlchemy's default of max_overflow
            await connections.enter_async_context(site.engine.connect())
        assert (await client.get("/?wrap=true")).text == "wrapped"
        assert (await client.get("/?wrap=false")).status_code == 503
