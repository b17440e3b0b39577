"""Which unit of work is current: one ContextVar a database, holding a mutable object."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Generic, NoReturn

from attrs import define

from ._database import Database, S_co
from ._unit import UnitOfWork
from .exceptions import MissingSessionError, SessionNotInitialisedError, UnitClosedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType


@define(eq=False)
class NoUnit:
    """Stands in the variable where no unit is bound, and says why."""

    database: Database[Any]
    place: str
    remedy: str
    opened: None = None

    @property
    def session(self) -> NoReturn:
        """Raise what tells the way out."""
        if self.database.connected:
            raise MissingSessionError(self.database.name, self.place, self.remedy)
        raise SessionNotInitialisedError(self.database.name)


def current_unit(database: Database[S_co]) -> ContextVar[UnitOfWork[S_co] | NoUnit]:
    """Make the variable of one database."""
    outside = NoUnit(
        database, "here", "open `async with db():` around the work, or call from within a request"
    )
    return ContextVar("fastapi_async_sqlalchemy.unit", default=outside)


@define(eq=False)
class UnitScope(Generic[S_co]):
    """What ``db(...)`` returns: an async context manager that opens, binds and ends one unit of work.

    Serves one use: entered a second time it raises ``UnitClosedError``.
    """

    database: Database[S_co]
    current: ContextVar[UnitOfWork[S_co] | NoUnit]
    commit_on_exit: bool
    make: Callable[[], S_co] | None
    unit: UnitOfWork[S_co] | None = None

    async def __aenter__(self) -> UnitOfWork[S_co]:
        if self.unit is not None:
            raise UnitClosedError(self.database.name)
        if not self.database.connected:
            raise SessionNotInitialisedError(self.database.name)
        self.unit = unit = UnitOfWork(self.database, self.make)
        unit.outer = self.current.get()
        self.current.set(unit)
        return unit

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        unit = self.unit
        if unit is None:
            raise UnitClosedError(self.database.name)
        outer: UnitOfWork[S_co] | NoUnit = unit.outer
        try:
            if error is not None:
                await unit.abandon()
            elif not unit.finish_idle():
                await unit.finish(commit=self.commit_on_exit or None)
        finally:
            # a generator may be closed in another context than it was entered in, where nothing is bound,
            # and generators may be closed in any order: an outer unit that has ended is passed over
            if self.current.get() is unit:
                while isinstance(outer, UnitOfWork) and outer.closed and outer.outer is not None:
                    outer = outer.outer
                self.current.set(outer)
