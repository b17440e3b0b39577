"""Connections to the first node of a Galera cluster that takes part in it; drivers take one host in a URL."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import aiomysql
from pymysql.constants import CLIENT
from pymysql.err import MySQLError


def first_of(nodes: Sequence[tuple[str, int]], **arguments: Any) -> Callable[[], Awaitable[aiomysql.Connection]]:
    """Return what an engine takes as its `async_creator`; `arguments` are those of `aiomysql.connect()`."""

    async def connect() -> aiomysql.Connection:
        failure: Exception = OSError("there are no nodes")
        for host, port in nodes:
            try:
                return await connect_to(host, port)
            except (OSError, MySQLError) as error:
                failure = error
        raise failure

    async def connect_to(host: str, port: int) -> aiomysql.Connection:
        connection = await aiomysql.connect(
            host=host, port=port, connect_timeout=2, client_flag=CLIENT.FOUND_ROWS, **arguments
        )
        try:
            async with connection.cursor() as cursor:
                await cursor.execute("SHOW STATUS LIKE 'wsrep_ready'")
                if await cursor.fetchone() != ("wsrep_ready", "ON"):
                    message = f"{host}:{port} has no part in the cluster"
                    raise OSError(message)
        except BaseException:
            connection.close()
            raise
        return connection

    return connect
