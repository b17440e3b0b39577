"""Connections to the first active Galera node, for aiomysql and asyncmy, whose URLs name only one host."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import aiomysql  # type: ignore[import-untyped]  # pyright: ignore[reportMissingTypeStubs]  # it has no types

from examples.cluster.hosts import first_success

driver: Any = aiomysql
DEADLINE = 2.0
"""Seconds for one node; the `connect_timeout` of the drivers ends before the server's first packet."""
FOUND_ROWS = 2
"""SQLAlchemy relies on this protocol flag, and sets it on the connections that it opens itself."""


def first_of(
    nodes: Sequence[tuple[str, int]],
    connect: Callable[..., Awaitable[Any]] = driver.connect,
    **arguments: Any,
) -> Callable[[], Awaitable[Any]]:
    """Return an engine's `async_creator`; `connect` is aiomysql's or asyncmy's, and gets the arguments."""

    async def attempt(host: str, port: int) -> Any:
        async with asyncio.timeout(DEADLINE):
            connection = await connect(host=host, port=port, client_flag=FOUND_ROWS, **arguments)
            try:
                await check(connection)
            except BaseException:
                connection.close()
                raise
            return connection

    return lambda: first_success(partial(attempt, host, port) for host, port in nodes)


async def check(connection: Any) -> None:
    """Refuse a node that accepts no commands; one that has lost the others still accepts connections."""
    async with connection.cursor() as cursor:
        await cursor.execute("SHOW STATUS LIKE 'wsrep_ready'")
        if await cursor.fetchone() != ("wsrep_ready", "ON"):
            message = "the node has no part in the cluster"
            raise OSError(message)
