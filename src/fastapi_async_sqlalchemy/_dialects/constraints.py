"""The constraint that a database's error names."""

from __future__ import annotations

import re
from typing import Final

from sqlalchemy.exc import DBAPIError

from .._arguments.checks import exception

_IN_TEXT: Final = (
    # MySQL and MariaDB; a value comes before, and may hold anything. MySQL 8 puts the table before the key
    re.compile(r"for key '(?:[^'.]*\.)?([^']+)'$"),
    re.compile(r"CONSTRAINT `([^`]+)` FOREIGN KEY"),
    re.compile(r"^CONSTRAINT `(?:[^`.]*\.)?([^`]+)` failed for "),
    re.compile(r"^Check constraint '([^']+)' is violated"),
    # SQLite names columns for UNIQUE, and for a constraint without a name its expression
    re.compile(r"^CHECK constraint failed: (\w+)$"),
    re.compile(r"^UNIQUE constraint failed: index '([^']+)'$"),
)


def violated_constraint(error: BaseException) -> str | None:
    """Return the name of the constraint that an ``IntegrityError`` is about, None if the database says none.

    PostgreSQL, MySQL and MariaDB name unique keys, foreign keys and checks. SQLite names checks alone. The
    cause of another error, such as ``UnexpectedRollbackError``, is looked at as well.
    """
    found: BaseException | None = exception("error", error)
    while found is not None and not isinstance(found, DBAPIError):
        found = found.__cause__
    if found is None or found.orig is None:
        return None
    original = found.orig
    for detail in (getattr(original, "diag", None), original.__cause__):  # psycopg's, asyncpg's
        name: object = getattr(detail, "constraint_name", None)
        if isinstance(name, str) and name:
            return name
    text = str(original.args[-1]) if original.args else ""
    return next((match[1] for pattern in _IN_TEXT if (match := pattern.search(text))), None)
