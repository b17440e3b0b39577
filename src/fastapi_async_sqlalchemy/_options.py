"""What a caller may ask for: the arguments of engines and sessions, and their validation."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from .exceptions import ConfigurationError

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import DBAPIConnection, IsolationLevel
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.orm import Mapper, Query, Session
    from sqlalchemy.pool import ConnectionPoolEntry, Pool
    from sqlalchemy.sql.schema import Table

CommitWhen: TypeAlias = Callable[[int, BaseException | None], bool]
"""A caller's own rule: the response's status and the exception being handled in, commit or not out."""


class EngineArgs(TypedDict, total=False):
    """Keyword arguments of SQLAlchemy's ``create_async_engine()``, as SQLAlchemy 2.0 and 2.1 document them."""

    async_creator: Callable[[], Awaitable[object]]
    connect_args: Mapping[str, Any]
    creator: Callable[[], DBAPIConnection] | Callable[[ConnectionPoolEntry], DBAPIConnection]
    echo: bool | Literal["debug"] | None
    echo_pool: bool | Literal["debug"] | None
    enable_from_linting: bool
    execution_options: Mapping[str, Any]
    hide_parameters: bool
    implicit_returning: Literal[True]
    insertmanyvalues_page_size: int
    isolation_level: IsolationLevel
    json_deserializer: Callable[[str], Any]
    json_serializer: Callable[[Any], str]
    label_length: int | None
    logging_name: str
    max_identifier_length: int | None
    max_overflow: int
    module: ModuleType | str | None
    paramstyle: Literal["qmark", "numeric", "named", "format", "pyformat", "numeric_dollar"] | None
    plugins: list[str]
    pool: Pool | None
    pool_logging_name: str
    pool_pre_ping: bool
    pool_recycle: int
    pool_reset_on_return: Literal["rollback", "commit"] | bool | None
    pool_size: int
    pool_timeout: float
    pool_use_lifo: bool
    poolclass: type[Pool] | None
    query_cache_size: int
    skip_autocommit_rollback: bool
    use_insertmanyvalues: bool


class SessionArgs(TypedDict, total=False):
    """Keyword arguments of SQLAlchemy's ``AsyncSession`` and ``Session``, less ``bind``.

    ``class_`` is the session class, in the spelling of ``async_sessionmaker``. Two defaults differ
    from SQLAlchemy's: ``expire_on_commit`` is False, because an expired attribute cannot be loaded by
    reading it under asyncio, and ``close_resets_only`` is False once the unit has ended.
    """

    autobegin: bool
    autoflush: bool
    binds: dict[type[Any] | Mapper[Any] | Table | str, AsyncEngine | AsyncConnection]
    class_: type[AsyncSession]
    close_resets_only: bool
    enable_baked_queries: bool
    execution_options: Mapping[str, Any]
    expire_on_commit: bool
    info: dict[Any, Any]
    join_transaction_mode: Literal[
        "conditional_savepoint", "rollback_only", "control_fully", "create_savepoint"
    ]
    query_cls: type[Query[Any]]
    sync_session_class: type[Session]
    twophase: bool


def create_engine(url: object, engine_args: Mapping[str, Any] | None) -> AsyncEngine:
    """Make an engine, and turn every mistake in its arguments into a ``ConfigurationError``."""
    parsed = _parse(url)
    arguments = dict(mapping("engine_args", engine_args))
    try:
        return create_async_engine(parsed, **arguments)
    except ModuleNotFoundError as error:
        message = (
            f"db_url: the driver of {parsed.drivername!r} is not installed ({error}): "
            "install it, for example with one of this package's extras [postgresql], [sqlite], [mysql]."
        )
        raise ConfigurationError(message) from error
    except (ArgumentError, TypeError, ValueError) as error:
        message = f"engine_args do not fit an engine for {parsed.drivername!r}: {error}"
        raise ConfigurationError(message) from error
    except Exception as error:  # the dialect refuses: a synchronous driver, for one
        message = (
            f"db_url: no asynchronous engine can be made for {parsed.drivername!r} ({error}): use an asyncio "
            "driver, for example postgresql+asyncpg, sqlite+aiosqlite or mysql+aiomysql."
        )
        raise ConfigurationError(message) from error


def engine(name: str, value: object, engine_args: Mapping[str, Any] | None) -> tuple[AsyncEngine, bool]:
    """Return the engine that a URL or an engine stands for, and whether it was made here."""
    if isinstance(value, AsyncEngine):
        if engine_args is not None:
            message = f"engine_args go with a URL: {name} is an engine, which has its own already."
            raise ConfigurationError(message)
        return value, False
    return create_engine(value, engine_args), True


def _parse(url: object) -> URL:
    if isinstance(url, URL):
        return url
    if not isinstance(url, str):
        message = f"db_url must be a string or a sqlalchemy URL, not {type(url).__name__}."
        raise ConfigurationError(message)
    try:
        return make_url(url)
    except (ArgumentError, ValueError):
        # SQLAlchemy's text may quote the whole URL, its password included: it is not chained
        message = "db_url cannot be parsed: write it as dialect+driver://user:password@host:port/database."
        raise ConfigurationError(message) from None


def mapping(name: str, value: object) -> Mapping[str, Any]:
    """Return an optional mapping with string keys, checked."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        message = f"{name} must be a mapping of keyword arguments, not {type(value).__name__}."
        raise ConfigurationError(message)
    return value


def session_arguments(value: object) -> dict[str, Any]:
    """Return session arguments, checked as far as it can be done before a session exists."""
    arguments = dict(mapping("session_args", value))
    if "bind" in arguments:
        message = "session_args must not hold 'bind': give the engine as custom_engine=, or the URL as db_url=."
        raise ConfigurationError(message)
    if arguments.get("class_") is not None:
        session_class("session_args['class_']", arguments["class_"])
    return arguments


def session_class(name: str, value: object) -> None:
    """Refuse what is not an ``AsyncSession`` class."""
    if not (isinstance(value, type) and issubclass(value, AsyncSession)):
        message = f"{name} must be a subclass of sqlalchemy.ext.asyncio.AsyncSession, not {value!r}."
        raise ConfigurationError(message)


def boolean(name: str, value: object) -> bool:
    """Return a flag, checked: a truthy string is a mistake, not a yes."""
    if not isinstance(value, bool):
        message = f"{name} must be True or False, not {value!r}."
        raise ConfigurationError(message)
    return value


def paths(name: str, value: object) -> frozenset[str]:
    """Return request paths, checked: each begins with a slash."""
    if value is None:
        return frozenset()
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        message = f"{name} must be an iterable of paths such as ['/health'], not {value!r}."
        raise ConfigurationError(message)
    found = frozenset(value)
    for path in found:
        if not (isinstance(path, str) and path.startswith("/")):
            message = f"{name} must hold paths that begin with '/', not {path!r}."
            raise ConfigurationError(message)
    return found
