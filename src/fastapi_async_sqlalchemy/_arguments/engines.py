"""Engines and their URLs."""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, InvalidRequestError
from sqlalchemy.ext import asyncio as sqlalchemy_asyncio
from sqlalchemy.ext.asyncio import AsyncEngine

from ..exceptions import ConfigurationError
from .checks import mapping
from .keywords import EngineArgs

if TYPE_CHECKING:
    from collections.abc import Mapping

_DRIVERS = "use an asyncio driver, for example postgresql+asyncpg, sqlite+aiosqlite or mysql+aiomysql"


_OTHERS: Final = (
    str(Path(__file__).parents[1]),
    *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
    "<",
)
"""Path prefixes of files that are not the user's."""


def line_in_debug_mode() -> str | None:
    """Return the line of the user's code that has led here, in asyncio's debug mode."""
    return _user_line() if _debugging() else None


def _debugging() -> bool:
    """Whether this is asyncio's debug mode, or ``python -X dev``."""
    with suppress(RuntimeError):  # no loop is running
        if asyncio.get_running_loop().get_debug():
            return True
    return sys.flags.dev_mode or bool(os.environ.get("PYTHONASYNCIODEBUG"))


def _user_line() -> str | None:
    """Return the nearest line of the user's code, otherwise the running test."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(_OTHERS):
        frame = frame.f_back
    if frame is None:  # a TestClient calls the application in a separate thread
        return os.environ.get("PYTEST_CURRENT_TEST")
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def place_of(url: URL) -> URL:
    """Return a database's address for messages: without user, password and query."""
    return URL.create(url.drivername, host=url.host, port=url.port, database=url.database)


def pgbouncer_engine_args(**connect_args: object) -> EngineArgs:
    """Return ``engine_args`` for asyncpg behind PgBouncer's transaction pooling; adds ``connect_args``.

    No statement is kept after a transaction, because another server connection may serve the next one.
    Statements have no name, and PostgreSQL keeps one such at a time. Raises ``ConfigurationError`` for an
    argument that would change that.
    """
    nameless: dict[str, Any] = {
        "statement_cache_size": 0,  # asyncpg's
        "prepared_statement_cache_size": 0,  # SQLAlchemy's
        "prepared_statement_name_func": str,  # "" each time: a named one would stay behind
    }
    if taken := ", ".join(connect_args.keys() & nameless):
        message = f"pgbouncer_engine_args() sets {taken} itself: leave it out, or do without the function."
        raise ConfigurationError(message)
    if misplaced := ", ".join(connect_args.keys() & EngineArgs.__annotations__):
        message = f"{misplaced} is no connect_args of asyncpg: write {{**pgbouncer_engine_args(), ...}}."
        raise ConfigurationError(message)
    return {"connect_args": {**connect_args, **nameless}}


def create_engine(name: str, url: object, engine_args: Mapping[str, Any] | None) -> AsyncEngine:
    """Create an engine; raise ``ConfigurationError`` for every mistake in its arguments."""
    parsed = parse(name, url)
    driver = parsed.drivername
    arguments = dict(mapping("engine_args", engine_args))
    try:
        parsed.get_dialect()
    except ArgumentError as error:
        message = f"{name}: SQLAlchemy knows no {driver!r}: {_DRIVERS}."
        raise ConfigurationError(message) from error
    try:
        # looked up at call time: OpenTelemetry and others replace it whenever they are enabled
        return sqlalchemy_asyncio.create_async_engine(parsed, **arguments)
    except InvalidRequestError as error:
        message = f"{name}: {driver!r} is not asynchronous: {_DRIVERS}."
        raise ConfigurationError(message) from error
    except ModuleNotFoundError as error:
        remedy = (
            "install it, for example with the extra that installs it: "
            "[postgresql], [psycopg], [sqlite], [mysql] or [asyncmy]"
        )
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
    # outside the block: a text that quotes the URL may show a password, and must not become the context
    message = f"{name}: {driver!r} refuses this URL: check its host, database and query."
    raise ConfigurationError(message)


def async_engine(name: str, value: object) -> AsyncEngine:
    """Validate a caller's engine."""
    if not isinstance(value, AsyncEngine):
        message = f"{name} must be an AsyncEngine of create_async_engine(), not {type(value).__name__}."
        raise ConfigurationError(message)
    return value


def parse(name: str, url: object) -> URL:
    """Validate a URL, as far as it can be parsed."""
    if isinstance(url, URL):
        return url
    if not isinstance(url, str):
        message = f"{name} must be a string or a sqlalchemy URL, not {type(url).__name__}."
        raise ConfigurationError(message)
    with suppress(ArgumentError, ValueError):  # their text may quote the whole URL, including its password
        return make_url(url)
    message = f"{name} cannot be parsed: write it as dialect+driver://user:password@host:port/database."
    raise ConfigurationError(message)
