"""Alembic's environment for both databases; the section of alembic.ini selects one."""

import asyncio

from alembic import context
from sqlalchemy import URL, Connection, NullPool, text
from sqlalchemy.ext.asyncio import create_async_engine

from examples.bookshop.models import ReportingBase, ShopBase
from examples.bookshop.settings import Settings

DATABASE = context.config.config_ini_section
METADATA = {"shop": ShopBase.metadata, "reporting": ReportingBase.metadata}[DATABASE]


def url() -> URL:
    """Return the caller's URL, or else the one in the environment."""
    given: URL | None = context.config.attributes.get("url")
    return given or getattr(Settings.from_environment(), f"{DATABASE}_url")


def migrate(connection: Connection) -> None:
    """Migrate in one transaction; a concurrent process waits, and then finds nothing to do."""
    context.configure(connection=connection, target_metadata=METADATA)
    with context.begin_transaction():
        connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('bookshop migrations'))"))
        connection.execute(text("SET LOCAL lock_timeout = '5s'"))  # fail rather than block others
        context.run_migrations()


async def run() -> None:
    """Connect, migrate and commit."""
    engine = create_async_engine(url(), poolclass=NullPool)
    async with engine.begin() as connection:
        await connection.run_sync(migrate)


if context.is_offline_mode():
    context.configure(dialect_name="postgresql", target_metadata=METADATA, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
else:
    asyncio.run(run())
