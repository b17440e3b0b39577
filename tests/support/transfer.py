"""A block of two halves in a task, which stops between them."""

import asyncio

from attrs import Factory, define
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_async_sqlalchemy import Propagation, SessionProxy
from tests.support.stage import add

Db = SessionProxy[AsyncSession]


@define(eq=False)
class Transfer:
    """A block of two halves in a task, which stops between them."""

    db: Db
    propagation: Propagation | None = "required"
    """None is a function by `db.transactional`."""
    halfway: asyncio.Event = Factory(asyncio.Event)
    resume: asyncio.Event = Factory(asyncio.Event)
    tasks: list[asyncio.Task[None]] = Factory(list[asyncio.Task[None]])

    async def start(self) -> asyncio.Task[None]:
        """Start the task, and wait until it has written its first half."""
        self.tasks.append(asyncio.create_task(self.run(), name="transfer"))
        await self.halfway.wait()
        return self.tasks[0]

    async def run(self) -> None:
        """Write both halves in a block."""
        if self.propagation is None:
            await self.db.transactional(self.halves)()
            return
        async with self.db(propagation=self.propagation):
            await self.halves()

    async def halves(self) -> None:
        """Write one half, wait, write the other."""
        await add(self.db, "debit")
        self.halfway.set()
        await self.resume.wait()
        await add(self.db, "credit")

    async def end(self) -> BaseException | None:
        """Let the task go on to its end; returns its error."""
        self.resume.set()
        (outcome,) = await asyncio.gather(*self.tasks, return_exceptions=True)
        return outcome
