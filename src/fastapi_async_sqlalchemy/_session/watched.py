"""The subclass of the user's session class: overrides, and nothing else."""

from __future__ import annotations

import inspect
import logging
import warnings
from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final, cast
from weakref import ref

from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session, SessionTransaction

from ..exceptions import _counted
from . import turns
from .outcome import decide_rollback, end_interrupted, follow, refuse_half, require_commit
from .plain import (
    get_nested_transaction,
    get_transaction,
    in_nested_transaction,
    in_transaction,
    is_active,
)
from .state import LateState, StatefulSession, has_written, pending
from .turns import exclusive

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Engine

    from .models import Models
    from .state import SessionState, Shared

logger = logging.getLogger("fastapi_async_sqlalchemy")

_CLOSED: Final = (
    "close() on %s rolls back %s and %s, because nothing committed them: call "
    "`await db.session.commit()` before, or leave the session for its unit to close."
)
_GUARDS: Final[tuple[tuple[Callable[[Callable[..., Any]], Callable[..., Any]], tuple[str, ...]], ...]] = (
    (turns.executing, ("execute",)),
    (turns.returning, ("exec", "scalar", "scalars")),
    (
        turns.exclusive,
        (
            *("get", "get_one", "refresh", "merge", "merge_all", "delete"),
            *("delete_all", "commit", "prepare", "connection", "begin", "begin_nested"),
            *("bulk_save_objects", "bulk_insert_mappings", "bulk_update_mappings"),
        ),
    ),
    (turns.cleaning, ("rollback", "close", "reset", "invalidate")),
    (turns.flushing, ("flush",)),
    (turns.in_memory, ("add", "add_all")),
)


class WatchedSession(StatefulSession):
    """A session that serves one task at a time, and none after its unit's end."""

    def commit(self) -> None:
        """Commit; if that is refused, open savepoints stay open."""
        if in_nested_transaction(self) and is_active(self):
            require_commit(self)
        try:
            super().commit()
        except BaseException as error:
            refuse_half(self, error)
            end_interrupted(self)
            raise

    def rollback(self) -> None:
        """Roll back; lift every mark that forbids COMMIT."""
        decide_rollback(self, lifts_marks=True)
        try:
            super().rollback()
        except BaseException:
            end_interrupted(self)
            raise

    def close(self) -> None:
        """Close for good once the unit has ended; before that, follow ``close_resets_only``."""
        state = self._fastapi_async_sqlalchemy
        if state.closed or not state.resets_on_close:
            super().close()
        else:
            reset(self)

    def get_bind(self, *args: Any, **kwargs: Any) -> Engine | Connection:
        """Return the engine that the session's own class chooses, or one derived from it."""
        bind = super().get_bind(*args, **kwargs)
        state = self._fastapi_async_sqlalchemy
        if bind is state.shared.engine and state.route is None:
            return bind
        return _reached(state, bind)

    def connection(self, *args: Any, **kwargs: Any) -> Any:
        """Return the connection, and record that it may be used without calling this session."""
        args = (*(_reached_by(self, one) for one in args[:1]), *args[1:])
        if "bind_arguments" in kwargs:
            kwargs["bind_arguments"] = _reached_by(self, kwargs["bind_arguments"])
        return _exposed(self, super().connection(*args, **kwargs))

    def begin(self, *args: Any, **kwargs: Any) -> Any:
        """Begin a transaction that the caller ends; SQLAlchemy ends it without calling this session."""
        transaction: Any = super().begin(*args, **kwargs)
        if isinstance(transaction, SessionTransaction):  # a user's method may mean something else
            transaction.__class__ = OwnedTransaction
            if not transaction.nested:  # a transaction begun around a savepoint has no explicit owner
                self._fastapi_async_sqlalchemy.writing().begun = True
        return transaction


@partial(exclusive, name="connection")
def connection_of(session: StatefulSession) -> Connection:
    """Return a session's connection for the package's own use; called inside SQLAlchemy's greenlet."""
    connection: Connection = _exposed(session, Session.connection(session))
    return connection


def invalidate(session: StatefulSession) -> None:
    """Discard the connections, and reset the session unless the unit has ended."""
    if session._fastapi_async_sqlalchemy.closed:
        Session.invalidate(session)
        return
    decide_rollback(session)
    transaction = get_nested_transaction(session) or get_transaction(session)
    while transaction is not None:
        ended, transaction = transaction, transaction.parent
        ended.close(invalidate=True)
    Session.reset(session)


def reset(session: StatefulSession) -> None:
    """Reset a session, with a WARNING about discarded writes: callers often do not expect that."""
    state = session._fastapi_async_sqlalchemy
    if has_written(session):
        written = state.ledger.written
        extra = state.shared.fields(session.hash_key, "rolled back", written)
        objects = _counted(pending(session), "unflushed object")
        logger.warning(_CLOSED, state.shared.name, _counted(written, "statement"), objects, extra=extra)
    decide_rollback(session)
    try:
        Session.reset(session)
    except BaseException:
        end_interrupted(session)
        raise


