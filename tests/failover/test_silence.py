"""The leader's machine vanishes: it refuses nothing, and all that is sent to it is swallowed."""

import asyncio
from time import monotonic

from tests.failover.load import ROUND, Load, application
from tests.support.patroni import Cluster, multi_host
from tests.support.wire import wire_to


async def test_silent_leader_is_first_in_the_url(cluster: Cluster) -> None:
    """Writes go on at its successor, and what was answered by 201 is there."""
    before = await asyncio.to_thread(cluster.leader)
    async with wire_to(before.address) as wire:
        addresses = [wire.address, *(one.address for one in cluster.members if one is not before)]
        writing, reading = (multi_host(addresses, wanted) for wanted in ("read-write", "prefer-standby"))
        async with application(writing, reading) as client:
            load = Load(client)
            async with load.running():
                await load.more(ROUND)
                begun = monotonic()
                wire.cut()
                await asyncio.to_thread(before.kill)
                await load.failed()
                seconds = await load.more(1) - begun
                await load.more(ROUND)
            assert await asyncio.to_thread(cluster.leader) is not before
            await load.check(cluster, what="silent leader", seconds=seconds)
