"""The notes with dishka."""

# dishka has no types for some of what it provides.
# pyright: reportUnknownVariableType=none

from dishka import AsyncContainer, Provider, Scope, make_async_container, provide
from dishka.integrations.fastapi import DishkaRoute, FromDishka, setup_dishka
from fastapi import APIRouter, FastAPI
from sqlalchemy.ext.asyncio import AsyncSession

from examples.containers.notes import Notes, NotesMiddleware, db
from fastapi_async_sqlalchemy import UnitOfWork


class DatabaseProvider(Provider):
    """Provides the current session and unit, and closes neither."""

    scope = Scope.REQUEST

    @provide
    def session(self) -> AsyncSession:
        """Return the current session."""
        return db.session

    @provide
    def unit(self) -> UnitOfWork[AsyncSession]:
        """Return the current unit."""
        return db.unit

    notes = provide(Notes)


router = APIRouter(route_class=DishkaRoute)


@router.post("/notes", status_code=201)
async def write(text: str, notes: FromDishka[Notes]) -> str:
    """Add a note."""
    await notes.write(text)
    return text


@router.get("/notes")
async def read(notes: FromDishka[Notes]) -> list[str]:
    """Return all notes."""
    return await notes.read()


def create_container() -> AsyncContainer:
    """Create the container, for the application or for a worker."""
    return make_async_container(DatabaseProvider())


def create_app(url: str) -> FastAPI:
    """Create the application; the container's scope ends before the unit does."""
    app = FastAPI()
    app.include_router(router)
    setup_dishka(create_container(), app)
    app.add_middleware(NotesMiddleware, db_url=url, commit_on_exit=True)
    return app


async def work(container: AsyncContainer, text: str) -> None:
    """Run a worker's job, with the unit around the scope so that finalizers run inside the unit."""
    async with db.begin(), container() as scope:
        notes = await scope.get(Notes)
        await notes.write(text)
