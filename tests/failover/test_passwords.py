"""The servers of the tests ask for a password, as the example's files say."""

from typing import Any

import asyncpg  # type: ignore[import-untyped]  # pyright: ignore[reportMissingTypeStubs]  # it has no types
import pytest

from tests.failover.conftest import missing
from tests.support.patroni import Address, Cluster, pgbouncer_before
from tests.support.programs import ProgramMissingError

driver: Any = asyncpg


async def connects(address: Address, database: str, **arguments: str) -> None:
    """Open a connection, and close it."""
    connection = await driver.connect(
        host=address.host, port=address.port, user="postgres", database=database, timeout=10, **arguments
    )
    await connection.close()


async def test_wrong_password_is_refused(cluster: Cluster) -> None:
    """PostgreSQL and PgBouncer let in a client that has the password of the run, and no other."""
    try:
        with pgbouncer_before(cluster) as bouncer:
            for address, database in ((cluster.members[0].address, "postgres"), (bouncer, "write")):
                await connects(address, database)
                with pytest.raises(driver.PostgresError, match="authentication failed"):
                    await connects(address, database, password="wrong")  # noqa: S106
    except ProgramMissingError as error:
        missing(error)
