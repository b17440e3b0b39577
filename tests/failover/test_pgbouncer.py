"""PgBouncer before HAProxy before a PostgreSQL cluster, as many deploy them: the leader is lost."""

import asyncio
from collections.abc import Iterator
from time import monotonic

import pytest

from fastapi_async_sqlalchemy import EngineArgs, pgbouncer_engine_args
from tests.failover.conftest import missing
from tests.failover.load import ROUND, Load, application
from tests.failover.test_patroni import Harm, crash_leader, switch_over
from tests.support.patroni import Address, Cluster, pgbouncer_before
from tests.support.programs import ProgramMissingError

BOUNCED: EngineArgs = {
    **pgbouncer_engine_args(timeout=3, command_timeout=10),
    "pool_size": 10,
    "max_overflow": 0,
    "pool_timeout": 3.0,
    "pool_pre_ping": True,
}


@pytest.fixture
def bounced(cluster: Cluster) -> Iterator[Address]:
    """A PgBouncer whose databases are the two ports of HAProxy."""
    try:
        with pgbouncer_before(cluster) as address:
            yield address
    except ProgramMissingError as error:
        missing(error)


@pytest.mark.parametrize("harm", [switch_over, crash_leader])
async def test_leader_is_lost_behind_pgbouncer(cluster: Cluster, bounced: Address, harm: Harm) -> None:
    """Each request is answered in time, by 201 or 503, and what was answered by 201 is on the new leader."""
    before = await asyncio.to_thread(cluster.leader)
    urls = [f"postgresql+asyncpg://postgres@{bounced}/{name}" for name in ("write", "read")]
    async with application(urls[0], urls[1], BOUNCED) as client:
        load = Load(client)
        async with load.running():
            await load.more(ROUND)
            begun = monotonic()
            harmed = asyncio.create_task(harm(cluster))
            await load.failed()
            seconds = await load.more(1) - begun
            await harmed
            await load.more(ROUND)
        assert await asyncio.to_thread(cluster.leader) is not before
        await load.check(cluster, what=f"{harm.__name__} by PgBouncer", seconds=seconds)
