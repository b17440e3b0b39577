"""Hooks around a transaction run as often as their moment comes, over every outcome."""

import asyncio
from contextlib import suppress

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError

from tests.support.hooks import (
    COMMITS,
    ROLLBACKS,
    Act,
    BoomError,
    Log,
    Unit,
    add,
    begin_and_commit,
    begin_block,
    commit_session,
    commit_unit,
    die_in_commit,
    fail_early,
    leave_unflushed,
    play,
)
from tests.support.site import MakeSite, Site
from tests.support.tables import ORPHAN, Reply

BROKEN = r"(?i)terminating connection|connection.* closed|another operation"


def moments(commit: Act) -> list[str]:
    """Return what comes until COMMIT: the hooks before it run before its flush, which may be what begins."""
    moments = ["begin", "before"]
    return moments[::-1] if commit in {leave_unflushed, begin_block} else moments


async def write_orphan(unit: Unit) -> None:
    """Write what fails at COMMIT."""
    await add(unit)
    unit.session.add(Reply(**ORPHAN))


async def cancel(unit: Unit) -> None:
    """Write and be cancelled."""
    await add(unit)
    task = asyncio.current_task()
    assert task is not None
    task.cancel("enough")
    await asyncio.Event().wait()


async def lose_the_connection(unit: Unit) -> None:
    """Write and lose the connection before COMMIT."""
    await add(unit)
    await unit.session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))


OUTCOMES: dict[str, tuple[Act, list[str]]] = {
    **{f"commit: {act.__name__}": (act, [*moments(act), "committed"]) for act in COMMITS},
    **{
        f"rollback: {act.__name__}": (act, ["begin", "rolled back"])
        for act in ROLLBACKS
        if act is not fail_early
    },
    "rollback: fail_early": (fail_early, ["rolled back"]),
    "failed commit": (write_orphan, ["begin", "before", "rolled back"]),
    "cancelled": (cancel, ["begin", "rolled back"]),
    "connection lost": (lose_the_connection, ["begin", "rolled back"]),
}


@pytest.mark.parametrize("in_request", [False, True])
@pytest.mark.parametrize(("act", "expected"), OUTCOMES.values(), ids=OUTCOMES)
async def test_each_hook_runs_as_often_as_its_moment_comes(
    make_site: MakeSite, postgresql_url: str, act: Act, expected: list[str], log: Log, *, in_request: bool
) -> None:
    """Whatever becomes of a unit, its hooks run once each for what did happen, and not for what did not."""
    site = await make_site(postgresql_url, commit_on_exit=True)

    async def work(unit: Unit) -> None:
        unit.on_begin(log.begin)
        log.all(unit)
        await act(unit)

    with suppress(BoomError, IntegrityError, DBAPIError, asyncio.CancelledError):
        if in_request:
            await play(site, work, in_request=True)
        else:
            async with site.client():
                await play(site, work, in_request=False)
    assert log == expected
    assert site.checked_out() == 0


@pytest.mark.parametrize("in_request", [False, True])
@pytest.mark.parametrize("commit", COMMITS)
async def test_no_hook_after_an_unknown_outcome(
    make_site: MakeSite, postgresql_url: str, commit: Act, log: Log, *, in_request: bool
) -> None:
    """A connection that breaks in COMMIT leaves the hooks before it run, and those after it not."""
    site = await make_site(postgresql_url, commit_on_exit=True)
    await die_in_commit(site.judge)

    async def work(unit: Unit) -> None:
        unit.on_begin(log.begin)
        log.all(unit)
        await commit(unit)

    with pytest.raises(DBAPIError, match=BROKEN):
        async with site.client():
            await play(site, work, in_request=in_request)
    assert log == moments(commit)
    assert site.checked_out() == 0


@pytest.mark.parametrize("commit", [commit_unit, commit_session, begin_block, begin_and_commit])
async def test_connection_lost_after_a_commit_is_a_rollback(
    postgresql_worker: Site, commit: Act, log: Log
) -> None:
    """A connection that breaks in a later ROLLBACK has a known outcome, whoever made the commit before."""

    async def work() -> None:
        async with postgresql_worker.db(commit_on_exit=True) as unit:
            log.all(unit, "first")
            await commit(unit)
            log.all(unit, "second")
            await add(unit, "b")
            pid = await unit.session.scalar(text("SELECT pg_backend_pid()"))
            await postgresql_worker.judge.execute(f"SELECT pg_terminate_backend({pid}, 5000)")
            await fail_early(unit)

    with pytest.raises(BoomError, match=r"^$"):
        await work()
    assert log == ["first before", "first committed", "second rolled back"]
    assert await postgresql_worker.notes() == ["a"]
    assert postgresql_worker.checked_out() == 0
