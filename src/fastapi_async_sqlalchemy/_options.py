"""What a caller may ask for, and its validation."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Final, Literal, TypeAlias, cast, get_args

from attrs import frozen
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from ._arguments import EngineArgs
from .exceptions import ConfigurationError

CommitWhen: TypeAlias = Callable[[int, BaseException | None], bool]
"""A caller's own rule: the response's status and the exception being handled in, commit or not out."""

Propagation: TypeAlias = Literal["requires_new", "required", "nested", "mandatory", "never"]
"""What a block does about the unit of work that is open where it stands."""
IsolationLevel: TypeAlias = Literal["READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
"""SQLAlchemy's names, less AUTOCOMMIT, which is no transaction."""
PROPAGATIONS: Final[tuple[str, ...]] = get_args(Propagation)
ISOLATION_LEVELS: Final[tuple[str, ...]] = get_args(IsolationLevel)


@frozen(kw_only=True)
class CommitPolicy:
    """What a response decides about its transaction: True commits, False rolls back, None does neither."""

    commit_on_exit: bool
    commit_when: CommitWhen | None

    def response(self, status: int, exception: BaseException | None) -> bool | None:
        """Decide when the response starts."""
        if self.commit_when is not None:
            return boolean("what commit_when returns", self.commit_when(status, exception))
        if status >= _ERROR_STATUS or exception is not None:
            return False
        return self.commit_on_exit or None

    def tail(self, standing: bool | None, *, complete: bool) -> bool | None:  # noqa: FBT001  # three values
        """Decide when the application has returned, unless a decision of the response's start stands.

        A response that is not complete is no success: the client has left, or the application gave up.
        """
        wanted = self.commit_on_exit or None if standing is None else standing
        return wanted if complete or not wanted else False


_ERROR_STATUS = 400
_DRIVERS = "use an asyncio driver, for example postgresql+asyncpg, sqlite+aiosqlite or mysql+aiomysql"


def shown(value: object) -> str:
    """Return a wrong value as an error may show it: what could hold a password, by its type alone."""
    text = repr(value)
    return type(value).__name__ if "://" in text or "@" in text else text


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


def mapping(name: str, value: object) -> Mapping[str, Any]:
    """Return an optional mapping, checked."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        message = f"{name} must be a mapping of keyword arguments, not {type(value).__name__}."
        raise ConfigurationError(message)
    return cast("Mapping[str, Any]", value)


def session_arguments(value: object) -> dict[str, Any]:
    """Return session arguments, checked for what SQLAlchemy itself would not tell well."""
    arguments = dict(mapping("session_args", value))
    if "bind" in arguments:
        message = (
            "session_args must not hold 'bind': give the engine as custom_engine=, or the URL as db_url=."
        )
        raise ConfigurationError(message)
    if arguments.get("class_") is not None:
        session_class_of("session_args['class_']", arguments["class_"])
    sync_class: object = arguments.get("sync_session_class", Session)
    given: object = sync_class
    if not (isinstance(sync_class, type) and issubclass(sync_class, Session)):
        message = f"session_args['sync_session_class'] must be a Session class, not {shown(given)}."
        raise ConfigurationError(message)
    binds = mapping("session_args['binds']", arguments.get("binds"))
    if not all(isinstance(bind, AsyncEngine | AsyncConnection) for bind in binds.values()):
        message = (
            "session_args['binds'] must map classes or tables to an AsyncEngine or AsyncConnection each."
        )
        raise ConfigurationError(message)
    return arguments


def session_class_of(name: str, value: object) -> None:
    """Refuse what is not an ``AsyncSession`` class."""
    class_: object = value
    if not (isinstance(value, type) and issubclass(value, AsyncSession)):
        message = f"{name} must be a subclass of sqlalchemy.ext.asyncio.AsyncSession, not {shown(class_)}."
        raise ConfigurationError(message)


def boolean(name: str, value: object) -> bool:
    """Return a flag, checked: a truthy string is a mistake, not a yes."""
    if not isinstance(value, bool):
        message = f"{name} must be True or False, not {shown(value)}."
        raise ConfigurationError(message)
    return value


def propagation_of(value: object) -> Propagation:
    """Return a propagation, checked."""
    if value not in PROPAGATIONS:
        message = f"propagation must be one of {', '.join(PROPAGATIONS)}, not {shown(value)}."
        raise ConfigurationError(message)
    return cast("Propagation", value)


def count(name: str, value: object, least: int) -> int:
    """Return a whole number, checked."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        message = f"{name} must be a whole number of at least {least}, not {shown(value)}."
        raise ConfigurationError(message)
    return value


def positive(name: str, value: object) -> float:
    """Return a number of seconds or a part, checked: more than nothing, and finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        message = f"{name} must be a finite number above 0, not {shown(value)}."
        raise ConfigurationError(message)
    return float(value)


def optional_count(name: str, value: object) -> int | None:
    """Return a whole number of at least 1, checked; None is no limit."""
    return None if value is None else count(name, value, 1)


def optional_seconds(name: str, value: object) -> float | None:
    """Return a number of seconds, checked; None is no deadline."""
    return None if value is None else positive(name, value)


def paths(name: str, value: object) -> frozenset[str]:
    """Return request paths, checked: each begins with a slash."""
    if value is None:
        return frozenset()
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        message = f"{name} must be an iterable of paths such as ['/health'], not {shown(value)}."
        raise ConfigurationError(message)
    found: list[str] = []
    for path in cast("Iterable[object]", value):
        if not (isinstance(path, str) and path.startswith("/")):
            message = f"{name} must hold paths that begin with '/', not {shown(path)}."
            raise ConfigurationError(message)
        found.append(path)
    return frozenset(found)


def commit_policy(commit_on_exit: object, commit_when: CommitWhen | None) -> CommitPolicy:
    """Return a policy, checked: a rule that is a coroutine function would always be true."""
    rule: object = commit_when
    if rule is not None and (not callable(rule) or inspect.iscoroutinefunction(rule)):
        message = (
            f"commit_when must be a plain function of a status and an exception, not {shown(commit_when)}."
        )
        raise ConfigurationError(message)
    return CommitPolicy(commit_on_exit=boolean("commit_on_exit", commit_on_exit), commit_when=commit_when)
