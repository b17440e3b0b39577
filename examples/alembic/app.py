"""A shop with a separate audit database; both are migrated when the application starts."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from fastapi import FastAPI
from sqlalchemy import Connection

from examples.alembic.models import Entry, Product
from fastapi_async_sqlalchemy import create_middleware_and_session_proxy

ALEMBIC_INI = Path(__file__).with_name("alembic.ini")

ShopMiddleware, shop = create_middleware_and_session_proxy()
AuditMiddleware, audit = create_middleware_and_session_proxy()


def upgrade(connection: Connection, database: str) -> None:
    """Upgrade a database to its newest revision, on a connection that the caller commits."""
    config = Config(ALEMBIC_INI, ini_section=database)
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    """Migrate both databases before the first request."""
    for name, pair in (("shop", shop), ("audit", audit)):
        async with pair.engine.begin() as connection:
            await connection.run_sync(upgrade, name)
    yield


async def add_product(name: str) -> int:
    """Add a product and an audit entry."""
    product = Product(name=name, stock=0)
    shop.session.add(product)
    audit.session.add(Entry(text=f"added {name}"))
    await shop.session.flush()
    return product.id


def create_app(shop_url: str, audit_url: str) -> FastAPI:
    """Create the application."""
    app = FastAPI(lifespan=lifespan)
    app.add_middleware(ShopMiddleware, db_url=shop_url, commit_on_exit=True)
    app.add_middleware(AuditMiddleware, db_url=audit_url, commit_on_exit=True)
    app.add_api_route("/products", add_product, methods=["POST"], status_code=201)
    return app
