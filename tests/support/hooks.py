"""A log of hooks that ran, and ways to end a unit."""

from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_async_sqlalchemy import UnitOfWork
from tests.support.databases import Judge
from tests.support.site import Site
from tests.support.tables import Note

Unit = UnitOfWork[AsyncSession]
Act = Callable[[Unit], Awaitable[object]]


class BoomError(Exception):
    """The error of a test's own."""


def boom(*_: object) -> None:
    """Fail."""
    message = "boom"
    raise BoomError(message)


class Log(list[str]):
    """What hooks have run, in order."""

    def hook(self, event: str) -> Callable[[], None]:
        """Return a hook that notes an event."""
        return lambda: self.append(event)

    def both(self, unit: Unit, event: str = "") -> None:
        """Register a hook for each outcome."""
        unit.on_commit(self.hook(f"{event} committed".strip()))
        unit.on_rollback(self.hook(f"{event} rolled back".strip()))

    def all(self, unit: Unit, event: str = "") -> None:
        """Register a hook for each moment there is but a transaction's beginning."""
        self.both(unit, event)
        unit.before_commit(self.hook(f"{event} before".strip()))

    def begin(self, connection: Connection) -> None:
        """Note that a transaction begins."""
        self.append("begin")


async def add(unit: Unit, note: str = "a") -> None:
    """Write a note."""
    unit.session.add(Note(text=note))
    await unit.session.flush()


async def leave(unit: Unit) -> None:
    """Write, and leave the rest to the end of the unit."""
    await add(unit)


async def commit_unit(unit: Unit) -> None:
    """Write and commit by the unit."""
    await add(unit)
    await unit.commit()


async def commit_session(unit: Unit) -> None:
    """Write and commit by the session."""
    await add(unit)
    await unit.session.commit()


async def begin_block(unit: Unit) -> None:
    """Write in a block that commits itself."""
    async with unit.session.begin():
        unit.session.add(Note(text="a"))


async def begin_and_commit(unit: Unit) -> None:
    """Write in a transaction that is begun and committed by hand."""
    transaction = await unit.session.begin()
    await add(unit)
    await transaction.commit()


async def rollback_unit(unit: Unit) -> None:
    """Write and roll back by the unit."""
    await add(unit)
    await unit.rollback()


async def rollback_session(unit: Unit) -> None:
    """Write and roll back by the session."""
    await add(unit)
    await unit.session.rollback()


async def close_session(unit: Unit) -> None:
    """Write and close the session."""
    await add(unit)
    await unit.session.close()


async def fail(unit: Unit) -> None:
    """Write and fail."""
    await add(unit)
    raise BoomError


async def fail_early(unit: Unit) -> None:
    """Fail before anything was sent."""
    raise BoomError


async def fail_in_begin_block(unit: Unit) -> None:
    """Fail in a block that rolls back itself."""
    async with unit.session.begin():
        await add(unit)
        raise BoomError


async def leave_unflushed(unit: Unit) -> None:
    """Change objects alone, and leave the rest to the end of the unit."""
    unit.session.add(Note(text="a"))


@contextmanager
def listening(
    target: Any, name: str, listener: Callable[..., None], *, first: bool = False
) -> Generator[None]:
    """Listen, and no longer afterwards: the process goes on."""
    event.listen(target, name, listener, insert=first)
    try:
        yield
    finally:
        event.remove(target, name, listener)


async def die_in_commit(judge: Judge) -> None:
    """Let the server end the connection of whoever commits a note, in the middle of COMMIT."""
    await judge.execute(
        "CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$"
    )
    await judge.execute(
        "CREATE CONSTRAINT TRIGGER die AFTER INSERT ON note DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION die()"
    )


COMMITS = (leave, leave_unflushed, commit_unit, commit_session, begin_block, begin_and_commit)


async def play(site: Site, act: Act, *, in_request: bool) -> None:
    """Play an act in a unit, or a request, that commits at its end; its errors go on."""
    if not in_request:
        async with site.db(commit_on_exit=True) as unit:
            await act(unit)
        return

    @site.app.get("/")
    async def route() -> None:
        await act(site.db.unit)

    await site.get()


async def write_and_fail(unit: Unit) -> None:
    """Write and fail."""
    await add(unit)
    raise BoomError


async def give_up(unit: Unit) -> None:
    """Write, and have the unit rolled back at its end."""
    await add(unit)
    unit.set_rollback_only()


async def fail_in_a_savepoint_and_outside(unit: Unit) -> None:
    """Release a savepoint, then fail."""
    await add(unit)
    async with unit.savepoint():
        await add(unit, "b")
    raise BoomError


ROLLBACKS = (
    *(rollback_unit, rollback_session, close_session, write_and_fail, fail_early, fail_in_begin_block),
    *(give_up, fail_in_a_savepoint_and_outside),
)
