"""The beginning of a unit's transactions: read-only, isolation level, and an engine that applies them."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Final, cast

from attrs import asdict, evolve, frozen
from sqlalchemy import event

from .._arguments.checks import ISOLATION_LEVELS
from ..exceptions import ConfigurationError
from .engines import is_settable, is_settled, note_end
from .twophase import date_by_server, finish_in_one

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Connection, Engine
    from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.pool import ConnectionPoolEntry, PoolResetState

    from .._arguments.checks import Begin, IsolationLevel


@frozen(kw_only=True)
class TransactionSettings:
    """The settings requested for a unit's transactions; None means not requested."""

    read_only: bool | None = None
    isolation_level: IsolationLevel | None = None
    deferrable: bool | None = None
    twophase: bool | None = None
    """The transaction is committed together with those of other databases."""
    begin: Begin | None = None

    @property
    def reads_alone(self) -> bool:
        """Whether plain reads need no transaction."""
        return self.begin == "on_first_write" and not self.twophase

    @property
    def as_always(self) -> bool:
        """Whether transactions have no settings, whenever they begin."""
        return evolve(self, begin=None) == PLAIN

    def conflict(self, outer: TransactionSettings) -> str | None:
        """Return the first setting that an open unit does not meet, with both values."""
        given: dict[str, object] = asdict(outer)
        for name, wanted in asdict(self).items():
            has = given[name] or False if isinstance(wanted, bool) else given[name]
            if name == "begin" and (has is None or wanted == "on_first_write"):
                continue  # that is a permission, and a transaction from the start goes with it
            if wanted is not None and wanted != has:
                return f"{name}={wanted!r} was asked for inside a unit with {name}={has!r}"
        return None


PLAIN: Final = TransactionSettings()
_SET_SESSION: Final = frozenset({"mysql", "mariadb"})
"""Dialects for which SQLAlchemy changes and restores the isolation level by a statement each."""
_RESTORE_LEVEL: Final = "fastapi_async_sqlalchemy.restore_level"
_RESTORE_ACCESS: Final = "fastapi_async_sqlalchemy.restore_access"
_ACCESS: Final = "fastapi_async_sqlalchemy.access"
_QUERY_ONLY: Final = "fastapi_async_sqlalchemy.query_only"


def engine_for(engine: Engine, settings: TransactionSettings, xid: Callable[[], str]) -> Engine:
    """Return an engine over the same pool whose transactions have the settings.

    They are set with BEGIN or before it; those that outlast the transaction are restored.
    Raises ``ConfigurationError`` for settings that the database does not have.
    """
    if settings.as_always:
        return engine
    dialect = engine.dialect
    derived = engine.execution_options(**_options_of(engine, settings))
    if settings.twophase:
        derived.dialect = named = copy.copy(dialect)
        named.create_xid = xid  # type: ignore[method-assign]  # our own copy
        if dialect.name in _SET_SESSION:
            date_by_server(named)
        else:
            finish_in_one(engine, named)
    if settings.isolation_level is not None:
        event.listen(derived, "begin", _isolation_begin(settings.isolation_level))
        event.listen(derived, "begin_twophase", _isolation_begin(settings.isolation_level))
        event.listen(engine.pool, "reset", _restore_level)
    if settings.isolation_level == "SERIALIZABLE" and dialect.name == "sqlite":
        event.listen(derived, "before_cursor_execute", _begin)
    if settings.read_only and dialect.name != "postgresql":
        begin, restore = _read_only(dialect.name)
        event.listen(derived, "begin", begin)
        event.listen(engine.pool, "reset", restore)
    return derived


def commits_by_itself(engine: AsyncEngine | Engine) -> bool:
    """Whether an engine is in AUTOCOMMIT: its statements are stored immediately."""
    level = engine.dialect._on_connect_isolation_level  # there is no public name
    return engine.get_execution_options().get("isolation_level", level) == "AUTOCOMMIT"


def require_deferrable(engine: AsyncEngine, settings: TransactionSettings) -> None:
    """Raise ``ConfigurationError`` if neither the settings nor the engine let `deferrable` have an effect."""
    options, level = engine.get_execution_options(), engine.dialect._on_connect_isolation_level
    level = settings.isolation_level or options.get("isolation_level", level)
    read_only = options.get("postgresql_readonly") if settings.read_only is None else settings.read_only
    if settings.deferrable and not (read_only and level == "SERIALIZABLE"):
        message = (
            "PostgreSQL gives deferrable an effect only in a SERIALIZABLE READ ONLY transaction: "
            "give read_only=True and isolation_level='SERIALIZABLE' as well, or leave deferrable out."
        )
        raise ConfigurationError(message)


def require_read_only_twophase(engine: AsyncEngine) -> None:
    """Raise ``ConfigurationError`` for a database whose two-phase transactions cannot be read-only."""
    if engine.dialect.name != "postgresql":
        message = "read_only cannot be enforced on two-phase transactions here: leave 'twophase' out."
        raise ConfigurationError(message)


