"""The notes with svcs."""

# svcs has no types for what its factories return.
# pyright: reportUnknownMemberType=none

from collections.abc import AsyncGenerator

import svcs
from fastapi import FastAPI
from sqlalchemy.ext.asyncio import AsyncSession
from svcs.fastapi import DepContainer

from examples.containers.notes import Notes, NotesMiddleware, db
from fastapi_async_sqlalchemy import UnitOfWork


def register(registry: svcs.Registry) -> None:
    """Register the current session and unit, and stop svcs from closing the session."""
    registry.register_factory(AsyncSession, lambda: db.session, enter=False)
    registry.register_factory(UnitOfWork[AsyncSession], lambda: db.unit)
    registry.register_factory(Notes, make_notes)


async def make_notes(services: svcs.Container) -> Notes:
    """Create the service."""
    session, unit = await services.aget(AsyncSession, UnitOfWork[AsyncSession])
    return Notes(session, unit)


@svcs.fastapi.lifespan
async def lifespan(_: FastAPI, registry: svcs.Registry) -> AsyncGenerator[dict[str, object]]:
    """Register the services when the application starts."""
    register(registry)
    yield {}


async def write(text: str, services: DepContainer) -> str:
    """Add a note."""
    await (await services.aget(Notes)).write(text)
    return text


async def read(services: DepContainer) -> list[str]:
    """Return all notes."""
    return await (await services.aget(Notes)).read()


def create_app(url: str) -> FastAPI:
    """Create the application."""
    app = FastAPI(lifespan=lifespan)
    app.add_middleware(NotesMiddleware, db_url=url, commit_on_exit=True)
    app.add_api_route("/notes", write, methods=["POST"], status_code=201)
    app.add_api_route("/notes", read)
    return app


async def work(registry: svcs.Registry, text: str) -> None:
    """Run a worker's job."""
    async with db.begin(), svcs.Container(registry) as services:
        await (await services.aget(Notes)).write(text)
