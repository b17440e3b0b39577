"""Prepared transactions on a server: their names, their ages by its clock, and their end."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql import text

from .._arguments.engines import place_of
from .._dialects.twophase import CLOCK
from ..exceptions import ConfigurationError
from .branch import Branch

if TYPE_CHECKING:
    from collections.abc import Generator

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8, 0)
"""Seconds between checks of whether another process has finished a transaction."""
_PREPARED = text(
    "SELECT gid, extract(epoch FROM clock_timestamp() - prepared) FROM pg_prepared_xacts"
    " WHERE database = current_database()"
)


@contextmanager
def _naming(engine: AsyncEngine) -> Generator[None]:
    """Add the name of the database to an error."""
    try:
        yield
    except Exception as error:
        error.add_note(str(place_of(engine.url)))
        raise


async def prepared(engine: AsyncEngine, start: float = 0.0) -> dict[Branch, float]:
    """Return the prepared transactions with their ages at ``start``, by the server's clock.

    ``start`` is a time of the event loop.
    """
    with _naming(engine):
        async with engine.connect() as connection:
            since = asyncio.get_running_loop().time() - start
            listed = [(Branch.parse(name), age) for name, age in await _listed(connection)]
    return {branch: age - since for branch, age in listed if branch is not None}


async def _listed(connection: AsyncConnection) -> list[tuple[str, float]]:
    """Return names and ages: since PREPARE on PostgreSQL, otherwise since the time in the name."""
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
    """Return the name of a transaction; MariaDB accepts any bytes."""
    return name if isinstance(name, str) else name.decode(errors="replace")


async def finish_prepared(engine: AsyncEngine, branch: Branch, *, committed: bool) -> bool:
    """Commit or roll back; return False if another process has already finished the transaction."""
    verb = "COMMIT" if committed else "ROLLBACK"
    statement = (
        f"{verb} PREPARED '{branch}'" if engine.dialect.name == "postgresql" else f"XA {verb} '{branch}'"
    )
    with _naming(engine):
        try:
            async with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
                await connection.exec_driver_sql(statement)
        except DBAPIError:  # MariaDB's error is the same if it is finished, in work, or held by a connection
            for pause in _PAUSES:
                if branch not in await prepared(engine):
                    return False
                await asyncio.sleep(pause)
            raise
    return True
