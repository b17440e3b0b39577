"""Copies of a database, for test processes that run at the same time."""

from __future__ import annotations

import os
import shutil
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from ..exceptions import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from sqlalchemy.engine import URL


@asynccontextmanager
async def copied(source: str, suffix: str) -> AsyncGenerator[str]:
    """Copy a database for the length of the block, and yield the URL of the copy.

    Nobody may be connected to the source meanwhile. Raises ``ConfigurationError`` where the database has no
    way to copy one.
    """
    url = make_url(source)
    copy = url.set(database=f"{url.database}_{suffix}")
    if url.get_backend_name() == "postgresql":
        await _administer(url, f'DROP DATABASE IF EXISTS "{copy.database}"')  # of a run that was killed
        await _administer(url, f'CREATE DATABASE "{copy.database}" TEMPLATE "{url.database}"')
        try:
            yield copy.render_as_string(hide_password=False)
        finally:
            await _administer(url, f'DROP DATABASE "{copy.database}"')
    elif url.get_backend_name() == "sqlite":
        shutil.copy(str(url.database), str(copy.database))
        try:
            yield copy.render_as_string(hide_password=False)
        finally:
            os.remove(str(copy.database))  # noqa: PTH107  # nothing else runs in this loop
    else:
        message = (
            f"{url.get_backend_name()} copies no database: make one for each worker, and return its URL "
            "from your own fixture `sandbox_url`."
        )
        raise ConfigurationError(message)


async def _administer(url: URL, statement: str) -> None:
    """Send a statement that no transaction can have, from another database of the server."""
    engine = create_async_engine(
        url.set(database="postgres"), isolation_level="AUTOCOMMIT", poolclass=NullPool
    )
    async with engine.connect() as connection:
        await connection.exec_driver_sql(statement)
