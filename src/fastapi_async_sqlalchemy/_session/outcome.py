"""The end of each transaction, as reported by SQLAlchemy's own events, and the check before a COMMIT."""

from __future__ import annotations

import logging
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final
from weakref import ref

from sqlalchemy import event
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Session
from sqlalchemy.sql import text
from sqlalchemy.util import await_only

from .._arguments.engines import place_of
from ..exceptions import PartialCommitError, UnexpectedRollbackError
from .ledger import BLANK
from .plain import (
    deleted_of,
    dirty_of,
    expire,
    expunge,
    get_transaction,
    in_nested_transaction,
    in_transaction,
    new_of,
)
from .replaced import has_others
from .restoring import note_flushed, note_unflushed
from .state import Shared, task_name

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy.engine import Connection, Transaction
    from sqlalchemy.orm import SessionTransaction

    from .ledger import Ledger
    from .state import SessionState, StatefulSession


logger = logging.getLogger("fastapi_async_sqlalchemy")

BROKEN: Final = "it was rolled back in the middle of a block that had joined it"
_ABORTED: Final = "a statement in it failed and the database has aborted the transaction"
OWN_UNIT: Final = (
    "await the block's task before the unit commits, rolls back or ends, or give the block a separate unit "
    "by propagation='requires_new'"
)


def follow(session_class: type[StatefulSession]) -> None:
    """Follow the transactions of a class of sessions, however they end."""
    event.listen(session_class, "after_begin", _after_begin)
    event.listen(session_class, "before_commit", _before_commit)
    event.listen(session_class, "after_commit", _after_commit, insert=True)  # before a listener that may fail
    event.listen(session_class, "before_flush", note_unflushed)
    event.listen(session_class, "after_flush", note_flushed)
    event.listen(session_class, "after_transaction_end", _after_transaction_end)


def decide_rollback(session: StatefulSession, *, lifts_marks: bool = False) -> None:
    """Decide the hooks for a rollback: even if the end is cut short, the transaction is not committed."""
    state = session._fastapi_async_sqlalchemy
    state.committing = False
    state.end_exposed()
    if state.hooks is not None:
        if lifts_marks:
            state.hooks.marks.clear()
        if in_transaction(session) and not (state.ledger.unknown or state.ledger.committed_on):
            state.hooks.decide(committed=False)


def _after_begin(session: StatefulSession, transaction: SessionTransaction, connection: Connection) -> None:
    state = session._fastapi_async_sqlalchemy
    shared = state.shared
    state.beginner = state.holder
    if connection.engine is not shared.engine:
        shared.listen(connection.engine)
    if transaction.nested:
        state.ledger.name_owner(transaction)
    elif state.hooks is not None and state.hooks.begin:
        shared.connections[connection] = ref(session)  # a hook may pass it on
        state.hooks.begun(connection)


def _before_commit(session: StatefulSession) -> None:
    if in_nested_transaction(session):
        return  # a savepoint is about to be released
    state = session._fastapi_async_sqlalchemy
    if state.ledger.failure is not None or state.joined or state.hooks is not None:
        require_commit(session)  # before the hooks: they would run in a transaction that is lost
    if state.hooks is not None and state.hooks.before:
        await_only(state.hooks.before_commit())
        require_commit(session)
    if state.exposed:
        state.wait_for_exposed()
        _ask_exposed(state)
    state.committing = True


def require_commit(session: StatefulSession) -> None:
    """Raise ``UnexpectedRollbackError`` if the transaction can only be rolled back."""
    state = session._fastapi_async_sqlalchemy
    if state.hooks is not None:
        state.hooks.refuse_commit()
    for block in state.joined:
        if block.elsewhere():
            reason = f"{task_name(block.task)} is in the middle of a block that has joined it"
            raise UnexpectedRollbackError(state.shared.name, reason, OWN_UNIT)
        if block.broken:
            raise UnexpectedRollbackError(state.shared.name, BROKEN, OWN_UNIT)
    if state.ledger.failure is not None:
        _refuse_silent_rollback(state.ledger, state.shared.name)


def check_again(session: StatefulSession) -> None:
    """Check again before COMMIT is sent, in case a flush or listener after ``before_commit`` has failed."""
    transaction = get_transaction(session)
    if transaction is not None:
        for connection, *_ in set(transaction._connections.values()):
            check = partial(_check_again, ref(session), session._fastapi_async_sqlalchemy.ledger, connection)
            # an early SQLAlchemy 2.0 takes no listener on a connection of a derived engine
            with suppress(InvalidRequestError):
                for name in ("commit", "prepare_twophase"):  # this connection alone takes the slower path
                    event.listen(connection, name, check)


def _check_again(found: ref[StatefulSession], ledger: Ledger, connection: Connection, *_: object) -> None:
    session = found()
    if session is None or session._fastapi_async_sqlalchemy.ledger is not ledger:
        return  # a connection that a caller gave to the session outlives the transaction
    try:
        require_commit(session)
    except BaseException:
        connection.invalidate()  # SQLAlchemy sends no ROLLBACK after a COMMIT that has failed
        raise
    session._fastapi_async_sqlalchemy.committing = True


