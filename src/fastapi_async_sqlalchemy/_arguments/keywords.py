"""The keyword arguments of engines and sessions that a caller may give.

Annotations are evaluated here, unlike in the other modules. A ``TypedDict`` of strings would compile each
of them at import, and code that reads them at run time would need this module's imports.
"""

import inspect
from collections.abc import Awaitable, Callable, Mapping
from types import ModuleType
from typing import Any, Literal, TypedDict, get_origin

from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.engine.interfaces import IsolationLevel as EngineIsolationLevel
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import Mapper, Query, Session
from sqlalchemy.pool import ConnectionPoolEntry, Pool
from sqlalchemy.sql.schema import Table

from ..exceptions import ConfigurationError
from .checks import mapping


class EngineArgs(TypedDict, total=False):
    """Keyword arguments of ``create_async_engine()``, as SQLAlchemy 2.0 and 2.1 document them."""

    async_creator: Callable[[], Awaitable[object]]
    connect_args: Mapping[str, object]
    creator: Callable[[], DBAPIConnection] | Callable[[ConnectionPoolEntry], DBAPIConnection]
    echo: bool | Literal["debug"] | None
    echo_pool: bool | Literal["debug"] | None
    enable_from_linting: bool
    execution_options: Mapping[str, object]
    hide_parameters: bool
    implicit_returning: Literal[True]
    insertmanyvalues_page_size: int
    isolation_level: EngineIsolationLevel
    json_deserializer: Callable[[str], object]
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
    """Keyword arguments of SQLAlchemy's ``AsyncSession`` and ``Session``, without ``bind``.

    ``class_`` is the session class, as in ``async_sessionmaker``. Two defaults differ from SQLAlchemy's.
    ``expire_on_commit`` is False, because an expired attribute cannot be loaded by reading it under
    asyncio. ``close_resets_only`` is False once the unit has ended.
    """

    autobegin: bool
    autoflush: bool
    binds: dict[type[Any] | Mapper[Any] | Table | str, AsyncEngine | AsyncConnection]
    class_: type[AsyncSession]
    close_resets_only: bool
    enable_baked_queries: bool
    execution_options: Mapping[str, object]
    expire_on_commit: bool
    info: dict[Any, Any]
    join_transaction_mode: Literal[
        "conditional_savepoint", "rollback_only", "control_fully", "create_savepoint"
    ]
    query_cls: type[Query[Any]]
    sync_session_class: type[Session]
    twophase: bool


def session_arguments(value: object) -> dict[str, Any]:
    """Validate session arguments for which SQLAlchemy's own errors are unclear."""
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
        wanted = "a Session class"
        msg = "session_args['sync_session_class']"
        raise ConfigurationError(msg, wanted, given)
    binds = mapping("session_args['binds']", arguments.get("binds"))
    if not all(isinstance(bind, AsyncEngine | AsyncConnection) for bind in binds.values()):
        message = (
            "session_args['binds'] must map classes or tables to an AsyncEngine or AsyncConnection each."
        )
        raise ConfigurationError(message)
    return arguments


def session_class_of(name: str, value: object) -> None:
    """Raise ``ConfigurationError`` for anything but an ``AsyncSession`` class."""
    class_: object = value
    if not (isinstance(value, type) and issubclass(value, AsyncSession)):
        if isinstance(
            origin := get_origin(value), type
        ):  # a type checker takes ModelSession[ShopBase] for a class
            message = (
                f"{name} must be a class: write `class ShopSession({origin.__name__}[...])`, and give that."
            )
            raise ConfigurationError(message)
        wanted = "a subclass of sqlalchemy.ext.asyncio.AsyncSession"
        raise ConfigurationError(name, wanted, class_)


def require_fitting(
    class_: type[AsyncSession], sync_class: type[Session], engine: AsyncEngine, keywords: Mapping[str, Any]
) -> None:
    """Raise ``ConfigurationError`` for arguments that do not fit, without creating a caller's session."""
    known = inspect.signature(Session.__init__).parameters
    own = class_.__init__ is AsyncSession.__init__
    rest = {name: value for name, value in keywords.items() if name not in {"binds", "sync_session_class"}}
    passed = {**keywords, "bind": engine, "close_resets_only": False}
    try:
        inspect.signature(class_.__init__).bind(None, **passed)
        if own:  # a caller's class decides itself which arguments it passes on
            inspect.signature(sync_class.__init__).bind(None, bind=engine.sync_engine, **rest)
        AsyncSession(engine, **{name: value for name, value in keywords.items() if name in known})
    except (TypeError, AttributeError, ValueError, SQLAlchemyError) as error:
        remedy = "correct the argument it names" + ("" if own else ", or let its __init__() take **kwargs")
        message = f"session_args do not fit {class_.__name__}: {error}: {remedy}."
        raise ConfigurationError(message) from error
