"""A package that is broken on purpose, in one promise at a time: the routes that rest on it must find out.

What is replaced here is private to the package; if it is not there any more, the application does not start.
"""

from collections.abc import Callable
from typing import Final

from sqlalchemy import Engine, event

from fastapi_async_sqlalchemy._session import ending, loops, outcome, state, watched
from fastapi_async_sqlalchemy._session.loops import Loops
from fastapi_async_sqlalchemy._session.state import JoinedBlock, StatefulSession
from fastapi_async_sqlalchemy._session.watch import Watch


def _nothing(*_: object) -> None:
    """Do nothing."""


def _replace(owner: object, name: str, value: object) -> None:
    """Replace what is there."""
    if not hasattr(owner, name):
        raise AttributeError(name)
    setattr(owner, name, value)


def watch_one_engine() -> None:
    """Watch the engine that is bound, and no other that a session comes to."""
    listen = Watch.listen

    def listen_to_own(watch: Watch, engine: Engine) -> None:
        if watch.engine is None or engine.pool is watch.engine.pool:
            listen(watch, engine)

    _replace(Watch, "listen", listen_to_own)


def believe_listeners() -> None:
    """Take a COMMIT for failed when a listener of the user's has failed after it."""
    own: Callable[[StatefulSession], None] = vars(outcome)["_after_commit"]

    def follow(session_class: type[StatefulSession]) -> None:
        outcome.follow(session_class)
        event.remove(session_class, "after_commit", own)
        event.listen(session_class, "after_commit", own)  # after all that are there

    _replace(watched, "follow", follow)
    _replace(watched, "end_interrupted", _nothing)


def cut_blocks() -> None:
    """Commit in the middle of a block that another task has joined."""

    def never(_: JoinedBlock) -> bool:
        return False

    _replace(JoinedBlock, "elsewhere", never)


def mix_loops() -> None:
    """Serve any event loop by the connections of any other."""
    _replace(Loops, "take_over", _nothing)
    _replace(loops, "serve_any_loop", _nothing)


def share_with_children() -> None:
    """Let a child process use its parent's connections."""

    def forget_loop(own: Loops) -> None:
        own.current = None

    _replace(Loops, "forget_in_child", forget_loop)


def close_in_use() -> None:
    """Close a connection on which a statement is under way, whatever the driver makes of that."""

    async def no(_: object) -> bool:  # what is awaited
        return False

    for module in (state, ending):
        _replace(module, "end_statement", no)


SABOTAGE: Final[dict[str, Callable[[], None]]] = {
    "one engine": watch_one_engine,
    "listeners": believe_listeners,
    "blocks": cut_blocks,
    "loops": mix_loops,
    "children": share_with_children,
    "statements": close_in_use,
}
"""By name."""
