"""The transaction settings of a unit: read-only, isolation level, deferrable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import event

from .._arguments.checks import ISOLATION_LEVELS, boolean
from .._dialects.begin import TransactionSettings
from ..exceptions import ConfigurationError, ReadOnlyError

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, UOWTransaction


def transaction_settings(
    read_only: object, isolation_level: object, deferrable: object, default: TransactionSettings
) -> TransactionSettings:
    """Return settings, checked; the pair's own where nothing is asked."""
    if read_only is None and isolation_level is None and deferrable is None:
        return default
    if default.read_only and read_only is None:
        read_only = True
    elif default.read_only and read_only is False:
        message = "read_only=False was asked of a read-only pair: open the unit by the primary's proxy."
        raise ConfigurationError(message)
    if isolation_level is not None and isolation_level not in ISOLATION_LEVELS:
        wanted = f"one of {', '.join(ISOLATION_LEVELS)}"
        msg = "isolation_level"
        raise ConfigurationError(msg, wanted, isolation_level)
    level: Any = isolation_level
    return TransactionSettings(
        read_only=None if read_only is None else boolean("read_only", read_only),
        isolation_level=level,
        deferrable=None if deferrable is None else boolean("deferrable", deferrable),
    )


def refuse_flush(name: str, session: Session) -> None:
    """Let a session of a read-only unit flush nothing."""

    def before_flush(session: Session, _context: UOWTransaction, _objects: object) -> None:
        changed = [one for one in session.dirty if session.is_modified(one)]
        if count := len(session.new) + len(session.deleted) + len(changed):
            raise ReadOnlyError(name, count)

    event.listen(session, "before_flush", before_flush)
