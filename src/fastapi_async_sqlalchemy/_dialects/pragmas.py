"""SQLite's PRAGMAs that need that no transaction is open."""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .savepoints import Send

BEGINS: Final = frozenset({"INSERT", "UPDATE", "DELETE", "REPLACE"})
"""Verbs before which Python's driver sends BEGIN."""
_NEEDS_NONE: Final = re.compile(
    r"(?:\s|--[^\n]*\n|/\*.*?\*/)*PRAGMA\s+(?:\w+\s*\.\s*)?(?P<name>foreign_keys|journal_mode|synchronous)"
    r"\s*(?:=|\()\s*['\"]?(?P<value>\w+)",
    re.IGNORECASE | re.DOTALL,
)
"""SQLite 3.40 ignores the first in a transaction, and refuses the others."""
_HEADER: Final = re.compile(
    r"\s*PRAGMA\s+(?:\w+\s*\.\s*)?(?:user_version|application_id)\s*[=(]", re.IGNORECASE
)
_VALUES: Final = MappingProxyType(
    {
        "foreign_keys": {"on": "1", "yes": "1", "true": "1", "off": "0", "no": "0", "false": "0"},
        "synchronous": {"off": "0", "normal": "1", "full": "2", "extra": "3"},
        "journal_mode": dict[str, str](),
    }
)


def needs_no_transaction(statement: str) -> bool:
    """Whether a PRAGMA sets what cannot be set in a transaction."""
    return _NEEDS_NONE.match(statement) is not None


def writes_header(statement: str) -> bool:
    """Whether a PRAGMA writes a number into the file, which a ROLLBACK undoes."""
    return _HEADER.match(statement) is not None


def is_already(statement: str, send: Send) -> bool:
    """Whether a PRAGMA would set what is set."""
    found = _NEEDS_NONE.match(statement)
    if found is None:
        return False
    name, value = found["name"].lower(), found["value"].lower()
    current = send(f"PRAGMA {name}", rows=True)[0][0]
    return str(current).lower() == _VALUES[name].get(value, value)
