"""Routes whose session has a listener of the user's that fails: the outcome is what the database did."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from fastapi import HTTPException
from sqlalchemy import event
from sqlalchemy.orm import Session

from campaign.case import ListenerError, current
from campaign.pairs import main
from campaign.routes import add, hook, write

EVENTS: Final = (
    "after_commit",
    "after_begin",
    "after_transaction_end",
    "before_commit",
    "before_flush",
    "after_flush",
    "after_flush_postexec",
)
"""What happens on the way to a COMMIT."""
OF_ROLLBACK: Final = ("after_rollback", "after_soft_rollback", "after_transaction_end")
"""What happens on the way to a ROLLBACK."""
_FAILING: Final = "failing"


def listen() -> None:
    """Listen to all sessions, before any pair has made its own class: one listener of each event fails."""
    event.listen(Session, "after_commit", _note)
    for name in {*EVENTS, *OF_ROLLBACK}:
        event.listen(Session, name, partial(_fail, name))


def _note(session: Session, *_: object) -> None:
    """Note what is committed, in a route that may be told of an error."""
    case = current.get(None)
    if case is not None and session.info.get("noted") and not session.in_nested_transaction():
        del session.info["noted"]
        case.committed("hand")


def _fail(name: str, session: Session, *_: object) -> None:
    """Fail once, at the end of the whole transaction where it is about ends."""
    if session.info.get(_FAILING) != name or session.in_nested_transaction():
        return
    if name == "after_transaction_end" and session.in_transaction():
        return  # a flush has ended
    if name == "after_commit":
        _note(session)
    del session.info[_FAILING]
    raise ListenerError(name)


def _arrange(events: tuple[str, ...]) -> None:
    """Have one of the listeners fail, in every second request one that is before all others."""
    place, at = divmod(current.get().number, len(events))
    session = main.session.sync_session
    session.info[_FAILING] = name = events[at]
    if place % 2:
        event.listen(session, name, partial(_fail, name), insert=True)


async def listener() -> None:
    """Write, with hooks, under a listener that fails."""
    hook()
    main.session.info["noted"] = True
    _arrange(EVENTS)
    await write("a")
    add("b")


async def listener_refuses() -> None:
    """Refuse, with hooks, under a listener that fails."""
    await write("a")
    hook()
    _arrange(OF_ROLLBACK)
    raise HTTPException(409)


ENDPOINTS: Final[tuple[Callable[..., Awaitable[object]], ...]] = (listener, listener_refuses)
