"""The examples of dishka and svcs: a container hands out the current session, and the unit decides."""

# svcs has no types for what its factories return.
# pyright: reportUnknownMemberType=none

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated

import pytest

pytest.importorskip("dishka", reason="requirements/guides.in is not in the lowest row")
pytest.importorskip("svcs", reason="requirements/guides.in is not in the lowest row")

import svcs
from dishka import Provider, Scope, make_async_container
from dishka.integrations.fastapi import DishkaRoute, FromDishka
from fastapi import APIRouter, Depends, FastAPI
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from examples.containers import by_dishka, by_svcs
from examples.containers.notes import Base, Notes, announced, db
from fastapi_async_sqlalchemy.testing import SandboxedApp
from tests.support.databases import JudgeFor
from tests.support.serving import asgi_client

NOTES = "SELECT text FROM note ORDER BY text"


@pytest.fixture
async def notes_url(sqlite_url: str) -> str:
    """A database without notes, and no announcement yet."""
    announced.clear()
    async with db.connect(sqlite_url):
        await db.create_all(Base.metadata)
    return sqlite_url


def svcs_registry() -> svcs.Registry:
    """Make a registry as the application's."""
    registry = svcs.Registry()
    by_svcs.register(registry)
    return registry


async def work_by_dishka(text: str) -> None:
    """Do a job with a new container."""
    container = by_dishka.create_container()
    await by_dishka.work(container, text)
    await container.close()


async def work_by_svcs(text: str) -> None:
    """Do a job with a new registry."""
    async with svcs_registry() as registry:
        await by_svcs.work(registry, text)


@pytest.mark.parametrize("create_app", [by_dishka.create_app, by_svcs.create_app], ids=["dishka", "svcs"])
async def test_request_is_committed_by_the_middleware(
    notes_url: str, create_app: Callable[[str], FastAPI]
) -> None:
    """A service of the container writes in the request's unit, and a COMMIT that fails leaves nothing."""
    served = SandboxedApp(create_app(notes_url), db)
    async with asgi_client(served, raise_app_exceptions=False) as client:
        assert (await client.post("/notes", params={"text": "one"})).status_code == 201
        served.box.fail_commit()
        assert (await client.post("/notes", params={"text": "two"})).status_code == 500
        assert (await client.get("/notes")).json() == ["one"]
        assert served.box.commits == 1
    assert announced == ["one"]


@pytest.mark.parametrize("work", [work_by_dishka, work_by_svcs])
async def test_worker_commits_its_unit(
    notes_url: str, judge_for: JudgeFor, work: Callable[[str], Awaitable[None]]
) -> None:
    """A job is committed by the unit around the container, and an error undoes it."""
    judge = await judge_for(notes_url)
    async with db.connect(notes_url):
        await work("one")
        with pytest.raises(IntegrityError):
            await work("one")
        await work("two")
    assert await judge.rows(NOTES) == [("one",), ("two",)]
    assert announced == ["one", "two"]


async def test_scope_for_each_task(notes_url: str) -> None:
    """A scope that is opened in a task has the session of that task."""
    container = by_dishka.create_container()

    async def session_of_scope() -> bool:
        async with container() as scope:
            return await scope.get(AsyncSession) is db.session

    async with db.connect(notes_url), db(), container() as scope:
        assert await scope.get(AsyncSession) is db.session
        assert list(await db.gather(session_of_scope(), session_of_scope())) == [True, True]
    await container.close()


async def test_entered_session_is_closed_by_svcs(
    notes_url: str, judge_for: JudgeFor, caplog: pytest.LogCaptureFixture
) -> None:
    """Without `enter=False` svcs closes the session: its objects are lost, and a WARNING says so."""
    async with svcs.Registry() as registry, db.connect(notes_url):
        registry.register_factory(AsyncSession, lambda: db.session)
        async with db() as unit:
            async with svcs.Container(registry) as services:
                session = await services.aget(AsyncSession)
                await Notes(session, unit).write("lost")
            await unit.commit()
    assert announced == []
    assert ["leave the session for its unit" in record.message for record in caplog.records] == [True]
    assert await (await judge_for(notes_url)).rows(NOTES) == []


async def test_all_ways_lead_to_one_session(notes_url: str) -> None:
    """Dishka and FastAPI's dependency give `db.session`, and dishka's finalizers find its unit open."""
    app, closed = by_dishka.create_app(notes_url), list[bool]()

    async def finalized() -> AsyncIterator[int]:
        yield 1
        closed.append(db.unit.closed)

    provider = Provider(scope=Scope.REQUEST)
    provider.provide(finalized)
    app.state.dishka_container = make_async_container(by_dishka.DatabaseProvider(), provider)
    router = APIRouter(route_class=DishkaRoute)

    @router.get("/same")
    async def same(
        one: FromDishka[AsyncSession],
        other: Annotated[AsyncSession, Depends(db.dependency)],
        number: FromDishka[int],
    ) -> bool:
        return one is other is db.session

    app.include_router(router)
    async with asgi_client(app) as client:
        assert (await client.get("/same")).json() is True
    assert closed == [False]
