"""The leader's machine vanishes: it refuses nothing, and all that is sent to it is swallowed."""

import asyncio

from examples.cluster.app import ENGINE_ARGS
from tests.failover.load import LOADED, application, lose_leader
from tests.support.patroni import Cluster, multi_host
from tests.support.wire import wire_to

BOUND = 2 * float(f"{ENGINE_ARGS.get('connect_args', {})['command_timeout']}") + LOADED
"""A statement in progress waits for its timeout, and so does its ROLLBACK."""


async def test_silent_leader_is_first_in_the_url(cluster: Cluster) -> None:
    """Writes go on at its successor, and what was answered by 201 is there."""
    leader = await asyncio.to_thread(cluster.leader)
    async with wire_to(leader.address) as wire:

        async def fall_silent(_: Cluster) -> None:
            wire.cut()
            await asyncio.to_thread(leader.kill)

        addresses = [wire.address, *(one.address for one in cluster.members if one is not leader)]
        writing, reading = (multi_host(addresses, wanted) for wanted in ("read-write", "prefer-standby"))
        async with application(writing, reading) as client:
            await lose_leader(cluster, fall_silent, client, what="URL of all", bound=BOUND)
