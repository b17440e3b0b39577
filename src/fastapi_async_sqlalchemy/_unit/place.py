"""The context variable of a database: its values, the places around them, and its handle."""

from __future__ import annotations

from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Self

from attrs import define, field

from ..exceptions import ConfigurationError, MissingSessionError, SessionNotInitialisedError
from .database import Database, S_co

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .unit import UnitOfWork


@define(eq=False, repr=False, weakref_slot=False)
class Place(Generic[S_co]):
    """A value of a database's variable: a unit, units for each task, or the reason for none."""

    _outer: Place[S_co] | None
    """The variable's value before this one was bound; None for the outermost, and after the end."""
    opened: S_co | None = field(default=None, init=False)

    @property
    def closed(self) -> bool:
        """Whether the unit or block has ended."""
        return False

    @property
    def session(self) -> S_co:
        """The session of the current task."""
        return self._here().session

    def _here(self) -> UnitOfWork[S_co]:
        """Return the unit of the current task."""
        raise NotImplementedError

    def _units_inside(self) -> tuple[UnitOfWork[S_co], ...]:
        """Return the units of all tasks."""
        return ()


@define(eq=False, repr=False, weakref_slot=False)
class NoUnit(Place[S_co]):
    """The variable's value where no unit is bound; it holds the reason."""

    _database: Database[S_co] | None = field(default=None, alias="database")
    _where: str = field(default="", alias="where")
    _remedy: str = field(default="", alias="remedy")

    @property
    def closed(self) -> bool:
        """Always True: there is no unit that could be open."""
        return True

    def _here(self) -> NoReturn:
        """Raise an error that names the remedy."""
        database = self._database
        if database is None or database.connected:
            raise MissingSessionError("" if database is None else database.name, self._where, self._remedy)
        raise SessionNotInitialisedError(database.name)


@define(eq=False, repr=False)
class Handle(Generic[S_co]):
    """A proxy's state: its database, and access to the current unit."""

    _database: Database[S_co]
    _current: ContextVar[Place[S_co]]
    _current_place: Callable[[], Place[S_co]]
    """The variable's ``get``."""

    def __deepcopy__(self, _: object) -> Self:
        """Return the same handle: a copied proxy goes on using the same database."""
        return self


class NoSignature:
    """Descriptor that refuses the proxy's signature, so that frameworks cannot inject its arguments."""

    def __get__(self, proxy: object, kind: type) -> NoReturn:
        if proxy is None:
            raise AttributeError
        message = (
            "Depends(db) would make the arguments of db() a part of the request: "
            "write Depends(db.dependency), which gives the request's session."
        )
        raise ConfigurationError(message)


def around(place: Place[Any] | None) -> Iterator[Place[Any]]:
    """Yield a place and the places around it, from the inside out."""
    while place is not None:
        yield place
        place = place._outer


def bound_here() -> list[Place[Any]]:
    """Return the current values of all databases' variables, each with the places around it."""
    places: list[Place[Any]] = []
    for value in copy_context().values():
        if not isinstance(value, Place):
            continue
        place: Place[Any] | None = value  # pyright: ignore[reportUnknownVariableType]  # redundant cast to mypy
        while place is not None:  # around() takes twice as long, and each request that writes comes here
            places.append(place)
            place = place._outer
    return places


def open_unit(current: ContextVar[Place[S_co]]) -> UnitOfWork[S_co] | None:
    """Return the current open unit, if any."""
    found = current.get()
    return None if found.closed else found._here()


def leave(current: ContextVar[Place[S_co]], ended: Place[S_co], outer: Place[S_co]) -> None:
    """Make the outer place current again, if a block, or anything that has ended inside it, is current.

    A generator may be closed in another context than it was entered in, for example after a loop left it
    early. Its unit stays current in the first context, but must not be current in the second.
    """
    for place in around(current.get()):
        if place is ended:
            current.set(outer)
        if not place.closed or isinstance(place, NoUnit) or place is ended:
            return


def current_variable(database: Database[S_co]) -> ContextVar[Place[S_co]]:
    """Create the variable of one database."""
    remedy = (
        "open `async with db():` around the work, or call from within a request of an application that has "
        "this pair's middleware and not another pair's; another middleware that uses it must be inside the "
        "pair's middleware: add it before that one; a route takes the session by `Depends(db.dependency)`"
    )
    outside: Place[S_co] = NoUnit(None, database=database, where="here", remedy=remedy)
    return ContextVar("fastapi_async_sqlalchemy.unit", default=outside)
