"""The shop with starlette-admin, which works in the request's unit."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from sqlalchemy.ext.asyncio import async_sessionmaker
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette_admin.contrib.sqla import Admin, ModelView
from starlette_admin.helpers import run_on_commit_callbacks

from examples.admin.tables import Base, Product, announce
from fastapi_async_sqlalchemy import SQLAlchemyMiddleware, db


class RequestUnit:
    """Gives starlette-admin the session of the request's unit; replaces its own middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] == "http":
            request = Request(scope)
            request.state.session = db.session
            db.unit.on_commit(partial(run_on_commit_callbacks, request))
        await self.app(scope, receive, send)


class UnitAdmin(Admin):
    """An admin that creates no sessions."""

    def __init__(self, **options: Any) -> None:
        super().__init__(async_sessionmaker(), **options)
        self.middlewares = [Middleware(RequestUnit), *(self.middlewares or [])[1:]]


class ProductView(ModelView):
    """The pages of a product."""

    async def before_create(
        self,
        request: Request,  # noqa: ARG002  # starlette-admin passes it
        data: dict[str, Any],
        obj: Product,  # noqa: ARG002  # starlette-admin passes it
    ) -> None:
        """Announce the change once it is committed."""
        db.unit.on_commit(partial(announce, data["name"]))

    before_edit = before_create


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    """Create the table of the example."""
    await db.create_all(Base.metadata)
    yield


def create_app(db_url: str) -> FastAPI:
    """Create the application for one database."""
    app = FastAPI(lifespan=lifespan)
    app.add_middleware(SQLAlchemyMiddleware, db_url=db_url, commit_on_exit=True)
    admin = UnitAdmin(secret_key=os.environ.get("SECRET_KEY"))
    admin.add_view(ProductView(Product))
    admin.mount_to(app)
    return app
