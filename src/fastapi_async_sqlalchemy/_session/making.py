"""Sessions of a class with an ``__init__`` of the user's, which may choose the synchronous class itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from sqlalchemy.ext.asyncio import AsyncSession

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.orm import Session

S = TypeVar("S", bound=AsyncSession)

_CHOICE: Final = "sync_session_class"


def maker_of(class_: type[S], watched: Callable[[type[Session]], type[Session]]) -> Callable[..., S]:
    """Return a factory of sessions whose synchronous side is watched, whichever class ``__init__`` chooses.

    While ``__init__`` runs, a session belongs to a subclass that answers with the watched class.
    """

    def choice(session: S) -> type[Session]:
        return watched(vars(session).get(_CHOICE, class_.sync_session_class))

    def choose(session: S, chosen: type[Session]) -> None:
        vars(session)[_CHOICE] = chosen

    members = {_CHOICE: property(choice, choose), "__module__": class_.__module__}
    metaclass = cast("Any", type(class_))
    unfinished: Any = metaclass(class_.__name__, (AsyncSession,), members)
    unfinished.__bases__ = (class_,)  # only now: its `__init_subclass__` is the application's own

    def make(**keywords: Any) -> S:
        session: Any = unfinished(**keywords)
        session.__class__ = class_
        return cast("S", session)

    return make
