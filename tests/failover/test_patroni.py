"""A PostgreSQL cluster under Patroni loses its leader while an application writes."""

import asyncio
from collections.abc import Callable, Coroutine
from time import monotonic

import pytest

from tests.failover.load import ROUND, Load, application
from tests.support.patroni import ROLES, Cluster

Harm = Callable[[Cluster], Coroutine[None, None, None]]


async def kill_leader(cluster: Cluster) -> None:
    """Lose the leader's machine: its successor is elected when the TTL has passed."""
    await asyncio.to_thread((await asyncio.to_thread(cluster.leader)).kill)


async def crash_leader(cluster: Cluster) -> None:
    """Kill the leader's PostgreSQL, whose Patroni hands over at once."""
    await asyncio.to_thread(cluster.configure, primary_start_timeout=0)
    await asyncio.to_thread((await asyncio.to_thread(cluster.leader)).crash)


async def switch_over(cluster: Cluster) -> None:
    """Have the leader hand over to its synchronous standby."""
    await asyncio.to_thread(cluster.switchover)


@pytest.mark.parametrize(
    ("harm", "proxied"),
    [
        *((switch_over, proxied) for proxied in (False, True)),
        (crash_leader, False),  # test_pgbouncer.py has it by HAProxy
        *((kill_leader, proxied) for proxied in (False, True)),
    ],
)
async def test_leader_is_lost_under_load(cluster: Cluster, harm: Harm, *, proxied: bool) -> None:
    """Each request is answered in time, by 201 or 503, and what was answered by 201 is on the new leader."""
    before = await asyncio.to_thread(cluster.leader)
    primary_url, replica_url = (cluster.url(role, proxied=proxied) for role in ROLES)
    async with application(primary_url, replica_url) as client:
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
        await load.check(cluster, what=f"{harm.__name__} {proxied=}", seconds=seconds)
