"""Which unit of work is current: one ContextVar a database, holding a mutable object."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeAlias

from attrs import define

from ._database import Database, S_co
from ._unit import UnitOfWork, abandon, finish
from .exceptions import MissingSessionError, SessionNotInitialisedError, UnitClosedError

if TYPE_CHECKING:
    from collections.abc import Mapping
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


Current: TypeAlias = "ContextVar[UnitOfWork[S_co] | NoUnit]"


def current_unit(database: Database[S_co]) -> ContextVar[UnitOfWork[S_co] | NoUnit]:
    """Make the variable of one database."""
    outside = NoUnit(database, "here", "open `async with db():` around the work, or call from within a request")
    return ContextVar("fastapi_async_sqlalchemy.unit", default=outside)


@define(eq=False)
class UnitScope(Generic[S_co]):
    """What ``db(...)`` returns: an async context manager that opens, binds and ends one unit of work.

    Serves one use: entered a second time it raises ``UnitClosedError``.
    """

    _database: Database[S_co]
    _current: ContextVar[UnitOfWork[S_co] | NoUnit]
    _commit_on_exit: bool
    _session_args: Mapping[str, Any] | None
    _unit: UnitOfWork[S_co] | None = None
    _outer: UnitOfWork[S_co] | NoUnit | None = None

    async def __aenter__(self) -> UnitOfWork[S_co]:
        if self._unit is not None:
            raise UnitClosedError(self._database.name)
        if not self._database.connected:
            raise SessionNotInitialisedError(self._database.name)
        self._unit = unit = UnitOfWork(self._database, self._session_args)
        self._outer = self._current.get()
        self._current.set(unit)
        return unit

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        unit, outer = self._unit, self._outer
        if unit is None or outer is None:
            raise UnitClosedError(self._database.name)
        try:
            if error is None:
                await finish(unit, commit=self._commit_on_exit or None)
            else:
                await abandon(unit)
        finally:
            # a generator may be closed in another context than it was entered in: nothing is bound there
            if self._current.get() is unit:
                self._current.set(outer)
