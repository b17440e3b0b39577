"""Who holds the connections, as a `PoolTimeoutError` says."""

import asyncio
import copy
import sys

import pytest
from sqlalchemy import select

from fastapi_async_sqlalchemy import Observer, PoolStatus, PoolTimeoutError
from tests.support.databases import JudgeFor
from tests.support.observing import open_observed
from tests.support.site import MakeSite, Site
from tests.support.tables import Note

TIGHT = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.05}
SHOWN = pytest.mark.skipif(sys.version_info < (3, 12), reason="Python shows a task's context since 3.12")


async def refused(site: Site, pool_timeout: float | None = None) -> PoolTimeoutError:
    """Open a unit for which there is no connection, in a task of its own, and return its error."""

    async def work() -> None:
        async with site.db(pool_timeout=pool_timeout) as unit:
            await unit.session.scalar(select(Note.text))

    with pytest.raises(PoolTimeoutError) as raised:
        await asyncio.create_task(work())
    return raised.value


@pytest.mark.parametrize("pool_timeout", [None, 0.02])
async def test_observed_unit(database_url: str, judge_for: JudgeFor, pool_timeout: float | None) -> None:
    """An observed unit is named by its task and the time; the message has it in a line of its own."""
    async with open_observed(database_url, judge_for, Observer(), **TIGHT) as site, site.db() as unit:
        await unit.session.scalar(select(Note.text))
        error = await refused(site, pool_timeout)
        task = asyncio.current_task()
        assert task
        [holder] = error.holders
        assert holder.startswith(f"task {task.get_name()!r} for 0.")
        assert f"\nHeld by {holder}." in str(error)
        await unit.commit()
        async with site.db() as other:
            await other.session.scalar(select(Note.text))
            assert len((await refused(site)).holders) == 1


async def test_in_debug_mode(sqlite_url: str, judge_for: JudgeFor) -> None:
    """In asyncio's debug mode the place and the last statement are named, without its values."""
    asyncio.get_running_loop().set_debug(True)
    async with open_observed(sqlite_url, judge_for, Observer(), **TIGHT) as site, site.db() as unit:
        await unit.session.scalar(select(Note.text).where(Note.text == "secret"))
        [holder] = (await refused(site)).holders
    assert "test_holders.py:" in holder
    assert "last statement 'SELECT note.text" in holder
    assert "secret" not in holder


@SHOWN
async def test_request_that_nobody_observes(sqlite_url: str, make_site: MakeSite) -> None:
    """A unit that is not observed is found by its task, with its request."""
    site = await make_site(sqlite_url)
    held: list[tuple[str, ...]] = []

    @site.app.get("/slow")
    async def route() -> None:
        async with site.db.task_group() as tasks:
            for _ in range(15):  # as many as the pool has
                tasks.create_task(hold())
            await asyncio.gather(*waiting)
            error = await refused(site, 0.05)
            held.append(error.holders)
            assert "; and 5 more.\n" in str(error) or str(error).endswith("; and 5 more.")
            done.set()

    waiting: list[asyncio.Future[None]] = [asyncio.get_running_loop().create_future() for _ in range(15)]
    free, done = iter(waiting), asyncio.Event()

    async def hold() -> None:
        await site.db.session.scalar(select(Note.text))
        next(free).set_result(None)
        await done.wait()

    await site.get("/slow")
    [found] = held
    assert len(found) == 15
    assert all(one.endswith(" (GET /slow)") for one in found)


@SHOWN
async def test_units_of_tasks(sqlite_url: str, judge_for: JudgeFor) -> None:
    """A unit of a block of `db.per_task()` is found, too."""
    async with open_observed(sqlite_url, judge_for, **TIGHT) as site, site.db(multi_sessions=True) as unit:
        await unit.session.scalar(select(Note.text))

        async def read() -> None:
            await site.db.session.scalar(select(Note.text))

        with pytest.raises(PoolTimeoutError) as raised:
            await asyncio.create_task(read())
        assert len(raised.value.holders) == 1


def test_error_names_some_of_many() -> None:
    """A message names ten at most, and says how many more there are; a copy has all."""
    status = PoolStatus(pool_class="AsyncAdaptedQueuePool")
    error = PoolTimeoutError("Primary", 1, status, "wait", [f"task '{number}'" for number in range(12)])
    assert len(error.holders) == 12
    assert "task '9'; and 2 more." in str(error)
    assert "task '10'" not in str(error)
    assert str(copy.copy(error)) == str(error)
    assert copy.copy(error).holders == error.holders
