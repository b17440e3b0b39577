"""Pagination with fastapi-pagination; `make example NAME=pagination` serves thirty tasks in pages."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi_pagination import Page, add_pagination
from fastapi_pagination.ext.sqlalchemy import (
    apaginate,  # pyright: ignore[reportUnknownVariableType]  # its queries have no type
)
from pydantic import BaseModel, ConfigDict
from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.quickstart import serve
from fastapi_async_sqlalchemy import SQLAlchemyMiddleware, db


class Base(DeclarativeBase):
    """The tables."""


class Task(Base):
    """A task."""

    __tablename__ = "task"

    id: Mapped[int] = mapped_column(primary_key=True)
    priority: Mapped[int]


class ReadTask(BaseModel):
    """The body of a response."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    priority: int


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    """Create the table with thirty tasks."""
    await db.create_all(Base.metadata)
    async with db.begin() as unit:
        if await unit.session.get(Task, 1) is None:
            unit.session.add_all(Task(priority=number % 3) for number in range(30))
    yield


def create_app(url: str) -> FastAPI:
    """Create the application for one database."""
    app = FastAPI(title="Tasks", lifespan=lifespan)
    app.add_middleware(SQLAlchemyMiddleware, db_url=url)

    @app.get("/tasks")
    async def tasks() -> Page[ReadTask]:
        """Return a page and the total number of tasks: two statements in the request's transaction."""
        page: Page[ReadTask] = await apaginate(db.session, select(Task).order_by(Task.priority, Task.id))
        return page

    add_pagination(app)
    return app


GUIDE = """
Open  {url}/docs

Read the first page of five tasks, and the last one. Each also has the number of tasks and of pages.
  curl '{url}/tasks?size=5'
  curl '{url}/tasks?size=5&page=6'
"""


if __name__ == "__main__":
    serve(create_app, GUIDE)
