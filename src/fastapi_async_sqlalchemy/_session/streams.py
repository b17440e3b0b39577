"""Streams: results of ``stream()`` whose rows are still on the server until they have been read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import ref

from attrs import frozen
from sqlalchemy.engine import CursorResult, Result

from .._dialects.statements import UNBUFFERED

if TYPE_CHECKING:
    from sqlalchemy.engine import ExecutionContext

    from .state import StatefulSession


@frozen(eq=False, repr=False)
class Stream:
    """One such result, referenced weakly: a result that nobody holds will not be read."""

    _held: ref[Any]
    """The result. For a ``CursorResult``, which takes no weak reference, its context, which lives as long."""
    _cursor: dict[str, Any]
    """The attributes of the ``CursorResult``, which do not refer back to it."""
    unbuffered: bool

    @property
    def unread(self) -> bool:
        """Whether the result is still referenced and not read to its end."""
        held = self._held()
        if not isinstance(held, Result):
            return held is not None and not self._exhausted
        # Result.closed covers only an explicit close(); no public name says that all rows were read
        return not held._soft_closed

    @property
    def between_rows(self) -> bool:
        """Whether the result is still referenced and the server has more rows."""
        return self._held() is not None and not self._exhausted

    @property
    def _exhausted(self) -> bool:
        return bool(self._cursor.get("_soft_closed"))

    def close(self) -> None:
        """Discard the remaining rows: some drivers will not commit over them."""
        held = self._held()
        if held is not None and self.unread:
            (held if isinstance(held, Result) else held.cursor).close()


@frozen(eq=False, repr=False)
class ConnectionStream:
    """A result that user code has opened on the session's connection itself."""

    _held: ref[Any]
    """The context of its statement, which lives as long as the result."""
    unbuffered: bool = True

    @property
    def unread(self) -> bool:
        """Whether the result is still referenced and not read to its end."""
        cursor = getattr(self._held(), "cursor", None)
        if not getattr(cursor, "server_side", False):
            return False
        # SQLAlchemy closes the cursor after the last row; its adapters show that by no public name
        return getattr(cursor, "_cursor", None) is not None

    between_rows = unread

    def close(self) -> None:
        """Discard the remaining rows."""
        held = self._held()
        if held is not None and self.unread:
            held.cursor.close()


def watch_connection_stream(session: StatefulSession, context: ExecutionContext) -> None:
    """Register a result that is about to be opened on the session's connection itself."""
    if context.dialect.name in UNBUFFERED:
        state = session._fastapi_async_sqlalchemy
        streams = [one for one in state.streams if one.unread]
        state.streams = (*streams, ConnectionStream(ref(context)))
        state.shared.unbuffered = True


def watch_stream(session: StatefulSession, result: object) -> None:
    """Register a result that is still to be read, and its session for errors while reading."""
    state = session._fastapi_async_sqlalchemy
    state.streamed = False
    found: Any = result
    if not _is(Result, found):
        found = getattr(found, "_real_result", None)  # of a ScalarResult, which has no public name for it
    raw: Any = getattr(found, "raw", found)
    if not _is(CursorResult, raw):
        return  # it came from memory
    cursor: CursorResult[Any] = raw
    held: Any = cursor.context if cursor is found else found
    stream = Stream(ref(held), vars(cursor), cursor.dialect.name in UNBUFFERED)
    state.streams = (*(one for one in state.streams if one.unread), stream)
    state.shared.connections[cursor.connection] = ref(session)
    state.shared.unbuffered = state.shared.unbuffered or stream.unbuffered


def _is(kind: type[object], value: object) -> bool:
    """Whether a value is of a kind; hides the kind's type parameters from type checkers."""
    return isinstance(value, kind)
