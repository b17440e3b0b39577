"""The meaning of a statement's text for a transaction that is a savepoint of a test sandbox's."""

from __future__ import annotations

import re
from enum import Enum, auto
from types import MappingProxyType
from typing import Final

from .statements import verb_of

_MYSQL: Final = frozenset({"mysql", "mariadb"})


class Meaning(Enum):
    """What a statement does to the transaction of its connection."""

    COMMIT = auto()
    ROLLBACK = auto()
    BEGIN = auto()
    PREPARE = auto()
    """The first half of a two-phase commit."""
    READ_ONLY = auto()
    READ_WRITE = auto()
    NOTHING = auto()
    """It would set an isolation level, which a savepoint cannot have."""
    STATEMENT = auto()
    """It is sent as it is."""


_BY_VERB: Final = MappingProxyType(
    {
        "COMMIT": Meaning.COMMIT,
        "END": Meaning.COMMIT,
        "ABORT": Meaning.ROLLBACK,
        "BEGIN": Meaning.BEGIN,
        "START": Meaning.BEGIN,
    }
)
_XA: Final = MappingProxyType(
    {
        "BEGIN": Meaning.BEGIN,
        "START": Meaning.BEGIN,
        "END": Meaning.NOTHING,
        "PREPARE": Meaning.PREPARE,
        "COMMIT": Meaning.COMMIT,
        "ROLLBACK": Meaning.ROLLBACK,
    }
)
_CHARACTERISTICS: Final = re.compile(
    r"\s*SET\s+(?:SESSION\s+CHARACTERISTICS\s+AS\s+|SESSION\s+|LOCAL\s+)?TRANSACTION\s", re.IGNORECASE
)
_QUERY_ONLY: Final = re.compile(r"\s*PRAGMA\s+query_only\s*[=(]\s*(?P<value>\w+)", re.IGNORECASE)
_TRUE: Final = frozenset({"ON", "1", "TRUE", "YES"})
_BY_WORDS: Final = frozenset({"ROLLBACK", "PREPARE", "XA"})
_ACCESS: Final = re.compile(r"\bREAD\s+(ONLY|WRITE)\b", re.IGNORECASE)
_COMMITS_IMPLICITLY: Final = frozenset(
    {
        *("ALTER", "ANALYZE", "CREATE", "DROP", "FLUSH", "GRANT", "LOCK", "OPTIMIZE", "RENAME", "REPAIR"),
        *("REVOKE", "TRUNCATE", "UNLOCK"),
    }
)
"""MariaDB's statements that commit the transaction in which they are sent."""
_TEMPORARY: Final = re.compile(r"\s*(?:CREATE(?:\s+OR\s+REPLACE)?|DROP)\s+TEMPORARY\s", re.IGNORECASE)


def meaning_of(dialect: str, statement: str) -> Meaning:
    """Return the meaning of a statement."""
    verb = verb_of(statement)
    if verb in _BY_VERB:
        return _BY_VERB[verb]
    if verb == "SET" and _CHARACTERISTICS.match(statement):
        return _characteristics(dialect, statement)
    if verb == "PRAGMA" and (found := _QUERY_ONLY.match(statement)):
        return Meaning.READ_ONLY if found["value"].upper() in _TRUE else Meaning.READ_WRITE
    words = statement.upper().split() if verb in _BY_WORDS else []
    if verb == "ROLLBACK" and "TO" not in words:
        return Meaning.ROLLBACK
    if verb == "PREPARE" and words[1] == "TRANSACTION":
        return Meaning.PREPARE
    return _XA.get(words[1], Meaning.STATEMENT) if verb == "XA" else Meaning.STATEMENT


def _characteristics(dialect: str, statement: str) -> Meaning:
    """Return the meaning of SET TRANSACTION and its like; PostgreSQL applies some to a savepoint, too."""
    access = _ACCESS.search(statement)
    if access is None:
        return Meaning.NOTHING
    if dialect in _MYSQL or "CHARACTERISTICS" in statement.upper():
        return Meaning.READ_ONLY if access[1].upper() == "ONLY" else Meaning.READ_WRITE
    return Meaning.STATEMENT


def commits_implicitly(dialect: str, statement: str) -> bool:
    """Whether a statement ends the transaction in which it is sent by a COMMIT."""
    if dialect not in _MYSQL or verb_of(statement) not in _COMMITS_IMPLICITLY:
        return False
    return _TEMPORARY.match(statement) is None
