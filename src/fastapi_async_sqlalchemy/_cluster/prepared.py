"""Transactions that a server holds prepared: their names, their ages by its clock, and their end."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql import text

from .._arguments.engines import place_of
from .._dialects.begin import CLOCK
from ..exceptions import ConfigurationError
from .branch import Branch

if TYPE_CHECKING:
    from collections.abc import Generator

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8, 0)
"""Seconds between looks at whether somebody else has finished what cannot be had."""
_PREPARED = text(
    "SELECT gid, extract(epoch FROM clock_timestamp() - prepared) FROM pg_prepared_xacts"
    " WHERE database = current_database()"
)


@contextmanager
def _naming(engine: AsyncEngine) -> Generator[None]:
    """Let an error of the database tell which one it is of."""
    try:
        yield
    except Exception as error:
        error.add_note(str(place_of(engine.url)))
        raise


async def prepared(engine: AsyncEngine, start: float = 0.0) -> dict[Branch, float]:
    """Return what is prepared, with its age at a time of the event loop's, by the server's clock."""
    with _naming(engine):
        async with engine.connect() as connection:
            since = asyncio.get_running_loop().time() - start
            listed = [(Branch.parse(name), age) for name, age in await _listed(connection)]
    return {branch: age - since for branch, age in listed if branch is not None}


async def _listed(connection: AsyncConnection) -> list[tuple[str, float]]:
    """Return names and ages: since PREPARE on PostgreSQL, else since the beginning that the name says."""
    dialect = connection.dialect.name
    if dialect == "postgresql":
        return [(name, float(age)) for name, age in await connection.execute(_PREPARED)]
    if dialect not in {"mysql", "mariadb"}:
        message = f"{dialect} has no prepared transactions: leave it out."
        raise ConfigurationError(message)
    now = float(await connection.scalar(CLOCK))
    names = [_decoded(row["data"]) for row in (await connection.execute(text("XA RECOVER"))).mappings()]
    return [(name, now - branch.begun) for name in names if (branch := Branch.parse(name)) is not None]


def _decoded(name: bytes | str) -> str:
    """Return the name of a transaction, which may be any bytes to MariaDB."""
    return name if isinstance(name, str) else name.decode(errors="replace")


async def finish_prepared(engine: AsyncEngine, branch: Branch, *, committed: bool) -> bool:
    """Commit or roll back; returns False where it is gone by now, since somebody else has finished it."""
    verb = "COMMIT" if committed else "ROLLBACK"
    statement = (
        f"{verb} PREPARED '{branch}'" if engine.dialect.name == "postgresql" else f"XA {verb} '{branch}'"
    )
    with _naming(engine):
        try:
            async with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
                await connection.exec_driver_sql(statement)
        except DBAPIError:  # MariaDB says the same of one that is gone, in work, or held by a connection
            for pause in _PAUSES:
                if branch not in await prepared(engine):
                    return False
                await asyncio.sleep(pause)
            raise
    return True
