"""A task that uses the session's own connection: whatever ends the unit, it does not wait for ever."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from attrs import define
from fastapi import FastAPI
from sqlalchemy import literal, select
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_async_sqlalchemy import create_middleware_and_session_proxy
from tests.support.databases import JudgeFor
from tests.support.gate import Gate, closed, gate_of, passing
from tests.support.site import Site, complaints
from tests.support.tables import Note, engine_with_tables
from tests.support.versions import survives_cancellation

pytestmark = survives_cancellation

DEADLINE = 20
"""Seconds after which something hangs; a statement at a closed gate would take a minute."""


@define(eq=False)
class Narrow(Site):
    """A site whose pool holds a single connection, and a gate for its statements."""

    gate: Gate


@pytest.fixture
async def narrow(driver_url: str, judge_for: JudgeFor) -> AsyncIterator[Narrow]:
    """A process without an application, by each driver."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    async with engine_with_tables(driver_url, pool_size=1, max_overflow=0, pool_timeout=DEADLINE) as engine:
        judge = await judge_for(driver_url)
        gate = gate_of(engine, judge)
        await engine.dispose()
        db.bind(engine)
        site = Narrow(FastAPI(), db, engine, judge, gate)
        yield site
        assert site.checked_out() == 0
        db.unbind()


async def wait_on_connection(site: Narrow) -> asyncio.Task[None]:
    """Have a child task wait at a gate on the current session's own connection."""
    connection = await site.db.session.connection()

    async def wait() -> None:
        await connection.execute(passing(site.gate))

    child = asyncio.create_task(wait())
    await site.gate.reached()
    return child


async def check_next(site: Site) -> None:
    """See that the only connection is in the pool, and serves the next unit."""
    assert site.checked_out() == 0
    async with asyncio.timeout(DEADLINE), site.db() as unit:
        assert (await unit.session.scalars(select(literal("next")))).one() == "next"


async def by_error(site: Site) -> None:
    """Raise."""
    raise LookupError


async def by_return(site: Site) -> None:
    """Return, with nothing to commit."""


async def by_rollback(site: Site) -> None:
    """Roll back, and read on."""
    await site.db.session.rollback()
    assert (await site.db.session.scalars(select(literal("on")))).one() == "on"


@pytest.mark.parametrize("end", [by_error, by_return, by_rollback])
async def test_waiter_ends_with_the_transaction(
    narrow: Narrow, end: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A statement of a child's on the connection fails at once when the transaction is given up."""
    children = list[asyncio.Task[Any]]()

    async def work() -> None:
        async with narrow.db():
            children.append(await wait_on_connection(narrow))
            await end(narrow)

    async with asyncio.timeout(DEADLINE), closed(narrow.gate):
        unit = asyncio.create_task(work())
        await asyncio.wait({unit})
        assert isinstance(unit.exception(), LookupError if end is by_error else type(None))
        await asyncio.wait(children)
        assert isinstance(children[0].exception(), Exception)
        await check_next(narrow)
    assert complaints(caplog) == []


async def test_commit_waits_for_the_statement(narrow: Narrow) -> None:
    """COMMIT waits for a statement of a child's on the connection, as it does for one on the session."""
    children = list[asyncio.Task[Any]]()

    async def work() -> None:
        async with narrow.db(commit_on_exit=True) as unit:
            unit.session.add(Note(text="kept"))
            await unit.session.flush()
            children.append(await wait_on_connection(narrow))

    async with asyncio.timeout(DEADLINE):
        async with closed(narrow.gate):
            unit = asyncio.create_task(work())
            await narrow.gate.reached()
            assert not unit.done()
        await unit
        await children[0]
    assert await narrow.notes() == ["kept"]
    await check_next(narrow)


async def test_commit_by_hand_waits_for_the_statement(narrow: Narrow) -> None:
    """So does a COMMIT by hand, after which the same session reads on."""
    async with asyncio.timeout(DEADLINE), narrow.db() as unit:
        async with closed(narrow.gate):
            unit.session.add(Note(text="kept"))
            child = await wait_on_connection(narrow)
            commit = asyncio.create_task(unit.session.commit())
        await commit
        await child
        assert await narrow.notes() == ["kept"]
    await check_next(narrow)
