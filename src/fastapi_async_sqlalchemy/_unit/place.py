"""The ContextVar of a database: what it holds, what is around that, and who holds the variable."""

from __future__ import annotations

from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Self

from attrs import define, field

from ..exceptions import MissingSessionError, SessionNotInitialisedError
from .database import Database, S_co

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .unit import UnitOfWork


@define(eq=False, repr=False, weakref_slot=False)
class Place(Generic[S_co]):
    """What the variable of a database may hold: a unit, units for each task, or the reason for none."""

    _outer: Place[S_co] | None = None
    """What the variable held where this was bound; None at the outermost, and after the end."""
    opened: S_co | None = None

    @property
    def closed(self) -> bool:
        """Whether it has ended."""
        return False

    @property
    def session(self) -> S_co:
        """The session of the task that asks."""
        return self._here().session

    def _here(self) -> UnitOfWork[S_co]:
        """Return the unit of the task that asks."""
        raise NotImplementedError


@define(eq=False, repr=False, weakref_slot=False)
class NoUnit(Place[S_co]):
    """Stands in the variable where no unit is bound, and gives the reason."""

    _database: Database[S_co] | None = field(default=None, alias="database")
    _where: str = field(default="", alias="where")
    _remedy: str = field(default="", alias="remedy")

    @property
    def closed(self) -> bool:
        """There is no unit that could be open."""
        return True

    def _here(self) -> NoReturn:
        """Raise the error that names the way out."""
        database = self._database
        if database is None or database.connected:
            raise MissingSessionError("" if database is None else database.name, self._where, self._remedy)
        raise SessionNotInitialisedError(database.name)


@define(eq=False, repr=False)
class Handle(Generic[S_co]):
    """What a proxy holds: its database, and where the current unit is found."""

    _database: Database[S_co]
    _current: ContextVar[Place[S_co]]
    _current_place: Callable[[], Place[S_co]]
    """The variable's ``get``."""

    def __deepcopy__(self, _: object) -> Self:
        """Return the same handle: what is copied with its proxy goes on using the same database."""
        return self


def around(place: Place[Any] | None) -> Iterator[Place[Any]]:
    """Yield a place and what is around it, from the inside out."""
    while place is not None:
        yield place
        place = place._outer


def bound_here() -> Iterator[Place[Any]]:
    """Yield what the variables of all databases hold here, each with what is around it."""
    for value in copy_context().values():
        if isinstance(value, Place):
            yield from around(value)  # pyright: ignore[reportUnknownArgumentType]  # mypy finds a cast redundant


def open_unit(current: ContextVar[Place[S_co]]) -> UnitOfWork[S_co] | None:
    """Return the open unit that is current here, if any."""
    found = current.get()
    return None if found.closed else found._here()


def leave(current: ContextVar[Place[S_co]], ended: Place[S_co], outer: Place[S_co]) -> None:
    """Make what is around a block current again, if the block was, or what has ended inside of it.

    A generator may be closed in another context than it was entered in, as one that a loop has left early is:
    where it was entered its unit stays current, and where it is closed nothing of it may be.
    """
    for place in around(current.get()):
        if place is ended:
            current.set(outer)
        if not place.closed or isinstance(place, NoUnit) or place is ended:
            return


def current_variable(database: Database[S_co]) -> ContextVar[Place[S_co]]:
    """Make the variable of one database."""
    remedy = (
        "open `async with db():` around the work, or call from within a request, where a middleware that "
        "uses it must be inside of the pair's own, and so be added before that"
    )
    outside: Place[S_co] = NoUnit(database=database, where="here", remedy=remedy)
    return ContextVar("fastapi_async_sqlalchemy.unit", default=outside)
