"""`db.on_open()`: what is done with each new unit of a pair, once for the whole service."""

from typing import Any

import pytest
from sqlalchemy import Connection, insert, select, text

from fastapi_async_sqlalchemy import UnitOfWork
from tests.support.hooks import BoomError, Unit
from tests.support.site import MakeSite, Site
from tests.support.tables import Note


async def test_each_unit_once(worker: Site) -> None:
    """The callback gets each unit of the pair when its session is made, those of tasks too."""
    units: list[UnitOfWork[Any]] = []
    worker.db.on_open(units.append)

    async def read() -> UnitOfWork[Any]:
        await worker.db.session.scalar(select(Note.text))
        return worker.db.unit

    async with worker.db():
        assert units == []
        first = await read()
        await read()
        async with worker.db(propagation="required"):
            await read()
        assert units == [first]
        second, third = await worker.db.gather(read(), read())
    async with worker.db():
        pass
    assert units == [first, second, third]


async def test_hooks_of_every_request(database_url: str, make_site: MakeSite) -> None:
    """A service sets its tenant and its audit once, and its routes know nothing of it."""
    site = await make_site(database_url, commit_on_exit=True)
    began: list[object] = []

    def begin(connection: Connection) -> None:
        began.append(connection.execute(text("SELECT 1")).scalar())

    def prepare(unit: Unit) -> None:
        async def audit() -> None:
            await unit.session.execute(insert(Note).values(text="audited"))

        unit.on_begin(begin)
        unit.before_commit(audit)

    site.db.on_open(prepare)

    @site.app.get("/")
    async def route() -> None:
        site.db.session.add(Note(text="a"))

    assert (await site.get()).status_code == 200
    assert began == [1]
    assert await site.notes() == ["a", "audited"]


async def test_error_leaves_no_session(worker: Site) -> None:
    """A unit whose callback fails gets no session, now or later: the callback is no hint but a condition."""
    tries = 0

    def fail(unit: Unit) -> None:
        nonlocal tries
        tries += 1
        unit.on_begin(lambda _: None)
        raise BoomError

    worker.db.on_open(fail)
    async with worker.db(commit_on_exit=True) as unit:
        for _ in range(2):
            with pytest.raises(BoomError):
                _ = unit.session
        assert unit.opened is None
    assert tries == 2
    assert unit.closed


class Later:
    """An object that can be called, and returns a coroutine."""

    def __call__(self, unit: Unit) -> object:
        """Return the coroutine."""
        return later(unit)


async def later(_: Unit) -> None:
    """Do nothing, asynchronously."""


@pytest.mark.parametrize("wrong", [3, later])
def test_what_is_no_plain_function_is_refused(sqlite_worker: Site, wrong: Any) -> None:
    """A coroutine function would never be awaited."""
    with pytest.raises(TypeError, match="callback must be a plain function of a unit of work, not "):
        sqlite_worker.db.on_open(wrong)


async def test_coroutine_is_refused(sqlite_worker: Site) -> None:
    """What returns a coroutine after all is refused when it does."""
    sqlite_worker.db.on_open(Later())
    async with sqlite_worker.db() as unit:
        with pytest.raises(TypeError, match=r"must be a plain function, and .* returned a coroutine"):
            _ = unit.session
