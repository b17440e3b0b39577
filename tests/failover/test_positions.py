"""Positions of the log on a cluster: standbys that fall behind, and a change of the timeline."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager

import pytest
from attrs import frozen
from sqlalchemy import func, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from examples.cluster.app import ENGINE_ARGS
from fastapi_async_sqlalchemy import (
    ReplicaLagError,
    SessionProxy,
    WalPosition,
    create_middleware_and_session_proxy,
)
from tests.failover.load import by_url_or_proxy
from tests.support.databases import Judge
from tests.support.patroni import LONG, Cluster
from tests.support.replication import replay_paused
from tests.support.site import checked_out
from tests.support.tables import Base, Note


@frozen
class Pairs:
    """The two pairs of an application without a web."""

    primary: SessionProxy[AsyncSession]
    replica: SessionProxy[AsyncSession]

    async def write(self, note: str) -> WalPosition:
        """Write a note and return its position."""
        async with self.primary() as unit:
            unit.session.add(Note(text=note))
            await unit.commit()
            return await self.primary.commit_position()

    async def read(self, position: WalPosition, note: str, seconds: float = LONG, **options: object) -> bool:
        """Whether a unit that waits for the position finds the note; tell by an error that it was late."""
        fallback = self.primary if options.get("fallback") else None
        async with self.replica.after(position, timeout=seconds, fallback=fallback) as unit:
            found = await unit.session.scalar(select(Note.text).where(Note.text == note))
            return found == note

    async def is_standby(self) -> bool:
        """Whether the replica's pair is served by a standby."""
        async with self.replica() as unit:
            return bool(await unit.session.scalar(select(func.pg_is_in_recovery())))


@asynccontextmanager
async def pairs_of(cluster: Cluster, *, proxied: bool = False) -> AsyncGenerator[Pairs]:
    """Make the pairs, and the table; on exit no connection is out."""
    _, primary = create_middleware_and_session_proxy(AsyncSession)
    _, replica = create_middleware_and_session_proxy(AsyncSession, read_only=True)
    async with (
        primary.connect(cluster.url("primary", proxied=proxied), engine_args=ENGINE_ARGS),
        replica.connect(cluster.url("replica", proxied=proxied), engine_args=ENGINE_ARGS),
    ):
        await primary.drop_all(Base.metadata)
        await primary.create_all(Base.metadata)
        async with replica.after(await primary.commit_position(), timeout=LONG):
            pass
        yield Pairs(primary, replica)
        assert [checked_out(db.engine.pool) for db in (primary, replica)] == [0, 0]


@asynccontextmanager
async def maintenance(cluster: Cluster) -> AsyncGenerator[None]:
    """Keep Patroni from resuming the replay that a test pauses."""
    with ExitStack() as exits:
        await asyncio.to_thread(exits.enter_context, cluster.maintenance())
        try:
            yield
        finally:
            await asyncio.to_thread(exits.close)


@by_url_or_proxy
async def test_replica_falls_behind_and_comes_back(cluster: Cluster, *, proxied: bool) -> None:
    """A late standby is an error that says so, or the leader serves the read; later the standby does."""
    standbys = [one for one in cluster.members if one is not await asyncio.to_thread(cluster.leader)]
    async with maintenance(cluster), pairs_of(cluster, proxied=proxied) as pairs, AsyncExitStack() as paused:
        await _until(pairs, standby=True)
        for standby in standbys:
            await paused.enter_async_context(replay_paused(standby))
        position = await pairs.write("late")
        with pytest.raises(ReplicaLagError):
            await pairs.read(position, "late", 0.2)
        assert await pairs.read(position, "late", 0.2, fallback=True)
        await paused.aclose()
        assert await pairs.read(position, "late")
        assert await pairs.is_standby()


@by_url_or_proxy
async def test_standbys_are_gone_and_come_back(cluster: Cluster, *, proxied: bool) -> None:
    """Without a standby the leader serves the replica's pair; standbys that are back serve it again."""
    standbys = [one for one in cluster.members if one is not await asyncio.to_thread(cluster.leader)]
    async with pairs_of(cluster, proxied=proxied) as pairs:
        before = await pairs.write("before")
        assert await pairs.read(before, "before")
        for standby in standbys:
            await asyncio.to_thread(standby.stop)
        await _until(pairs, standby=False)
        alone = await pairs.write("alone")
        assert await pairs.read(alone, "alone")
        for standby in standbys:
            standby.start()
        await asyncio.to_thread(cluster.healthy)
        await pairs.replica.engine.dispose()  # else its connections to the leader go on
        await _until(pairs, standby=True)
        assert await pairs.read(await pairs.write("again"), "again")


async def _until(pairs: Pairs, *, standby: bool) -> None:
    """Wait until a server of this role serves the replica's pair."""
    async with asyncio.timeout(LONG):
        while True:
            try:
                if await pairs.is_standby() is standby:
                    return
            except (OSError, DBAPIError):
                pass
            await pairs.replica.engine.dispose()
            await asyncio.sleep(0.1)


@by_url_or_proxy
async def test_positions_over_a_change_of_the_timeline(cluster: Cluster, *, proxied: bool) -> None:
    """A position of the old leader is reached on the new timeline, and so is the new leader's on the old."""
    before = await asyncio.to_thread(cluster.leader)
    async with pairs_of(cluster, proxied=proxied) as pairs:
        old = await pairs.write("old")
        timeline = await timeline_of(before.url)
        await asyncio.to_thread(cluster.switchover)
        leader = await asyncio.to_thread(cluster.healthy)
        assert leader is not before
        assert await timeline_of(leader.url) > timeline
        new = await pairs.write("new")
        assert lsn(new) > lsn(old)
        for position, note in ((old, "old"), (new, "new")):
            assert await pairs.read(position, note)
        _, former = create_middleware_and_session_proxy(AsyncSession, read_only=True)
        async with former.connect(before.url), former.after(new, timeout=LONG) as unit:
            assert await unit.session.scalar(select(func.pg_is_in_recovery()))
            assert set(await unit.session.scalars(select(Note.text))) == {"old", "new"}


async def timeline_of(url: str) -> int:
    """Return the timeline on which a server is."""
    async with Judge(url) as judge:
        await judge.execute("CHECKPOINT")
        return int(f"{await judge.scalar('SELECT timeline_id FROM pg_control_checkpoint()')}")


def lsn(position: str) -> tuple[int, ...]:
    """Return a position as numbers, which can be compared."""
    return tuple(int(part, 16) for part in position.split("/"))
