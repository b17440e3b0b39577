"""The uses of a database: who has its engine in use, and what each of them asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from attrs import evolve, frozen

from .._arguments.engines import line_in_debug_mode
from ..exceptions import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.engine import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine


class PoolWatcher(Protocol):
    """A watcher of the pool of the engine in use."""

    def check(self, engine: Engine) -> None:
        """Raise ``ConfigurationError`` for an engine that cannot be watched."""

    def begin(self, database: str, engine: Engine) -> None:
        """Watch an engine in place of any earlier one."""

    def end(self) -> None:
        """Stop watching."""


@frozen(eq=False, kw_only=True)
class Use:
    """One use of a database; a setting that is None was not asked for."""

    name: str
    """The code that uses it."""
    remedy: str
    """How to end the use."""
    engine: AsyncEngine | None = None
    """None for an application whose engine is bound elsewhere."""
    waits: bool | None = None
    """Whether a task waits for its turn of a session by default."""
    commit_on_exit: bool | None = None
    """Whether the end of a block commits by default."""
    watcher: PoolWatcher | None = None
    application: object = None
    """The application that uses it; with a rebuilt middleware stack it is the same use."""
    source: object = None
    """The source that the engine was created from."""
    started: bool = True
    """Whether it will end by itself; an application's lifespan may never run."""
    where: str | None = None
    """The user's line that began the use, in debug mode."""

    @property
    def is_call(self) -> bool:
        """Whether its name is code that may be left out, and no middleware."""
        return self.name.startswith("`")

    def __str__(self) -> str:
        return f"{self.name} at {self.where}" if self.where else self.name

    def is_same(self, other: Use) -> bool:
        """Whether it is another one, or that of the same application."""
        if self.application is None:
            return self is other
        return self.application is other.application and self.engine is other.engine

    def require(self, setting: str, asked: object, in_force: object) -> None:
        """Raise ``ConfigurationError`` if another use asks for what contradicts this one."""
        if asked != in_force:
            message = (
                f"{setting} must be what {self} has for the same engine: give the same, or leave it out."
            )
            raise ConfigurationError(message)

    def require_agreement(self, others: Sequence[Use]) -> None:
        """Raise ``ConfigurationError`` if tasks should take turns, and should not for another use."""
        for one in others:
            if one.started and None not in {self.waits, one.waits}:
                one.require("concurrent_use", self.waits, one.waits)

    def added_to(self, uses: Sequence[Use]) -> list[Use]:
        """Return uses with this one as the newest, in place of the same one.

        An application that has not started also takes the place of an earlier such one, whose end nobody
        would notice. That one's settings remain, because both may be mounted in a third application.
        """
        new, others = self, list[Use]()
        for one in uses:
            if one.is_same(self):
                new = evolve(new, started=new.started or one.started)
            elif not (one.started or self.started) and one.engine is self.engine:
                waits = one.waits if new.waits is None else new.waits
                new = evolve(new, waits=waits, watcher=new.watcher or one.watcher)
            else:
                others.append(one)
        return [*others, new]

    def removed_from(self, uses: Sequence[Use]) -> list[Use]:
        """Return uses without this one.

        An application takes the later ones along that have not started: mounted ones have no lifespan.
        """
        at = next((at for at, one in enumerate(uses) if one.is_same(self)), len(uses))
        return [*uses[:at], *(one for one in uses[at + 1 :] if one.started or self.application is None)]


def use_of(name: str, remedy: str, **asked: Any) -> Use:
    """Return a use that begins now."""
    return Use(name=name, remedy=remedy, where=line_in_debug_mode(), **asked)


def newest(uses: Sequence[Use], setting: str) -> Any:
    """Return a setting as the newest use has asked for it, or None."""
    return next((asked for one in reversed(uses) if (asked := getattr(one, setting)) is not None), None)
