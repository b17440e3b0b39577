"""The shop with sqladmin, whose sessions all belong to units."""

# sqladmin uses a session maker for `async with` alone:
# mypy: disable-error-code="override"
# pyright: reportIncompatibleMethodOverride=false

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI
from sqladmin import Admin, ModelView
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from examples.admin.tables import Base, Product, announce
from fastapi_async_sqlalchemy import SQLAlchemyMiddleware, db


@asynccontextmanager
async def unit_session() -> AsyncGenerator[AsyncSession]:
    """Open a unit and yield its session, which sqladmin commits."""
    async with db() as unit:
        yield unit.session


class UnitSessions(async_sessionmaker[AsyncSession]):
    """Opens a unit when sqladmin needs a session."""

    def __call__(self, **_: Any) -> AbstractAsyncContextManager[AsyncSession]:
        """Return the session for `async with`."""
        return unit_session()


class ProductAdmin(ModelView, model=Product):
    """The pages of a product."""

    column_list = ("id", "name", "price")

    async def on_model_change(self, data: dict[str, Any], *_: Any) -> None:
        """Announce the change once it is committed."""
        db.unit.on_commit(partial(announce, data["name"]))


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    """Create the table of the example."""
    await db.create_all(Base.metadata)
    yield


def create_app(db_url: str) -> FastAPI:
    """Create the application for one database."""
    app = FastAPI(lifespan=lifespan)
    app.add_middleware(SQLAlchemyMiddleware, db_url=db_url, commit_on_exit=True)
    admin = Admin(app, session_maker=UnitSessions())
    admin.add_view(ProductAdmin)
    return app
