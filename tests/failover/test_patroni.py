"""A PostgreSQL cluster under Patroni loses its leader while an application writes."""

import asyncio

import pytest

from examples.cluster.__main__ import patronictl
from tests.failover.load import Harm, application, lose_leader
from tests.support.patroni import ROLES, Cluster


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


async def command_switchover(cluster: Cluster) -> None:
    """Do the same by the command that people use."""
    command = patronictl(cluster.members[0]).split()
    process = await asyncio.create_subprocess_exec(*command, "switchover", "--force")
    assert await process.wait() == 0


@pytest.mark.parametrize(
    ("harm", "proxied"),
    [
        (command_switchover, False),
        (switch_over, True),
        *((harm, proxied) for harm in (crash_leader, kill_leader) for proxied in (False, True)),
    ],
)
async def test_leader_is_lost_under_load(cluster: Cluster, harm: Harm, *, proxied: bool) -> None:
    """Writes are answered in time, by 201 or 503; the new leader has what 201 told, and reads go on."""
    primary_url, replica_url = (cluster.url(role, proxied=proxied) for role in ROLES)
    async with application(primary_url, replica_url) as client:
        await lose_leader(cluster, harm, client, what=f"{proxied=}")
