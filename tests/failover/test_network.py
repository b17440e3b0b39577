"""The network between an application and its leader is cut: nobody is told, and nothing is closed."""

import asyncio
import itertools
from contextlib import AsyncExitStack
from time import monotonic

import pytest
from fastapi import Request
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine

from examples.cluster.app import ENGINE_ARGS, primary, unavailable
from fastapi_async_sqlalchemy import EngineArgs
from tests.failover.load import CLIENTS, LOADED, Load, application, by_url_or_proxy
from tests.support.databases import Judge
from tests.support.patroni import Cluster, multi_host
from tests.support.site import checked_out
from tests.support.wire import wire_to

IMPATIENT: EngineArgs = {**ENGINE_ARGS, "connect_args": {"timeout": 1, "command_timeout": 2}}
SILENCE = 3.0 + 1.0 + 2 * 2.0 + LOADED
"""Seconds for each request: `pool_timeout`, `timeout`, `command_timeout` for a statement and for ROLLBACK."""


@by_url_or_proxy
async def test_network_is_cut_under_load(cluster: Cluster, *, proxied: bool) -> None:
    """Statements end with `command_timeout`, connections with `timeout`; all is well when the network is."""
    members = [one.address for one in cluster.members]
    ways = [[cluster.write], [cluster.read]] if proxied else [members, members]
    async with AsyncExitStack() as exits:
        wires = [[await exits.enter_async_context(wire_to(server)) for server in way] for way in ways]
        writing, reading = (
            multi_host([wire.address for wire in way], wanted)
            for way, wanted in zip(wires, ("read-write", "prefer-standby"), strict=True)
        )
        client = await exits.enter_async_context(application(writing, reading, IMPATIENT))
        load = Load(client)
        async with load.running(cluster):
            begun = monotonic()
            for wire in itertools.chain(*wires):
                wire.cut()
            await load.failed(CLIENTS)
            for wire in itertools.chain(*wires):
                wire.mend()
            mended = monotonic()
            seconds = await load.more(1) - mended
        what = f"network cut for {mended - begun:.1f} s {proxied=}, first write after {seconds:.1f} s"
        await load.check(cluster, what=what, bound=SILENCE)


async def test_connection_is_lost_while_it_is_opened(cluster: Cluster) -> None:
    """The application answers 503 where a connection is lost after its login."""
    leader = await asyncio.to_thread(cluster.leader)
    async with wire_to(leader.address) as wire, Judge(leader.url) as judge:
        engine = create_async_engine(
            f"postgresql+asyncpg://postgres@{wire.address}/postgres",
            connect_args={"server_settings": {"post_auth_delay": "3"}},
        )
        opening = asyncio.create_task(engine.connect().start())
        async with asyncio.timeout(LOADED):
            while not await judge.scalar("SELECT count(*) FROM pg_stat_activity WHERE state = 'starting'"):
                pass
        wire.mend()  # which resets
        with pytest.raises(DBAPIError) as caught:
            await opening
        answer = await unavailable(Request({"type": "http"}), caught.value)
        assert answer.status_code == 503
        await engine.dispose()


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
            await load.check(cluster, what=f"silence {ping=}", bound=SILENCE)