def _reached(state: SessionState, bind: Engine | Connection) -> Engine | Connection:
    """Watch the engine that a session is about to use, and return one that applies settings and limits."""
    if bind is not state.shared.engine:
        state.shared.listen(bind.engine)
    return bind if state.route is None else state.route(bind)


def _reached_by(session: StatefulSession, bind_arguments: Any) -> Any:
    """Replace the engine in an argument of ``connection()``, for which SQLAlchemy calls no ``get_bind()``."""
    match bind_arguments:
        case {"bind": bind} if bind is not None:
            return {"bind": _reached(session._fastapi_async_sqlalchemy, bind)}
        case _:
            return bind_arguments


def _exposed(session: StatefulSession, connection: Any) -> Any:
    """Record that a connection may be used without calling its session."""
    if isinstance(connection, Connection):  # a user's method may mean something else
        state = session._fastapi_async_sqlalchemy
        state.shared.connections[connection] = ref(session)
        state.expose(connection)
    return connection


class OwnedTransaction(SessionTransaction):
    """A transaction or savepoint that user code ends itself, which takes a turn of its session."""

    def commit(self, *args: Any, **kwargs: Any) -> None:
        """Commit, or release the savepoint."""
        end, session = partial(super().commit, *args, **kwargs), self._owner()
        if session is None:
            end()
        else:
            _commit_owned(session, self, end)

    def rollback(self, *args: Any, **kwargs: Any) -> None:
        """Roll back, to the savepoint if it is one."""
        end, session = partial(super().rollback, *args, **kwargs), self._owner()
        if session is None:
            end()
        else:
            _roll_back_owned(session, end)

    def _owner(self) -> StatefulSession | None:
        return cast("StatefulSession | None", self.session)  # SQLAlchemy drops it at the end


@partial(exclusive, name="commit")
def _commit_owned(session: StatefulSession, transaction: SessionTransaction, end: Callable[[], None]) -> None:
    if transaction.parent is None and in_nested_transaction(session):
        require_commit(session)  # otherwise savepoints would end before COMMIT is refused
        while (savepoint := get_nested_transaction(session)) is not None:
            savepoint.commit()
    try:
        end()
    except BaseException as error:
        refuse_half(session, error)
        end_interrupted(session)
        raise


@partial(exclusive, name="rollback")
def _roll_back_owned(session: StatefulSession, end: Callable[[], None]) -> None:
    try:
        end()
    except BaseException:
        end_interrupted(session)
        raise


def watched_class(base: type[Session], shared: Shared, models: Models | None = None) -> type[WatchedSession]:
    """Create the subclass of a session class for the sessions of one database."""
    members: dict[str, object] = {
        "_fastapi_async_sqlalchemy": LateState(shared),
        "__del__": _finalizer(getattr(base, "__del__", None)),
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        # a class written for an early SQLAlchemy may have such a method, for something else
        "reset": reset if base.reset is Session.reset else base.reset,
        "invalidate": invalidate if base.invalidate is Session.invalidate else base.invalidate,
    }
    if models is not None:
        members["get_bind"] = _get_bind_of(models)
    watched: Any = type(f"Watched{base.__name__}", (WatchedSession, base), members)
    for guard, names in _GUARDS:
        for name in names:
            if isinstance(method := inspect.getattr_static(watched, name, None), FunctionType):
                setattr(watched, name, guard(method))
    follow(watched)
    if models is not None:
        models.follow(watched)
    return cast("type[WatchedSession]", watched)


def _get_bind_of(models: Models) -> Callable[..., Engine | Connection]:
    """Return a ``get_bind`` that chooses an engine for the models of its own database alone."""
    known = models.known

    def get_bind(session: WatchedSession, *args: Any, **kwargs: Any) -> Engine | Connection:
        mapper = args[0] if args else kwargs.get("mapper")
        if mapper is not None and mapper not in known:
            models.require(mapper, session)
        chosen = super(WatchedSession, session).get_bind(*args, **kwargs)
        return _reached(session._fastapi_async_sqlalchemy, chosen)

    return get_bind


def _finalizer(inherited: Callable[[Session], None] | None) -> Callable[[WatchedSession], None]:
    """Return a ``__del__`` that warns of a session dropped with its transaction open."""

    def finalize(session: WatchedSession) -> None:
        if inherited is not None:
            inherited(session)
        state = session._fastapi_async_sqlalchemy
        if not state.closed and hasattr(session, "hash_key") and in_transaction(session):
            warnings.warn(
                f"A session of {state.shared.name} was garbage-collected with its transaction open: "
                "leave the unit of work, `async with db():`, before dropping it.",
                ResourceWarning,
                stacklevel=2,
                source=session,
            )

    return finalize
