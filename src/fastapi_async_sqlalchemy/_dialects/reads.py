"""Plain reads on PostgreSQL, which need no transaction: each has its own snapshot there anyway."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from ..exceptions import ConfigurationError
from .alone import READ_COMMITTED, alone, end_alone, is_idle, level_at_begin

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Dialect, Engine, ExecutionContext
    from sqlalchemy.engine.interfaces import DBAPICursor

_TOKEN: Final = re.compile(
    r"""
    (?P<string>'(?:[^']|'')*')
  | (?P<quoted>"(?:[^"]|"")*")(?P<quoted_call>\s*\()?
  | (?P<dot>\.\s*)?(?P<word>[^\W\d][\w$]*)(?P<call>\s*\()?
  | (?P<refused>;|--|/\*|\$(?!\d)|'|")
  | .
    """,
    re.VERBOSE | re.DOTALL,
)
_WORD: Final = re.compile(r"\w+")
_CALLED: Final = frozenset(
    _WORD.findall(
        "SELECT FROM WHERE AND OR NOT IN VALUES ON JOIN EXISTS ANY ALL SOME CASE WHEN THEN ELSE CAST OVER "
        "FILTER BY UNION EXCEPT INTERSECT AS LATERAL DISTINCT LIMIT OFFSET HAVING USING ROW ARRAY BETWEEN "
        "LIKE ILIKE IS COALESCE NULLIF GREATEST LEAST EXTRACT VARCHAR CHAR NUMERIC DECIMAL TIMESTAMP TIME "
        "BIT COUNT SUM MIN MAX AVG LOWER UPPER LENGTH ABS ROUND CONCAT SUBSTRING TRIM ARRAY_AGG JSON_AGG "
        "JSONB_AGG STRING_AGG BOOL_AND BOOL_OR ROW_NUMBER RANK DENSE_RANK"
    )
)
"""Words that a bracket may follow: syntax, and functions that write nothing and lock nothing."""
_WRITES: Final = frozenset(
    _WORD.findall(
        "INTO FOR INSERT UPDATE DELETE MERGE RETURNING CURRENT_TIMESTAMP CURRENT_TIME CURRENT_DATE LOCALTIME "
        "LOCALTIMESTAMP"
    )
)
"""Words that write, lock, or tell when the transaction began."""
_MAY_SET: Final = re.compile(r"^\s*(?:SET|RESET|DISCARD|DO|CALL|ALTER)\b|set_config", re.IGNORECASE)
_FACTS: Final = (
    "SELECT current_setting('transaction_isolation'), pg_backend_pid(), "
    "EXISTS (SELECT FROM pg_prepared_statements WHERE statement LIKE '%client {0}%')"
)
"""The query for the level, for the process at the server, and whether this statement itself has a name."""
_READS_ALONE: Final = "fastapi_async_sqlalchemy.reads_alone"
"""Whether READ COMMITTED is the default of a connection."""
_OURS: Final = 2
"""The number of this package's listeners for the statements of one database."""


@lru_cache(maxsize=1024)
def is_plain(statement: str) -> bool:
    """Whether a statement surely does nothing but read: it calls nothing unknown, and locks nothing."""
    if statement[:6].upper() != "SELECT" or "\\" in statement:
        return False
    for found in _TOKEN.finditer(statement):
        if found["refused"] or found["quoted_call"]:
            return False
        word = found["word"]
        if word is not None:
            word = word.upper()
            if word in _WRITES and not found["dot"]:
                return False
            if found["call"] and (found["dot"] or word not in _CALLED):
                return False
    return True


def asks_for_facts(statement: str) -> bool:
    """Whether a statement is this module's own query, which no application has sent."""
    return statement.startswith(_FACTS.partition("EXISTS")[0])


def require_read_committed(engine: Engine, *, asked: bool) -> None:
    """Raise ``ConfigurationError`` for an engine whose reads need a transaction.

    ``asked`` is whether its units begin their transactions at another level.
    """
    dialect = engine.dialect
    if dialect.driver not in {"asyncpg", "psycopg"}:
        message = (
            f"begin='on_first_write' is for PostgreSQL by asyncpg or psycopg: leave it out for "
            f"{dialect.name} by {dialect.driver}."
        )
        raise ConfigurationError(message)
    level = dialect._on_connect_isolation_level  # there is no public name
    level = engine.get_execution_options().get("isolation_level", level)
    if not asked and level not in {None, "READ COMMITTED"}:
        message = (
            f"begin='on_first_write' is for READ COMMITTED, and this engine has isolation_level={level!r}: "
            "leave one of them out."
        )
        raise ConfigurationError(message)


def is_alone(dialect: Dialect, ours: type[object]) -> bool:
    """Whether nobody else listens for statements: a user's listener may rely on the transaction."""
    listeners = dialect.dispatch.do_execute
    return len(listeners) == _OURS or all(
        isinstance(getattr(one, "__self__", None), ours) for one in listeners
    )


def note_settings(statement: str, connection: Connection) -> None:
    """Forget what is known of a connection after a statement that may change its default level."""
    if _MAY_SET.search(statement):
        connection.info.pop(_READS_ALONE, None)


def send_alone(cursor: DBAPICursor, statement: str, values: Any, context: ExecutionContext) -> bool:
    """Execute a plain read without a transaction; return False if it needs one."""
    options, connection = context.execution_options, context.root_connection
    if "stream_results" in options or "yield_per" in options or getattr(cursor, "server_side", False):
        return False
    pooled = connection.connection
    adapted: Any = pooled.dbapi_connection
    if not is_idle(adapted):
        return False
    known = pooled.info.get(_READS_ALONE)
    if known is None:
        known = pooled.info[_READS_ALONE] = _ask(adapted)
    if not known or level_at_begin(adapted) not in READ_COMMITTED:
        return False
    adapted.autocommit = True
    try:
        cursor.execute(statement, values)
    finally:
        end_alone(adapted)
    return True


def _ask(adapted: Any) -> bool:
    """Ask a new connection for its default level, and whether PgBouncer or its like stands in between."""
    driver = adapted.driver_connection
    by_asyncpg = hasattr(driver, "get_server_pid")
    own = driver.get_server_pid() if by_asyncpg else driver.info.backend_pid
    cursor = adapted.cursor()
    with alone(adapted):
        cursor.execute(_FACTS.format(own))
    level, server, named = cursor.fetchone()
    cursor.close()
    if not by_asyncpg:
        named = driver.prepare_threshold is not None
    if server != own and named:
        message = (
            "begin='on_first_write' needs statements without names behind PgBouncer: give engine_args "
            "pgbouncer_engine_args(), or psycopg {'connect_args': {'prepare_threshold': None}}."
        )
        raise ConfigurationError(message)
    return bool(level == "read committed")
