"""A unit of work for each task that asks for one, settled by its task's outcome."""

from __future__ import annotations

import asyncio
import logging
from asyncio import current_task
from typing import TYPE_CHECKING, Any, Final, Generic, cast
from weakref import WeakKeyDictionary, ref

from attrs import Factory, define, field

from .._session.cancellation import to_completion
from .._session.state import task_at_work
from .._unit.database import S_co
from .._unit.place import Place, leave
from .._unit.scope import OneUse
from .._unit.settling import Decision, abandon, finish
from .._unit.unit import UnitOfWork
from ..exceptions import MissingSessionError, SessionNotInitialisedError, UnitClosedError

if TYPE_CHECKING:
    from collections.abc import Container
    from types import TracebackType

    from .._unit.database import Database, UnitConfig
    from .._unit.scope import UnitScope


logger = logging.getLogger("fastapi_async_sqlalchemy")

_IN_A_THREAD: Final = "for a thread or a callback of a db.per_task() block, which may be any task's"
_HAND_OVER: Final = (
    "take `session = db.session` in the task and hand that over, or open `async with db():` around the call"
)
_SEVERAL: Final = "several units of work could not be committed"


@define(eq=False, repr=False)
class TaskUnits(Place[S_co]):
    """The variable's value inside ``async with db.per_task():``.

    It refers to tasks weakly, so that a task that has ended leaves nothing behind.
    """

    _config: UnitConfig[S_co] = field(kw_only=True, alias="config")
    _owner: asyncio.Task[Any] = field(kw_only=True, alias="owner")
    """The task of the block, whose unit shares the block's outcome."""
    _ended: bool = False
    _units: WeakKeyDictionary[asyncio.Task[Any], UnitOfWork[S_co]] = Factory(
        WeakKeyDictionary["asyncio.Task[Any]", "UnitOfWork[Any]"]
    )
    _ending: set[asyncio.Task[None]] = Factory(set["asyncio.Task[None]"])
    _errors: list[Exception] = Factory(list[Exception])
    """Errors of COMMITs after their tasks had ended; raised at the end of the block."""

    @property
    def closed(self) -> bool:
        """Whether the block has ended."""
        return self._ended

    @property
    def _database(self) -> Database[S_co]:
        return self._config.database

    def _here(self) -> UnitOfWork[S_co]:
        """Return the unit of the current task, created on first use."""
        if self._ended:
            raise UnitClosedError(self._database.name)
        task = task_at_work()
        if task is None:
            return self._asked()
        unit = self._units.get(task)
        if unit is None:
            self._units[task] = unit = UnitOfWork(self._outer, self._config, None)
            self._database.asked.set(ref(task))
            if task is not self._owner:
                task.add_done_callback(self._end)
        return unit

    def _units_inside(self) -> tuple[UnitOfWork[S_co], ...]:
        return tuple(self._units.values())

    def _asked(self) -> UnitOfWork[S_co]:
        """Return the unit of the nearest task that has asked for one, by the context that a thread inherits.

        The owner does not count: every task of the block inherits its context, so they look alike.
        """
        asked = self._database.asked.get()
        task = None if asked is None else asked()
        unit = None if task is None or task is self._owner else self._units.get(task)
        if unit is None:
            raise MissingSessionError(self._database.name, _IN_A_THREAD, _HAND_OVER)
        return unit

    def _end(self, task: asyncio.Task[Any]) -> None:
        """Settle the unit of a task that has ended, in a separate task."""
        unit = self._units.pop(task, None)
        if unit is None:
            return
        error = None if task.cancelled() else task.exception()
        if error is not None:  # task.exception() stops asyncio from reporting it
            logger.warning(
                "%s failed in a unit of %s, which is rolled back",
                task,
                self._database.name,
                exc_info=error,
                extra=unit._fields("rolled back"),
            )
        ending = task.get_loop().create_task(self._settle(unit, failed=task.cancelled() or error is not None))
        self._ending.add(ending)
        ending.add_done_callback(self._has_ended)

    def _has_ended(self, ending: asyncio.Task[None]) -> None:
        self._ending.discard(ending)
        self._units.pop(ending, None)

    async def _settle(self, unit: UnitOfWork[S_co], *, failed: bool) -> None:
        # hooks must find the unit as theirs; an eager task is done before anybody else could register it
        task = cast("asyncio.Task[Any]", current_task())
        self._units[task] = unit
        self._database.asked.set(ref(task))
        number = None if unit._watched is None else unit._watched.hash_key
        try:
            await finish(unit, Decision.ROLLBACK if failed else self._decision)
        except Exception as error:
            name = self._database.name
            extra = self._database.shared.fields(number)
            logger.exception("COMMIT on %s failed after its task had ended", name, extra=extra)
            self._errors.append(error)

    @property
    def _decision(self) -> Decision:
        return Decision.of_exit(commit_on_exit=self._config.commit_on_exit)

    async def _close(self, *, failed: bool) -> None:
        """Wait for tasks that have a unit and settle the block's own, or abandon all units.

        The task that leaves the block may not be its owner, as in the fixtures of a test. It uses the owner's
        unit unless it has asked for one itself, which then shares the block's outcome as well.
        """
        leaving = cast("asyncio.Task[Any]", current_task())
        own = self._units[self._owner]
        inside = {self._owner: own, leaving: self._units.setdefault(leaving, own)}
        try:
            if not failed:
                await self._wait(inside)
                for unit in inside.values():
                    await finish(unit, self._decision)
                await self._wait(inside)  # for units requested meanwhile
        except BaseException:
            failed = True
            raise
        finally:
            self._ended = True
            if failed:
                await to_completion(self._abandon())
        if not failed and self._errors:
            raise self._errors[0] if len(self._errors) == 1 else ExceptionGroup(_SEVERAL, self._errors)

    async def _wait(self, inside: Container[asyncio.Task[Any]]) -> None:
        """Wait until no other task has a unit."""
        while others := {task for task in self._units if task not in inside} | self._ending:
            await asyncio.wait(others)
            for task in others - self._ending:
                self._end(task)

    async def _abandon(self) -> None:
        for task, unit in list(self._units.items()):
            if task not in self._ending:
                await abandon(unit)
        if self._ending:
            await asyncio.wait(self._ending)
        self._units.clear()


@define(eq=False, repr=False)
class TaskUnitsScope(OneUse, Generic[S_co]):
    """The result of ``db.per_task()``: a unit for each task that asks for one inside the block."""

    new: UnitScope[S_co]
    units: TaskUnits[S_co] | None = None
    outer: Place[S_co] | None = None

    async def __aenter__(self) -> UnitOfWork[S_co]:
        new = self.new
        if not new.database.connected and not self._entered:
            raise SessionNotInitialisedError(new.database.name)
        self._enter_once(new.database.name, "`async with db.per_task():`")
        owner = cast("asyncio.Task[Any]", asyncio.current_task())
        self.outer = new.current.get()
        self.units = TaskUnits(self.outer, config=new.config, owner=owner)
        new.current.set(self.units)
        return self.units._here()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.units is None or self.outer is None:
            raise UnitClosedError(self.new.database.name)
        try:
            await self.units._close(failed=error is not None)
        finally:
            leave(self.new.current, self.units, self.outer)