def _refuse_silent_rollback(ledger: Ledger, database: str) -> None:
    """Raise if the transaction is lost; some databases answer COMMIT with a rollback and no error."""
    failure, reason = ledger.failure, "the database has rolled it back after a conflict"
    if not ledger.lost:
        if _answer(ledger.failed_on):
            ledger.forgive()
            return
        reason = _ABORTED
        ledger.failure = failure  # not that of the query above
    raise UnexpectedRollbackError(database, reason) from failure


def _ask_exposed(state: SessionState) -> None:
    """Check the connections that user code has, if its listener may have replaced an error on one unseen."""
    asked = [
        one
        for one in state.exposed
        if not (one.closed or one.invalidated) and has_others(one.dialect.dispatch.handle_error, Shared)
    ]
    if state.ledger is not BLANK and not _answer(asked):
        raise UnexpectedRollbackError(state.shared.name, _ABORTED)


def _answer(connections: Iterable[Connection]) -> bool:
    """Whether the transaction goes on, on every connection on which a statement may have failed."""
    try:
        for connection in connections:
            connection.execute(text("SELECT 1"))
    except Exception:  # noqa: BLE001  # a user's listener may replace it by any
        return False
    return True


def _after_commit(session: StatefulSession) -> None:
    state = session._fastapi_async_sqlalchemy
    if in_nested_transaction(session):
        state.released = True
        return
    # SQLAlchemy may not reach the end of the transaction: the task may be cancelled at the pool's reset
    state.committed_writes = state.committed_writes or state.ledger.written > 0
    state.committing = False
    state.committed = True
    state.ledger = BLANK
    if state.hooks is not None:
        state.hooks.decide(committed=True)


def _is_committed(connection: Connection, end: Transaction) -> bool:
    """Whether a connection's COMMIT has succeeded.

    SQLAlchemy deactivates the transaction in any case, but the connection keeps it if COMMIT has failed,
    or if an engine's listener has failed before COMMIT was sent.
    """
    return not end.is_active and end not in {
        connection.get_transaction(),
        connection.get_nested_transaction(),
    }


def note_committed(session: StatefulSession) -> None:
    """Record what was committed before COMMIT failed on a later connection of the same session."""
    ledger, transaction = session._fastapi_async_sqlalchemy.ledger, get_transaction(session)
    if transaction is not None and len(ledger.written_on) > 1:
        ends = {connection: end for connection, end, *_ in transaction._connections.values()}
        ledger.committed_on = tuple(
            one for one in ledger.written_on if one in ends and _is_committed(one, ends[one])
        )


def refuse_half(session: StatefulSession, error: BaseException) -> None:
    """Raise ``PartialCommitError`` if only some of a session's connections were committed."""
    state = session._fastapi_async_sqlalchemy
    if state.committing:
        state.shared.note_replaced(session, error, committing=True)
    if state.committing:  # the database has not refused: a listener has failed
        note_committed(session)
        if len(state.ledger.committed_on) == len(state.ledger.written_on):
            state.ledger.committed_on = ()
    done = state.ledger.committed_on
    if done:
        state.committed_writes = True
        sides = (
            [str(place_of(one.engine.url)) for one in done],
            [str(place_of(one.engine.url)) for one in state.ledger.written_on if one not in done],
        )
        failure = PartialCommitError(sides[0], ", ".join(sides[1]))
        logger.error("%s", failure, extra=state.shared.fields(session.hash_key))
        if (transaction := get_transaction(session)) is not None:
            transaction.close()  # rolls the others back; SQLAlchemy's rollback() would warn of this one
        raise failure from error


def end_interrupted(session: StatefulSession) -> None:
    """End a transaction whose end a user's listener has cut short by an error."""
    state, transaction = session._fastapi_async_sqlalchemy, get_transaction(session)
    if transaction is None:
        if state.committed or state.ledger is not BLANK:  # ours was not reached
            _end_root(session, state)
        return
    if state.committing:  # our listener was not reached, and the database did not refuse
        ends = [_is_committed(connection, end) for connection, end, *_ in transaction._connections.values()]
        if ends and all(ends):
            _after_commit(session)
    if state.committed:
        transaction.close()


def _after_transaction_end(session: StatefulSession, transaction: SessionTransaction) -> None:
    state = session._fastapi_async_sqlalchemy
    if not in_transaction(session):
        _end_root(session, state)
    elif transaction.nested:
        released, state.released = state.released, False
        if state.ledger is not BLANK:
            state.ledger.end_block(transaction)
        if not released and not session._is_clean():
            _discard_changes(session)
        if state.hooks is not None:
            state.hooks.follow_savepoint(transaction, kept=released)


def _end_root(session: StatefulSession, state: SessionState) -> None:
    unknown, state.ledger = state.ledger.unknown or bool(state.ledger.committed_on), BLANK
    committed, state.committed, state.committing = state.committed, False, False
    state.beginner = None
    if not committed:
        for block in state.joined:
            block.broken = block.broken or block.elsewhere()
    if state.checkout is not None:
        state.checkout.after_transaction(session, committed=committed, unknown=unknown)
    if state.hooks is not None:
        if unknown:
            state.hooks.drop()
        else:
            await_only(state.hooks.settled(committed=False))  # a COMMIT has already decided its hooks


def _discard_changes(session: StatefulSession) -> None:
    """Drop the changes made in a savepoint after a failed flush, which SQLAlchemy keeps."""
    for one in new_of(session):
        expunge(session, one)
    for one in deleted_of(session):
        Session.add(session, one)
    for one in dirty_of(session):
        expire(session, one)
