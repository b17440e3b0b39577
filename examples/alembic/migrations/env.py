"""The script that Alembic runs for every command, for both databases, which are sections of alembic.ini."""

import asyncio
import os
from logging.config import fileConfig

from alembic import context
from sqlalchemy import Connection, NullPool
from sqlalchemy.ext.asyncio import create_async_engine

from examples.alembic.models import AuditBase, ShopBase

METADATA = {"shop": ShopBase.metadata, "audit": AuditBase.metadata}
ONE_AT_A_TIME = {
    "postgresql": "SELECT pg_advisory_xact_lock(7204119)",  # any number, but the same in every process
    "sqlite": "BEGIN IMMEDIATE",
}
FOREIGN_KEYS_ARE_ON = (
    "Migrate before you turn foreign keys on: a rebuilt table would lose the rows that refer to it."
)

config = context.config
database = config.config_ini_section


def migrate(connection: Connection) -> None:
    """Run the migrations in one transaction, while no other process runs migrations."""
    context.configure(
        connection=connection,
        target_metadata=METADATA[database],
        render_as_batch=connection.dialect.name == "sqlite",  # its ALTER TABLE is limited
        transactional_ddl=True,  # Alembic assumes False on SQLite, but BEGIN IMMEDIATE makes it true
    )
    with context.begin_transaction():
        if connection.dialect.name == "sqlite" and connection.exec_driver_sql("PRAGMA foreign_keys").scalar():
            raise RuntimeError(FOREIGN_KEYS_ARE_ON)
        connection.exec_driver_sql(ONE_AT_A_TIME[connection.dialect.name])
        context.run_migrations()


async def connect() -> None:
    """Open a connection, run the migrations on it, and close it."""
    engine = create_async_engine(os.environ[f"{database.upper()}_URL"], poolclass=NullPool)
    async with engine.connect() as connection:
        await connection.run_sync(migrate)


connection: Connection | None = config.attributes.get("connection")
if connection is not None:
    migrate(connection)
elif config.config_file_name is not None:
    fileConfig(config.config_file_name, disable_existing_loggers=False)
    asyncio.run(connect())
