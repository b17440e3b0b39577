"""Listeners to the engines' events, which report statements and errors to the session at work.

Events of the dialect are used where they do: a listener of any other kind switches the whole engine to a
slower path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from weakref import WeakSet

from attrs import Factory, define
from sqlalchemy import event

from .._dialects.errors import begin_in_time, discard_refused, is_transaction_lost
from .._dialects.reads import is_alone, is_plain, note_settings, send_alone
from ..exceptions import WrongDatabaseError
from .outcome import check_again, note_committed
from .plain import get_transaction
from .replaced import has_others, replaced
from .state import Shared, note_begun, note_statement, task_at_work
from .streams import watch_connection_stream
from .turns import refuse_to_lose_rows
from .watched import watched_class

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Connection, Dialect, Engine, ExceptionContext, ExecutionContext
    from sqlalchemy.engine.interfaces import DBAPICursor
    from sqlalchemy.orm import Session

    from .models import Models
    from .state import StatefulSession
    from .watched import WatchedSession

_EXECUTIONS: Final = ("do_execute", "do_executemany", "do_execute_no_params")
"""The events of a dialect that may execute a statement."""


@define(eq=False, repr=False)
class Watch(Shared):
    """A reporter of the statements and errors on one database's connections to their sessions."""

    classes: dict[tuple[type[Session], Models | None], type[WatchedSession]] = Factory(
        dict["tuple[type[Session], Models | None]", "type[WatchedSession]"]
    )
    crowded: WeakSet[Engine] = Factory(WeakSet["Engine"])
    """The engines whose statements a user's listener may execute itself, so that no further one is called."""
    readers: WeakSet[Engine] = Factory(WeakSet["Engine"])
    """The engines whose plain reads may be sent without a transaction."""
    guarded: dict[type[Session], Models] = Factory(dict["type[Session]", "Models"])
    """The watched classes that take certain models alone."""
    models: Models | None = None
    """The models of all those classes, unless they differ: then each statement's session is looked up."""
    taken_in: Callable[[Engine], None] | None = None
    """The function by which an open test sandbox takes in each further engine."""

    def session_class(self, base: type[Session], models: Models | None) -> type[WatchedSession]:
        """Return the watched subclass of a ``sync_session_class``, for sessions that take certain models."""
        key = (base, models)
        if key not in self.classes:
            self.classes[key] = watched = watched_class(base, self, models)
            if models is not None:
                models.pairs.add(self)
                self.models = models if not self.guarded or self.models is models else None
                self.guarded[watched] = models
        return self.classes[key]

    def listen(self, engine: Engine) -> None:
        """Listen to an engine; a second call has no effect."""
        if engine in self.loops.engines:
            return
        self.loops.follow(engine)
        if self.taken_in is not None:
            self.taken_in(engine)
        dispatch = engine.dialect.dispatch
        if any(has_others(getattr(dispatch, name), Shared) for name in _EXECUTIONS):
            self.crowded.add(engine)
        for target, name, listener in self._listeners(engine):
            event.listen(target, name, listener)

    def leave(self) -> None:
        """Stop listening, until a session comes to an engine again."""
        for engine in list(self.loops.engines):
            for target, name, listener in self._listeners(engine):
                if event.contains(target, name, listener):
                    event.remove(target, name, listener)
        self.loops.engines.clear()
        self.engine = None

    def _listeners(self, engine: Engine) -> list[tuple[Engine | Dialect, str, Callable[..., bool | None]]]:
        dialect = engine.dialect  # engines derived from one another share it
        listeners: list[tuple[Engine | Dialect, str, Callable[..., bool | None]]]
        listeners = [(dialect, "handle_error", self._handle_error)]
        if engine in self.crowded:
            listeners.append((engine, "before_cursor_execute", self._before_cursor_execute))
        else:
            listeners += [
                (dialect, "do_execute", self._do_execute),
                (dialect, "do_executemany", self._do_execute),
                (dialect, "do_execute_no_params", self._do_execute_no_params),
            ]
        if engine in self.readers:
            listeners.append((dialect, "do_execute", self._send_alone))
        return listeners

    def read_alone(self, engine: Engine) -> None:
        """Send plain reads of sessions that allow it without a transaction; a second call has no effect."""
        self.readers.add(engine)
        event.listen(engine.dialect, "do_execute", self._send_alone)

    def _send_alone(
        self, cursor: DBAPICursor, statement: str, values: object, context: ExecutionContext
    ) -> bool | None:
        if not is_plain(statement):
            note_settings(statement, context.root_connection)
            return None
        session = self.operating.get(task_at_work())
        if session is None or not session._fastapi_async_sqlalchemy.may_read_alone() or session.twophase:
            return None
        transaction = get_transaction(session)
        if transaction is None or context.root_connection not in transaction._connections:
            return None
        return is_alone(context.dialect, Shared) and send_alone(cursor, statement, values, context)

    def xid(self) -> str:
        """Return the name of the two-phase transaction that the session at work is beginning."""
        session = self.operating.get(task_at_work())
        return "" if session is None else session._fastapi_async_sqlalchemy.xid

    def _do_execute(
        self, cursor: DBAPICursor, statement: str, _values: object, context: ExecutionContext
    ) -> None:
        if self.guarded and (self.models is None or not self.models.decided(context.compiled)):
            self._require_own(context)
        options = context.execution_options
        if self.unbuffered:
            refuse_to_lose_rows(self.session_of(context.root_connection))
        if "stream_results" in options or "yield_per" in options:
            session = self.session_of(context.root_connection)
            if session is None:
                pass
            elif session._fastapi_async_sqlalchemy.holder is None:  # the connection's own method
                watch_connection_stream(session, context)
            else:
                session._fastapi_async_sqlalchemy.streamed = True
        if not statement.startswith("SELECT"):
            session = self.session_of(context.root_connection)
            if session is not None:
                begun = begin_in_time(cursor, statement, context.root_connection)
                note_statement(session, statement, context.root_connection)
                note_begun(session, context.root_connection if begun else None)

    def _require_own(self, context: ExecutionContext) -> None:
        """Refuse a session's statement with a table that belongs to another database."""
        session = self.session_of(context.root_connection)
        if session is None or context.compiled is None:
            return
        models = self.guarded.get(type(session))
        if models is not None:
            models.require_statement(context.compiled, session)

    def _do_execute_no_params(self, cursor: DBAPICursor, statement: str, context: ExecutionContext) -> None:
        self._do_execute(cursor, statement, None, context)

    def _before_cursor_execute(
        self,
        _connection: Connection,
        cursor: DBAPICursor,
        statement: str,
        values: object,
        context: ExecutionContext,
        _many: bool,  # noqa: FBT001  # SQLAlchemy's
    ) -> None:
        self._do_execute(cursor, statement, values, context)

    def note_replaced(self, session: StatefulSession, error: BaseException, *, committing: bool) -> None:
        """Note an error of the driver's that a user's listener has replaced."""
        for context in replaced(session, error, committing=committing):
            self._handle_error(context)

    def _handle_error(self, context: ExceptionContext) -> None:
        session = None if context.connection is None else self.session_of(context.connection)
        unsent = isinstance(context.original_exception, WrongDatabaseError)
        if session is not None and not unsent:
            state = session._fastapi_async_sqlalchemy
            after_the_check = state.committing and context.statement is not None
            if state.committing and not after_the_check:
                note_committed(session)
            state.note_error(context, session.hash_key)
            discard_refused(context)
            if after_the_check:
                check_again(session)
            if is_transaction_lost(context, state.ledger.begun_on):
                state.writing().lost = True
