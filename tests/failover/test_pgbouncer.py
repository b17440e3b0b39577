"""PgBouncer before HAProxy before a PostgreSQL cluster, as many deploy them: the leader is lost."""

from collections.abc import Iterator
from functools import partial

import pytest

from fastapi_async_sqlalchemy import EngineArgs, pgbouncer_engine_args
from tests.failover.conftest import started
from tests.failover.load import BOUND, Harm, application, lose_leader
from tests.failover.test_patroni import crash_leader, kill_leader, switch_over
from tests.support.patroni import Address, Cluster, pgbouncer_before

BOUNCED: EngineArgs = {
    **pgbouncer_engine_args(timeout=3, command_timeout=10),
    "pool_size": 10,
    "max_overflow": 0,
    "pool_timeout": 3.0,
    "pool_pre_ping": True,
}
QUERY_WAIT_TIMEOUT = 5.0
"""Seconds for which the example's PgBouncer lets a request wait; the leader is not replaced before."""


@pytest.fixture
def bounced(cluster: Cluster) -> Iterator[Address]:
    """A PgBouncer whose databases are the two ports of HAProxy."""
    with started(partial(pgbouncer_before, cluster)) as address:
        yield address


@pytest.mark.parametrize("harm", [switch_over, crash_leader, kill_leader])
async def test_leader_is_lost_behind_pgbouncer(cluster: Cluster, bounced: Address, harm: Harm) -> None:
    """Writes are answered in time, by 201 or 503; the new leader has what 201 told, and reads go on."""
    urls = [f"postgresql+asyncpg://postgres@{bounced}/{name}" for name in ("write", "read")]
    async with application(urls[0], urls[1], BOUNCED) as client:
        await lose_leader(cluster, harm, client, what="by PgBouncer", bound=BOUND + QUERY_WAIT_TIMEOUT)
