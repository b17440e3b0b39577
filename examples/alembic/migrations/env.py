"""The script that Alembic runs for every command, for both databases, which are sections of alembic.ini."""

import asyncio
import os
from logging.config import fileConfig

from alembic import context
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, NullPool
from sqlalchemy.ext.asyncio import create_async_engine

from examples.alembic.models import AuditBase, ShopBase

METADATA = {"shop": ShopBase.metadata, "audit": AuditBase.metadata}
NAMED_LOCK = "SELECT GET_LOCK('migrations', 1000000000)"  # any name, but the same in every process; seconds
ONE_AT_A_TIME = {
    "postgresql": "SELECT pg_advisory_xact_lock(7204119)",  # any number, but the same in every process
    "sqlite": "BEGIN IMMEDIATE",
    "mysql": NAMED_LOCK,
    "mariadb": NAMED_LOCK,
}
FOREIGN_KEYS_ARE_ON = (
    "Migrate before you turn foreign keys on: a rebuilt table would lose the rows that refer to it."
)

config = context.config
database = config.config_ini_section


def migrate(connection: Connection) -> None:
    """Run the migrations while no other process runs migrations, and in one transaction if DDL allows it."""
    dialect = connection.dialect.name
    lock = ONE_AT_A_TIME.get(dialect)
    context.configure(
        connection=connection,
        target_metadata=METADATA[database],
        render_as_batch=dialect == "sqlite",  # its ALTER TABLE is limited
        transactional_ddl=True if dialect == "sqlite" else None,  # BEGIN IMMEDIATE makes it so
        on_version_apply=commit_version if lock == NAMED_LOCK else None,
    )
    with context.begin_transaction():
        if dialect == "sqlite" and connection.exec_driver_sql("PRAGMA foreign_keys").scalar():
            raise RuntimeError(FOREIGN_KEYS_ARE_ON)
        if lock is not None:
            connection.exec_driver_sql(lock)
        try:
            context.run_migrations()
        finally:
            if lock == NAMED_LOCK:
                connection.exec_driver_sql("SELECT RELEASE_LOCK('migrations')")


def commit_version(ctx: MigrationContext, *_: object, **__: object) -> None:
    """Commit a revision's number on MariaDB, as the DDL is, so that the next process finds it."""
    assert ctx.connection is not None
    ctx.connection.exec_driver_sql("COMMIT")


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
