"""Connections to the first active Galera node, because the URLs of aiomysql name only one host."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import aiomysql  # type: ignore[import-untyped]  # pyright: ignore[reportMissingTypeStubs]  # it has no types

driver: Any = aiomysql
FOUND_ROWS = 2
"""SQLAlchemy relies on this protocol flag, and sets it on the connections that it opens itself."""


def first_of(nodes: Sequence[tuple[str, int]], **arguments: Any) -> Callable[[], Awaitable[Any]]:
    """Return an engine's `async_creator`; `arguments` are passed to `aiomysql.connect()`."""

    async def connect() -> Any:
        failure: Exception = OSError("there are no nodes")
        for host, port in nodes:
            try:
                connection = await driver.connect(
                    host=host, port=port, connect_timeout=2, client_flag=FOUND_ROWS, **arguments
                )
                if await takes_part(connection):
                    return connection
                connection.close()
                failure = OSError(f"{host}:{port} has no part in the cluster")
            except (OSError, driver.MySQLError) as error:
                failure = error
        raise failure

    return connect


async def takes_part(connection: Any) -> bool:
    """Whether the node accepts commands; a node that has lost the others still accepts connections."""
    async with connection.cursor() as cursor:
        await cursor.execute("SHOW STATUS LIKE 'wsrep_ready'")
        row: tuple[str, str] | None = await cursor.fetchone()
    return row == ("wsrep_ready", "ON")