def _options_of(engine: Engine, settings: TransactionSettings) -> dict[str, object]:
    """Return SQLAlchemy's execution options for settings; refuse those that the database does not have."""
    options: dict[str, object] = {}
    dialect = engine.dialect
    if settings.twophase and dialect.name not in {"postgresql", *_SET_SESSION}:
        message = f"{dialect.name} has no two-phase commit: leave it out of atomic()."
        raise ConfigurationError(message)
    if settings.isolation_level is not None:
        levels = dialect.get_isolation_level_values(cast("DBAPIConnection", None))  # none is open yet
        if settings.isolation_level not in levels:
            known = ", ".join(level for level in ISOLATION_LEVELS if level in levels)
            message = (
                f"{dialect.name} has no isolation_level {settings.isolation_level!r}: use one of {known}."
            )
            raise ConfigurationError(message)
    if settings.deferrable:
        if dialect.name != "postgresql":
            message = f"deferrable is PostgreSQL's alone: leave it out for {dialect.name}."
            raise ConfigurationError(message)
        options["postgresql_deferrable"] = True
    if settings.read_only and dialect.name == "postgresql":
        options["postgresql_readonly"] = True
    if options and settings.isolation_level is None and commits_by_itself(engine):
        message = (
            "read_only and deferrable are of a transaction, and this engine is in AUTOCOMMIT: "
            "give isolation_level as well, or an engine without isolation_level='AUTOCOMMIT'."
        )
        raise ConfigurationError(message)
    return options


def _isolation_begin(level: IsolationLevel) -> Callable[..., None]:
    """Return a function that sets a connection's level when its transaction begins.

    With SQLAlchemy's own option a level of the engine's would win. Where that option is restored by a
    statement, as on MariaDB, a connection that breaks then is lost to its pool, and the error looks like
    COMMIT's.
    """

    def set_level(connection: Connection, *_: object) -> None:
        driver = connection.connection.dbapi_connection
        if driver is None:
            return
        dialect = connection.dialect
        if dialect.name in _SET_SESSION and is_settable(connection.connection):
            connection.info[_RESTORE_LEVEL] = partial(_set_session, dialect.default_isolation_level)
            _set_session(level, driver)
        else:
            connection.info[_RESTORE_LEVEL] = dialect.reset_isolation_level
            dialect.set_isolation_level(driver, level)

    return set_level


def _set_session(level: str | None, driver: DBAPIConnection) -> None:
    """Set MariaDB's level while no transaction is open, by one statement; SQLAlchemy adds a COMMIT.

    ``SET TRANSACTION``, for the next transaction alone, would end with a DDL, which commits by itself.
    """
    cursor = driver.cursor()
    cursor.execute(f"SET SESSION TRANSACTION ISOLATION LEVEL {level}")
    cursor.close()


def _restore_level(driver: DBAPIConnection, record: ConnectionPoolEntry, state: PoolResetState) -> None:
    """Restore the engine's own level on a connection that returns to the pool."""
    restore = record.info.pop(_RESTORE_LEVEL, None)
    if restore is None or state.terminate_only:
        return
    if isinstance(restore, partial):
        settled = is_settled(record)
        restore(driver)
        if settled:
            note_end(record)
    else:
        driver.rollback()  # SQLAlchemy's ends by COMMIT on MariaDB
        restore(driver)


def _begin(connection: Connection, cursor: DBAPICursor, statement: str, *_: object) -> None:
    """Begin the transaction that Python's driver delays until the first write: reads count, too.

    This runs at the first statement, after any BEGIN of an engine or a hook.
    """
    driver = connection.connection.driver_connection
    if driver is not None and not driver.in_transaction and statement[:5].upper() != "BEGIN":
        cursor.execute("BEGIN")


def _read_only(dialect: str) -> tuple[Callable[[Connection], None], Callable[..., None]]:
    """Return functions that make a connection read-only, and undo that when it returns to the pool."""
    if dialect == "sqlite":
        return _query_only, _reset_query_only
    if dialect in _SET_SESSION:
        return _session_read_only, _restore_access
    message = f"read_only cannot be enforced on {dialect}: PostgreSQL, MySQL, MariaDB and SQLite can."
    raise ConfigurationError(message)


def _session_read_only(connection: Connection) -> None:
    """Make all transactions read-only: CREATE, DROP or TRUNCATE would end a single read-only one."""
    if _ACCESS not in connection.info:
        access = connection.exec_driver_sql(
            "SHOW VARIABLES WHERE variable_name IN ('tx_read_only', 'transaction_read_only')"
        )
        connection.info[_ACCESS] = "READ ONLY" if access.all()[0][1] == "ON" else "READ WRITE"
    connection.info[_RESTORE_ACCESS] = True
    connection.exec_driver_sql("SET SESSION TRANSACTION READ ONLY")


def _restore_access(driver: DBAPIConnection, record: ConnectionPoolEntry, state: PoolResetState) -> None:
    """Restore write access on a connection that returns to the pool, if it had it before."""
    if record.info.pop(_RESTORE_ACCESS, False) and not state.terminate_only:
        cursor = driver.cursor()
        cursor.execute(f"SET SESSION TRANSACTION {record.info[_ACCESS]}")
        cursor.close()


def _query_only(connection: Connection) -> None:
    connection.info[_QUERY_ONLY] = True
    connection.exec_driver_sql("PRAGMA query_only = ON")


def _reset_query_only(driver: DBAPIConnection, record: ConnectionPoolEntry, state: PoolResetState) -> None:
    """Restore write access on a connection that returns to the pool."""
    if record.info.pop(_QUERY_ONLY, False) and not state.terminate_only:
        cursor = driver.cursor()
        cursor.execute("PRAGMA query_only = OFF")
        cursor.close()
