"""The shop with sqladmin, which shares the application's engine and creates plain sessions."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from sqladmin import Admin, ModelView
from sqlalchemy.ext.asyncio import create_async_engine

from examples.admin.tables import Base, Product
from fastapi_async_sqlalchemy import SQLAlchemyMiddleware, db


class ProductAdmin(ModelView, model=Product):
    """The pages of a product."""

    column_list = ("id", "name", "price")


def create_app(db_url: str) -> FastAPI:
    """Create the application for one database."""
    engine = create_async_engine(db_url)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        """Create the table of the example; dispose the engine, which the middleware does not do."""
        await db.create_all(Base.metadata)
        yield
        await engine.dispose()

    app = FastAPI(lifespan=lifespan)
    app.add_middleware(SQLAlchemyMiddleware, custom_engine=engine, commit_on_exit=True)
    admin = Admin(app, engine)
    admin.add_view(ProductAdmin)
    return app
