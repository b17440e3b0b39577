"""Log records: the fields that each one has besides its text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .observer import TransactionOutcome


def fields(
    database: str,
    *,
    unit: int | None = None,
    request: str | None = None,
    outcome: TransactionOutcome | None = None,
    statements: int | None = None,
) -> dict[str, object]:
    """Return the ``extra`` of a record: always the same fields, each None where there is nothing to say."""
    return {
        "database": database,
        "unit": unit,
        "request": request,
        "outcome": outcome,
        "statements": statements,
    }
