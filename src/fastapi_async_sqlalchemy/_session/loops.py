"""One event loop and one process at a time: a pair's engines serve the loop that uses them now."""

from __future__ import annotations

import asyncio
import os
import time
from functools import partial
from typing import TYPE_CHECKING, Final
from weakref import WeakSet, ref

from attrs import Factory, define

from .._dialects.liveness import replace_dead
from .._dialects.loops import forget_connections, has_queue, leave_to_parent, renew_queue, serve_any_loop
from ..exceptions import ConcurrentUseError

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.pool import Pool

_IMPORTED_BY: Final = os.getpid()
"""The process that has imported this module; its children have another number."""
_REFUSED: Final = "another running event loop uses the engine"
_OWN_LOOP: Final = (
    "make a `def` route an `async def`, let it call coroutine functions by `anyio.from_thread.run(...)`, or "
    "give the other loop a separate engine"
)


@define(eq=False)
class Loops:
    """The event loop that uses a pair's engines; another one takes over after it has ended."""

    current: asyncio.AbstractEventLoop | None = None
    engines: WeakSet[Engine] = Factory(WeakSet["Engine"])
    _since: float = Factory(time.time)
    """When this process was forked, or else this object created, by the clock of SQLAlchemy's pools."""
    _inherited: list[Pool | DBAPIConnection] = Factory(list["Pool | DBAPIConnection"])
    """A parent process's, kept because some drivers close connections when collected."""

    def __attrs_post_init__(self) -> None:
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=partial(_forget_in_child, ref(self)))

    def follow(self, engine: Engine) -> None:
        """Watch an engine for a change of event loop, a fork of its process, and connections that died."""
        if os.getpid() != _IMPORTED_BY:  # the parent may have used it before anybody watched it
            self._inherited += leave_to_parent(engine, self._since)
        self.engines.add(engine)
        serve_any_loop(engine)
        replace_dead(engine)

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let the loop in which an engine is bound use it."""
        if self.current is not loop:
            for engine in {engine.pool: engine for engine in self.engines}.values():  # derived ones share it
                renew_queue(engine, loop)
        self.current = loop

    def take_over(self, loop: asyncio.AbstractEventLoop, database: str, attempt: str) -> None:
        """Switch the engines to a loop; refuse while another loop runs that their connections belong to."""
        if self.current is None or not self.current.is_running():
            self.bind(loop)
        elif any(has_queue(engine) for engine in self.engines):
            raise ConcurrentUseError(database, attempt, _REFUSED, _OWN_LOOP)

    def forget_in_child(self) -> None:
        """Leave the connections to the parent process."""
        self.current, self._since = None, time.time()
        self._inherited += [forget_connections(engine) for engine in self.engines]


def _forget_in_child(loops: ref[Loops]) -> None:
    found = loops()
    if found is not None:
        found.forget_in_child()


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the running event loop, if there is one."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
