"""Facts from the text of a statement: its verb, and whether it only reads."""

from __future__ import annotations

import re
from typing import Final

READS: Final = frozenset(
    {
        *("SELECT", "SHOW", "EXPLAIN", "DESCRIBE", "DESC", "PRAGMA", "VALUES", "TABLE", "SET", "BEGIN", "XA"),
        *("DECLARE", "FETCH", "MOVE", "CLOSE"),  # PostgreSQL's cursors
    }
)
"""Verbs of statements that leave nothing to commit."""
_SAVEPOINTS: Final = frozenset({"SAVEPOINT", "RELEASE", "ROLLBACK"})
UNBUFFERED: Final = frozenset({"mysql", "mariadb"})
"""Dialects whose connections lose a stream's remaining rows when another statement is sent."""
_COMMITS: Final = ("COMMIT PREPARED", "XA COMMIT")
_PREPARES: Final = ("PREPARE TRANSACTION", "XA PREPARE")
"""The statements sent by a COMMIT that takes part in a two-phase commit."""
TWO_PHASE: Final = ("PREPARE TRANSACTION", "COMMIT PREPARED", "ROLLBACK PREPARED")
"""PostgreSQL's statements of a two-phase commit."""
_VERB: Final = re.compile(r"(?:\s|\(|--[^\n]*\n|/\*.*?\*/)*(\w+)", re.DOTALL)
_WRITING_CTE: Final = re.compile(r"\b(?:INSERT|UPDATE|DELETE|MERGE|REPLACE\s+INTO)\b", re.IGNORECASE)


def verb_of(statement: str) -> str:
    """Return the first word, after blanks, brackets and comments."""
    found = _VERB.match(statement)
    return found[1].upper() if found else ""


def has_writing_part(statement: str) -> bool:
    """Whether a ``WITH`` may write: a word in quoted text counts, too."""
    return _WRITING_CTE.search(statement) is not None


def writes(statement: str, verb: str) -> bool:
    """Whether a statement may leave something to commit, as far as its text says."""
    if verb in READS or verb in _SAVEPOINTS:
        return False
    return verb != "WITH" or has_writing_part(statement)


def decides(statement: str, xid: str) -> bool:
    """Whether a statement decides the transaction ``xid``: PREPARE does so only for the witness."""
    return statement.startswith(_COMMITS) or (xid.endswith("w") and statement.startswith(_PREPARES))


def dated(xid: str, seconds: int) -> str:
    """Return the name of a transaction that begins at that time, in seconds since 1970."""
    kind, _, rest = xid.split("_", 2)
    return f"{kind}_{seconds}_{rest}"
