"""Engines and their URLs."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from ..exceptions import ConfigurationError
from .checks import mapping
from .keywords import EngineArgs

if TYPE_CHECKING:
    from collections.abc import Mapping

_DRIVERS = "use an asyncio driver, for example postgresql+asyncpg, sqlite+aiosqlite or mysql+aiomysql"


def place_of(url: URL) -> URL:
    """Return where a database is, as messages may show it: without user, password and query."""
    return URL.create(url.drivername, host=url.host, port=url.port, database=url.database)


def pgbouncer_engine_args(**connect_args: object) -> EngineArgs:
    """Return ``engine_args`` for asyncpg behind PgBouncer's transaction pooling, and more ``connect_args``.

    No statement is kept from one transaction to the next, which another server connection may serve: they
    have no name, and PostgreSQL keeps one such at a time. Raises ``ConfigurationError`` for an argument that
    would change that.
    """
    nameless: dict[str, Any] = {
        "statement_cache_size": 0,  # asyncpg's
        "prepared_statement_cache_size": 0,  # SQLAlchemy's
        "prepared_statement_name_func": str,  # "" each time: one by name would stay behind
    }
    if taken := ", ".join(connect_args.keys() & nameless):
        message = f"pgbouncer_engine_args() sets {taken} itself: leave it out, or do without the function."
        raise ConfigurationError(message)
    if misplaced := ", ".join(connect_args.keys() & EngineArgs.__annotations__):
        message = f"{misplaced} is no connect_args of asyncpg: write {{**pgbouncer_engine_args(), ...}}."
        raise ConfigurationError(message)
    return {"connect_args": {**connect_args, **nameless}}


def create_engine(name: str, url: object, engine_args: Mapping[str, Any] | None) -> AsyncEngine:
    """Make an engine, and turn every mistake in its arguments into a ``ConfigurationError``."""
    parsed = _parse(name, url)
    driver = parsed.drivername
    arguments = dict(mapping("engine_args", engine_args))
    try:
        parsed.get_dialect()
    except ArgumentError as error:
        message = f"{name}: SQLAlchemy knows no {driver!r}: {_DRIVERS}."
        raise ConfigurationError(message) from error
    try:
        return create_async_engine(parsed, **arguments)
    except InvalidRequestError as error:
        message = f"{name}: {driver!r} is not asynchronous: {_DRIVERS}."
        raise ConfigurationError(message) from error
    except ModuleNotFoundError as error:
        remedy = "install it, for example with one of this package's extras [postgresql], [sqlite], [mysql]"
        message = f"{name}: no driver of {driver!r} is installed: {remedy if '+' in driver else _DRIVERS}."
        raise ConfigurationError(message) from error
    except Exception as error:
        query = (value for values in parsed.normalized_query.values() for value in values)
        quotes = any(value in str(error) for value in (str(parsed), parsed.password, *query) if value)
        if not quotes:
            message = (
                f"engine_args do not fit an engine for {driver!r}: {error!r}: correct the argument it names."
            )
            raise ConfigurationError(message) from error
    # outside of the block: a text that quotes the URL may show a password, and is not kept as a context
    message = f"{name}: {driver!r} refuses this URL: check its host, database and query."
    raise ConfigurationError(message)


def async_engine(name: str, value: object) -> AsyncEngine:
    """Return a caller's engine, checked."""
    if not isinstance(value, AsyncEngine):
        message = f"{name} must be an AsyncEngine of create_async_engine(), not {type(value).__name__}."
        raise ConfigurationError(message)
    return value


def _parse(name: str, url: object) -> URL:
    if isinstance(url, URL):
        return url
    if not isinstance(url, str):
        message = f"{name} must be a string or a sqlalchemy URL, not {type(url).__name__}."
        raise ConfigurationError(message)
    with suppress(ArgumentError, ValueError):  # whose text may quote the whole URL, its password included
        return make_url(url)
    message = f"{name} cannot be parsed: write it as dialect+driver://user:password@host:port/database."
    raise ConfigurationError(message)
