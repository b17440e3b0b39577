"""A listener of the user's that fails after one COMMIT of `atomic()`: all of them have their one outcome."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

import pytest
from sqlalchemy import event

from fastapi_async_sqlalchemy import InDoubtError, atomic
from tests.support.atomic import Group, open_group, urls_of
from tests.support.databases import JudgeFor
from tests.support.hooks import Log

KINDS = [("postgresql", "mariadb"), ("psycopg", "mariadb"), ("postgresql", "postgresql")]


@pytest.fixture
async def group(
    request: pytest.FixtureRequest, kinds: tuple[str, ...], databases: ExitStack, judge_for: JudgeFor
) -> AsyncIterator[Group]:
    """The databases, in use without an application."""
    urls = await asyncio.to_thread(lambda: list(urls_of(kinds, databases, request.getfixturevalue)))
    async with open_group(urls, judge_for) as group:
        yield group


@pytest.mark.parametrize("kinds", KINDS, ids=" ".join)
@pytest.mark.parametrize("place", [0, 1])
async def test_listener_fails_after_a_commit(group: Group, place: int) -> None:
    """The others are committed as well, nothing is left prepared, and the error goes on."""
    log = Log()

    def boom(_: Any) -> None:
        raise LookupError("mine")  # noqa: EM101  # the message is the test's

    async def work() -> None:
        async with atomic(*group.proxies):
            for side in group.sides:
                log.both(side.db.unit)
            event.listen(group.sides[place].db.session.sync_session, "after_commit", boom)
            await group.add("all")

    with pytest.raises(LookupError, match=r"^mine$"):
        await work()
    assert await group.notes() == group.everywhere("all")
    assert await group.prepared() == 0
    assert log == ["committed"] * 2


@pytest.mark.parametrize("kinds", KINDS, ids=" ".join)
@pytest.mark.parametrize("place", [0, 1])
async def test_listener_fails_before_a_commit(group: Group, place: int) -> None:
    """What is prepared there is in doubt, and recovery commits it as the others are: none is half done."""
    log = Log()

    def boom(*_: Any) -> None:
        raise LookupError("mine")  # noqa: EM101  # the message is the test's

    async def work() -> None:
        async with atomic(*group.proxies):
            for side in group.sides:
                log.both(side.db.unit)
            await group.add("all")

    engine = group.sides[place].engine.sync_engine
    event.listen(engine, "commit_twophase", boom)
    with pytest.raises(InDoubtError) as raised:
        await work()
    event.remove(engine, "commit_twophase", boom)
    assert isinstance(raised.value.__cause__, LookupError)
    await group.recover()
    assert await group.notes() == group.everywhere("all")
    assert await group.prepared() == 0
    assert log == ["committed"] * len(raised.value.committed)
