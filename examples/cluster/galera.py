"""Connections to the first Galera node that takes part in its cluster: URLs of aiomysql name one host."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import aiomysql  # type: ignore[import-untyped]  # pyright: ignore[reportMissingTypeStubs]  # it has no types

driver: Any = aiomysql
FOUND_ROWS = 2
"""SQLAlchemy relies on this flag of the protocol, and sets it where it connects itself."""


def first_of(nodes: Sequence[tuple[str, int]], **arguments: Any) -> Callable[[], Awaitable[Any]]:
    """Return the `async_creator` of an engine; `arguments` are those of `aiomysql.connect()`."""

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
    """Whether the node takes commands: one that has lost the others accepts connections all the same."""
    async with connection.cursor() as cursor:
        await cursor.execute("SHOW STATUS LIKE 'wsrep_ready'")
        row: tuple[str, str] | None = await cursor.fetchone()
    return row == ("wsrep_ready", "ON")
