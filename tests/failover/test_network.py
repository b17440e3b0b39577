"""The network between an application and its leader is cut: nobody is told, and nothing is closed."""

import asyncio
from contextlib import AsyncExitStack
from time import monotonic

import pytest

from examples.cluster.app import ENGINE_ARGS, primary
from fastapi_async_sqlalchemy import EngineArgs
from tests.failover.load import ROUND, Load, application
from tests.support.patroni import Cluster, multi_host
from tests.support.site import checked_out
from tests.support.wire import wire_to

IMPATIENT: EngineArgs = {**ENGINE_ARGS, "connect_args": {"timeout": 1, "command_timeout": 2}}


async def test_network_is_cut_under_load(cluster: Cluster) -> None:
    """Statements end with `command_timeout`, connections with `timeout`; all is well when the network is."""
    async with AsyncExitStack() as exits:
        wires = [await exits.enter_async_context(wire_to(one.address)) for one in cluster.members]
        addresses = [wire.address for wire in wires]
        writing, reading = (multi_host(addresses, wanted) for wanted in ("read-write", "prefer-standby"))
        client = await exits.enter_async_context(application(writing, reading, IMPATIENT))
        load = Load(client)
        async with load.running():
            await load.more(ROUND)
            begun = monotonic()
            for wire in wires:
                wire.cut()
            for _ in range(3):
                await load.failed()
            for wire in wires:
                wire.mend()
            mended = monotonic()
            seconds = await load.more(1) - mended
            await load.more(ROUND)
        await load.check(cluster, what=f"network cut for {mended - begun:.1f} s", seconds=seconds)


@pytest.mark.parametrize("ping", [True, False], ids=["ping", "no ping"])
async def test_one_statement_on_a_silent_connection(cluster: Cluster, *, ping: bool) -> None:
    """Where the server says nothing, a request is answered in time, and its connection is discarded."""
    leader = await asyncio.to_thread(cluster.leader)
    async with wire_to(leader.address) as wire:
        url = f"postgresql+asyncpg://postgres@{wire.address}/postgres"
        args: EngineArgs = {**IMPATIENT, "pool_pre_ping": ping, "pool_size": 1}
        async with application(url, url, args) as client:
            load = Load(client)
            assert await load.put("before") == 201
            wire.cut()
            begun = monotonic()
            assert await load.put("during") == 503
            assert monotonic() - begun > 0.5
            assert checked_out(primary.engine.pool) == 0
            wire.mend()
            assert await load.put("after") == 201
            await load.check(cluster, what=f"silence {ping=}", seconds=0)
