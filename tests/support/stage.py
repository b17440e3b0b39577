"""A stage: an act is played in a worker, or in a request of an application."""

from collections.abc import Awaitable, Callable

from attrs import define
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_async_sqlalchemy import Propagation, SessionProxy, UnitOfWork
from tests.support.site import Site
from tests.support.tables import Note

Db = SessionProxy[AsyncSession]
Unit = UnitOfWork[AsyncSession]
Act = Callable[[Unit], Awaitable[object]]
NONE_OPEN = r"propagation='mandatory' joins a unit of work, and none is open here: open one around the call"
ONE_OPEN = r"propagation='never' must not run inside a unit of work, and one is open here: .*'requires_new'"
DOOMED = r"cannot be committed, because a block that had joined it failed: .*rollback\(\)"


class BoomError(Exception):
    """The error of a test's own."""


class BoomExit(BaseException):
    """What ends a program: no Exception."""


@define(eq=False)
class Stage:
    """Where a test's act is played: in a worker, or in a request of an application.

    Both commit what the act leaves behind when it ends well, and let its errors through.
    """

    site: Site
    in_request: bool

    @property
    def db(self) -> Db:
        """The pair's proxy."""
        return self.site.db

    async def inside(self, act: Act) -> None:
        """Play an act in a unit of work."""
        if not self.in_request:
            async with self.db(commit_on_exit=True) as unit:
                await act(unit)
            return

        @self.site.app.get("/inside")
        async def route() -> None:
            await act(self.db.unit)

        await self.site.get("/inside")

    async def outside(self, act: Callable[[], Awaitable[object]]) -> None:
        """Play an act where no unit of work is open."""
        if not self.in_request:
            await act()
            return

        @self.site.app.get("/outside")
        async def route() -> None:
            await act()

        await self.site.get("/outside")


async def add(db: Db, note: str) -> None:
    """Write a note in the current unit."""
    db.session.add(Note(text=note))
    await db.session.flush()


async def block(
    db: Db, propagation: Propagation, note: str | None = None, *, end: BaseException | None = None
) -> None:
    """Write a note, or nothing, in a block that ends by this error or well."""
    async with db(commit_on_exit=True, propagation=propagation):
        if note is not None:
            await add(db, note)
        if end is not None:
            raise end
