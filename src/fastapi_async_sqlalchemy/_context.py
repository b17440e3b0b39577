"""Which unit of work is current: one ContextVar a database, holding a mutable object."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeAlias, cast

from attrs import define

from ._database import Database, S_co, Terms
from ._hooks import JOINED
from ._task_units import TaskUnits
from ._unit import UnitOfWork
from .exceptions import MissingSessionError, PropagationError, SessionNotInitialisedError, UnitClosedError

if TYPE_CHECKING:
    from types import TracebackType

    from sqlalchemy.ext.asyncio import AsyncSessionTransaction
    from starlette.types import Scope

    from ._options import Propagation


@define(eq=False, repr=False)
class NoUnit:
    """Stands in the variable where no unit is bound, and says why."""

    database: Database[Any]
    place: str
    remedy: str
    opened: None = None

    @property
    def session(self) -> NoReturn:
        """Raise what tells the way out."""
        self.here()

    def here(self) -> NoReturn:
        """Raise what tells the way out."""
        if self.database.connected:
            raise MissingSessionError(self.database.name, self.place, self.remedy)
        raise SessionNotInitialisedError(self.database.name)


Current: TypeAlias = UnitOfWork[S_co] | TaskUnits[S_co] | NoUnit
"""What the variable holds."""


def open_unit(current: ContextVar[Current[S_co]]) -> UnitOfWork[S_co] | None:
    """Return the open unit that is current here, if any."""
    found = current.get()
    return None if isinstance(found, NoUnit) or found.closed else found.here()


def leave(current: ContextVar[Current[S_co]], ended: Current[S_co], outer: Current[S_co]) -> None:
    """Let what is around a block be current again, if the block was, or what has ended inside of it.

    A generator may be closed in another context than it was entered in, as one that a loop has left early is:
    where it was entered its unit stays current, and where it is closed nothing of it may be.
    """
    found = current.get()
    while found is not ended and not isinstance(found, NoUnit) and found.closed:
        inside: Current[S_co] = found.outer
        found = inside
    if found is ended:
        current.set(outer)


def request_unit(current: ContextVar[Current[S_co]], scope: Scope) -> UnitOfWork[S_co] | None:
    """Return the unit of a request, if any, by whatever blocks it is that stand inside of it."""
    found = current.get()
    while not isinstance(found, NoUnit):  # one that was open before is not the request's
        if isinstance(found, UnitOfWork) and found.belongs_to(scope):
            return found
        outer: Current[S_co] = found.outer
        found = outer
    return None


def current_unit(database: Database[S_co]) -> ContextVar[Current[S_co]]:
    """Make the variable of one database."""
    outside = NoUnit(
        database, "here", "open `async with db():` around the work, or call from within a request"
    )
    return ContextVar("fastapi_async_sqlalchemy.unit", default=outside)


@define(eq=False, repr=False)
class UnitScope(Generic[S_co]):
    """What ``db(...)`` returns: an async context manager that opens, binds and ends one unit of work.

    Serves one use: entered a second time it raises ``UnitClosedError``.
    """

    terms: Terms[S_co]
    current: ContextVar[Current[S_co]]
    unit: UnitOfWork[S_co] | None = None

    @property
    def database(self) -> Database[S_co]:
        """The database of the unit."""
        return self.terms.database

    async def __aenter__(self) -> UnitOfWork[S_co]:
        terms = self.terms
        if self.unit is not None:
            raise UnitClosedError(terms.database.name)
        if not terms.database.connected:
            raise SessionNotInitialisedError(terms.database.name)
        self.unit = unit = UnitOfWork(terms, self.current.get())
        self.current.set(unit)
        return unit

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        unit = self.unit
        if unit is None:
            raise UnitClosedError(self.database.name)
        outer: Current[S_co] = unit.outer
        try:
            if error is not None:
                await unit.abandon()
            elif not unit.finish_idle():
                await unit.finish(commit=self.terms.commit_on_exit or None)
        finally:
            # generators may be closed in any order: an outer unit that has ended is passed over, and let go
            while isinstance(outer, UnitOfWork) and outer.closed and outer.request is None:
                outer = outer.outer
            unit.outer = outer
            leave(self.current, unit, outer)


@define(eq=False, repr=False)
class PropagatingScope(Generic[S_co]):
    """What ``db(propagation=...)`` returns for anything but a new unit: it joins one, or opens one.

    The unit that it joins is another block's to commit and to close.
    """

    new: UnitScope[S_co]
    propagation: Propagation
    has_session_args: bool
    joined: UnitOfWork[S_co] | None = None
    savepoint: AsyncSessionTransaction | None = None

    def joins(self) -> UnitOfWork[S_co] | None:
        """Return the open unit that the block would join here, if any; raises ``PropagationError``."""
        if self.propagation == "requires_new":
            return None
        name, found = self.new.database.name, open_unit(self.new.current)
        if found is None:
            if self.propagation == "mandatory":
                raise PropagationError(
                    name,
                    "propagation='mandatory' joins a unit of work, and none is open here",
                    "open one around the call, or use 'required'",
                )
            return None
        if self.propagation == "never":
            raise PropagationError(
                name,
                "propagation='never' must not run inside a unit of work, and one is open here",
                "call it where none is, or use 'requires_new'",
            )
        self._agree(name, found)
        return found

    def _agree(self, name: str, found: UnitOfWork[S_co]) -> None:
        conflict = self.new.terms.settings.conflict(found.terms.settings)
        if self.has_session_args:
            conflict = "session_args were given for a session that is another block's"
        if self.new.terms.limits is not None:
            conflict = "pool_timeout was given for a connection that is another block's"
        if conflict is not None:
            remedy = "leave that out, or use propagation='requires_new'"
            raise PropagationError(name, conflict, remedy)

    async def __aenter__(self) -> UnitOfWork[S_co]:
        if self.joined is not None or self.new.unit is not None:
            raise UnitClosedError(self.new.database.name)
        self.joined = self.joins()
        if self.joined is None:
            return await self.new.__aenter__()
        if self.propagation == "nested":
            self.savepoint = self.joined.savepoint()
            await self.savepoint.__aenter__()
        return self.joined

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.joined is None:
            await self.new.__aexit__(kind, error, trace)
        elif self.savepoint is not None:
            await self.savepoint.__aexit__(kind, error, trace)
        elif error is not None and not self.joined.closed:
            self.joined.doom(JOINED, error)


@define(eq=False, repr=False)
class TaskUnitsScope(Generic[S_co]):
    """What ``db(multi_sessions=True)`` returns: a unit for each task that asks for one inside the block."""

    new: UnitScope[S_co]
    units: TaskUnits[S_co] | None = None
    outer: Current[S_co] | None = None

    async def __aenter__(self) -> UnitOfWork[S_co]:
        new = self.new
        if self.units is not None:
            raise UnitClosedError(new.database.name)
        if not new.database.connected:
            raise SessionNotInitialisedError(new.database.name)
        owner = cast("asyncio.Task[Any]", asyncio.current_task())
        self.outer = new.current.get()
        self.units = TaskUnits(new.terms, owner, self.outer)
        new.current.set(self.units)
        return self.units.here()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.units is None or self.outer is None:
            raise UnitClosedError(self.new.database.name)
        try:
            await self.units.close(failed=error is not None)
        finally:
            leave(self.new.current, self.units, self.outer)
