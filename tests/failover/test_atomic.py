"""The leader of a cluster dies while it commits together with another database."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
from attrs import define
from sqlalchemy import event, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.util import await_only

from fastapi_async_sqlalchemy import (
    InDoubtError,
    SessionProxy,
    atomic,
    create_middleware_and_session_proxy,
)
from fastapi_async_sqlalchemy.recovery import recover
from tests.support.atomic import YOUNG
from tests.support.patroni import Cluster
from tests.support.site import checked_out
from tests.support.tables import Base, Note


@define(eq=False)
class Side:
    """One of the two databases."""

    db: SessionProxy[AsyncSession]
    engine: AsyncEngine

    async def notes(self) -> set[str]:
        """Return what is committed, seen by a connection that is made now."""
        async with self.engine.connect() as connection:
            return set(await connection.scalars(select(Note.text)))


@asynccontextmanager
async def side(url: str) -> AsyncGenerator[Side]:
    """Make a pair, and an empty table; on exit no connection is out."""
    engine = create_async_engine(url, pool_pre_ping=True, connect_args={"timeout": 3, "command_timeout": 10})
    _, db = create_middleware_and_session_proxy(AsyncSession)
    db.bind(engine)
    await db.drop_all(Base.metadata)
    await db.create_all(Base.metadata)
    try:
        yield Side(db, engine)
        assert checked_out(engine.pool) == 0
    finally:
        await engine.dispose()


@pytest.mark.parametrize(
    ("step", "cluster_is_last", "proxied"),
    [
        ("prepare_twophase", False, False),
        ("prepare_twophase", True, False),
        ("commit_twophase", False, False),
        ("commit_twophase", True, False),
        ("commit_twophase", True, True),
    ],
)
async def test_leader_dies_while_it_commits_with_another(
    cluster: Cluster, postgresql_url: str, step: str, *, cluster_is_last: bool, proxied: bool
) -> None:
    """Before its PREPARE nothing is committed; after it recovery finishes the work on the new leader."""
    await asyncio.to_thread(cluster.configure, primary_start_timeout=0)
    leader = await asyncio.to_thread(cluster.leader)
    async with side(cluster.url("primary", proxied=proxied)) as shop, side(postgresql_url) as ledger:
        sides = [ledger, shop] if cluster_is_last else [shop, ledger]

        def crash(*_: object) -> None:
            await_only(asyncio.to_thread(leader.crash))  # which does nothing the second time

        async def write() -> None:
            async with atomic(sides[0].db, sides[1].db):
                for one in sides:
                    one.db.session.add(Note(text="note"))
                    await one.db.session.flush()
                event.listen(shop.engine.sync_engine, step, crash)

        is_in_doubt = step == "commit_twophase" or cluster_is_last
        with pytest.raises(InDoubtError if is_in_doubt else (DBAPIError, OSError)):
            await write()
        await asyncio.to_thread(cluster.healthy)
        assert await asyncio.to_thread(cluster.leader) is not leader
        done = await recover(shop.engine, ledger.engine, older_than=YOUNG)
        assert bool(done) is is_in_doubt
        expected = {"note"} if step == "commit_twophase" else set[str]()
        assert [await shop.notes(), await ledger.notes()] == [expected, expected]
