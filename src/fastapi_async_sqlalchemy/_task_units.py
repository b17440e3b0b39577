"""A unit of work for each task that asks for one, settled with its task's own outcome."""

from __future__ import annotations

import asyncio
import logging
from asyncio import current_task
from typing import TYPE_CHECKING, Any, Final, Generic, cast
from weakref import WeakKeyDictionary, ref

from attrs import Factory, define

from ._database import S_co
from ._ending import to_completion
from ._unit import UnitOfWork
from .exceptions import MissingSessionError, UnitClosedError

if TYPE_CHECKING:
    from collections.abc import Container

    from ._database import Database, Terms

logger = logging.getLogger("fastapi_async_sqlalchemy")

_IN_A_THREAD: Final = "for a thread or a callback of a multi_sessions block, which may be any task's"
_HAND_OVER: Final = (
    "take `session = db.session` in the task and hand that over, or open `async with db():` around the call"
)
_SEVERAL: Final = "several units of work could not be committed"


@define(eq=False, repr=False)
class TaskUnits(Generic[S_co]):
    """Stands in the variable inside ``async with db(multi_sessions=True):``.

    Units are held by their tasks, and weakly: a task that has ended leaves nothing behind.
    """

    terms: Terms[S_co]
    owner: asyncio.Task[Any]
    """The task of the block, whose unit shares the block's outcome."""
    outer: Any
    """What was current where the block was opened."""
    opened: None = None
    closed: bool = False
    units: WeakKeyDictionary[asyncio.Task[Any], UnitOfWork[S_co]] = Factory(
        WeakKeyDictionary["asyncio.Task[Any]", "UnitOfWork[Any]"]
    )
    ending: set[asyncio.Task[None]] = Factory(set["asyncio.Task[None]"])
    errors: list[Exception] = Factory(list[Exception])
    """Of COMMITs whose tasks had ended already; raised at the end of the block."""

    @property
    def database(self) -> Database[S_co]:
        """The database of the units."""
        return self.terms.database

    @property
    def session(self) -> S_co:
        """The session of the task that asks."""
        return self.here().session

    def here(self) -> UnitOfWork[S_co]:
        """Return the unit of the task that asks, made when it first does."""
        if self.closed:
            raise UnitClosedError(self.database.name)
        try:
            task = current_task()
        except RuntimeError:  # a thread
            task = None
        if task is None:
            return self._asked()
        unit = self.units.get(task)
        if unit is None:
            self.units[task] = unit = UnitOfWork(self.terms, self.outer)
            self.database.asked.set(ref(task))
            if task is not self.owner:
                task.add_done_callback(self._end)
        return unit

    def _asked(self) -> UnitOfWork[S_co]:
        """Return the unit of the nearest task that has asked for one, by the context that a thread inherits.

        The owner does not count: every task of the block has its context from his, and is not told apart.
        """
        asked = self.database.asked.get()
        task = None if asked is None else asked()
        unit = None if task is None or task is self.owner else self.units.get(task)
        if unit is None:
            raise MissingSessionError(self.database.name, _IN_A_THREAD, _HAND_OVER)
        return unit

    def _end(self, task: asyncio.Task[Any]) -> None:
        """Settle the unit of a task that has ended, in a task of its own."""
        unit = self.units.pop(task, None)
        if unit is None:
            return
        error = None if task.cancelled() else task.exception()
        if error is not None:  # asking for it has told asyncio that somebody knows
            logger.warning(
                "%s failed in a unit of %s, which is rolled back", task, self.database.name, exc_info=error
            )
        ending = task.get_loop().create_task(self._settle(unit, failed=task.cancelled() or error is not None))
        self.ending.add(ending)
        ending.add_done_callback(self._ended)

    def _ended(self, ending: asyncio.Task[None]) -> None:
        self.ending.discard(ending)
        self.units.pop(ending, None)

    async def _settle(self, unit: UnitOfWork[S_co], *, failed: bool) -> None:
        # its hooks find it as theirs; an eager task is done before anybody else could say so
        task = cast("asyncio.Task[Any]", current_task())
        self.units[task] = unit
        self.database.asked.set(ref(task))
        try:
            await unit.finish(commit=False if failed else self.terms.commit_on_exit or None)
        except Exception as error:
            logger.exception("COMMIT on %s failed after its task had ended", self.database.name)
            self.errors.append(error)

    async def close(self, *, failed: bool) -> None:
        """Wait for the tasks that have a unit and settle the block's own, or give all units up.

        The task that leaves the block may be another than its owner, as in the fixtures of a test. It has the
        owner's unit unless it has asked for one itself, which then shares the block's outcome as well.
        """
        leaving = cast("asyncio.Task[Any]", current_task())
        own = self.units[self.owner]
        inside = {self.owner: own, leaving: self.units.setdefault(leaving, own)}
        try:
            if not failed:
                await self._wait(inside)
                for unit in inside.values():
                    await unit.finish(commit=self.terms.commit_on_exit or None)
                await self._wait(inside)  # for who has come meanwhile
        except BaseException:
            failed = True
            raise
        finally:
            self.closed = True
            if failed:
                await to_completion(self._abandon())
        if not failed and self.errors:
            raise self.errors[0] if len(self.errors) == 1 else ExceptionGroup(_SEVERAL, self.errors)

    async def _wait(self, inside: Container[asyncio.Task[Any]]) -> None:
        """Wait until no other task has a unit."""
        while others := {task for task in self.units if task not in inside} | self.ending:
            await asyncio.wait(others)
            for task in others - self.ending:
                self._end(task)

    async def _abandon(self) -> None:
        for task, unit in list(self.units.items()):
            if task not in self.ending:
                await unit.abandon()
        if self.ending:
            await asyncio.wait(self.ending)
        self.units.clear()
