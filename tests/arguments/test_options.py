"""What a caller may ask for: every mistake is refused where it is made, by name, and no secret is shown."""

import logging
import re
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool
from starlette.applications import Starlette

from fastapi_async_sqlalchemy import (
    ConfigurationError,
    EngineAlreadyBoundError,
    MissingSessionError,
    SessionNotInitialisedError,
    SessionProxy,
    SQLAlchemyMiddleware,
    create_middleware_and_session_proxy,
)
from tests.support.serving import asgi_client
from tests.support.versions import knows_aioodbc

URL = "sqlite+aiosqlite://"
NO_SESSION = r"session_args\['class_'\] must be a subclass of sqlalchemy\.ext\.asyncio\.AsyncSession, not "
MISSING_DRIVER = (
    "{name}: .* driver .* installed.* install it"
    if knows_aioodbc
    else r"{name}: SQLAlchemy knows no 'mssql\+aioodbc'"
)
NO_ENGINE = r"custom_engine must be an AsyncEngine .*create_async_engine\(\)"
app = Starlette()


async def always(status: int, error: BaseException | None) -> bool:
    """Decide about a commit, but only when awaited."""
    return True


def an_engine() -> AsyncEngine:
    """Make an engine that never connects."""
    return create_async_engine(URL)


BAD_URLS: dict[str, tuple[object, str]] = {
    "a number": (5, "{name} must be a string or a sqlalchemy URL, not int"),
    "bytes": (b"sqlite+aiosqlite://", "{name} must be a string or a sqlalchemy URL, not bytes"),
    "nothing": ("", r"{name} cannot be parsed: write it as dialect\+driver://"),
    "words": ("not a url", r"{name} cannot be parsed: write it as dialect\+driver://"),
    "a word for a port": ("postgresql+asyncpg://h:port/db", r"{name} cannot be parsed: write it as dialect"),
    "a synchronous driver": ("sqlite:///test.db", r"{name}.* asyncio driver, .* sqlite\+aiosqlite"),
    "Oracle without a driver": ("oracle://h/db", r"{name}.* asyncio driver, .* postgresql\+asyncpg"),
    "MySQL without a driver": ("mysql://h/db", r"{name}.* asyncio driver, .* mysql\+aiomysql"),
    "a missing driver": ("mssql+aioodbc://h/db", MISSING_DRIVER),
    "an unknown dialect": ("nosuch://h/db", r"{name}.*'nosuch'.* for example postgresql\+asyncpg"),
    "an unknown driver": (
        "postgresql+nosuch://h/db",
        r"{name}.*'postgresql\+nosuch'.* for example postgresql\+asyncpg",
    ),
    "a URL that SQLite refuses": (
        "sqlite+aiosqlite://host/db",
        r"{name}: 'sqlite\+aiosqlite' refuses this URL: check",
    ),
}
BAD_ENGINE_ARGS: dict[str, tuple[object, str]] = {
    "a number": (5, "engine_args must be a mapping of keyword arguments, not int"),
    "a string": ("echo", "engine_args must be a mapping of keyword arguments, not str"),
    "pairs": ([("echo", True)], "engine_args must be a mapping of keyword arguments, not list"),
    "an unknown key": ({"pool_sise": 5}, "engine_args .*'pool_sise'"),
    "a key that is no string": ({5: 5}, "engine_args .*strings"),
    "the URL again": ({"url": URL}, "engine_args .*'url'"),
    "a pool that is no class": ({"poolclass": 3}, "engine_args .*'int' object"),
    "an echo that is no level": ({"echo": "yes"}, "engine_args .*'yes'"),
    "an unknown plugin": ({"plugins": ["nosuch"]}, "engine_args .*nosuch"),
    "a wrong value": ({"connect_args": 3}, "engine_args .*'int' object"),
}
BAD_SESSION_ARGS: dict[str, tuple[object, str]] = {
    "a number": (5, "session_args must be a mapping of keyword arguments, not int"),
    "a string": ("autoflush", "session_args must be a mapping of keyword arguments, not str"),
    "an unknown key": ({"expire_on_comit": False}, "session_args .*'expire_on_comit'"),
    "a key that is no string": ({5: 5}, "session_args .*strings"),
    "the engine": ({"bind": an_engine()}, "session_args must not hold 'bind': give the engine as"),
    "a class that is no session": ({"class_": int}, NO_SESSION),
    "a synchronous session": ({"class_": Session}, NO_SESSION),
    "a class's name": ({"class_": "AsyncSession"}, NO_SESSION),
    "a wrong choice": ({"join_transaction_mode": "nosuch"}, "session_args .*join_transaction_mode"),
    "a wrong value": ({"info": 3}, "session_args .*'int' object"),
    "binds that are no mapping": ({"binds": 3}, r"session_args\['binds'\]"),
    "a bind that is no engine": ({"binds": {"note": 3}}, r"session_args\['binds'\]"),
    "a synchronous bind": ({"binds": {"note": create_engine("sqlite://")}}, r"session_args\['binds'\]"),
    "a synchronous class that is none": ({"sync_session_class": 3}, r"session_args.*sync_session_class"),
}
BAD_FLAGS: dict[str, tuple[object, str]] = {
    name: (value, "commit_on_exit must be True or False, not ")
    for name, value in {"a word": "yes", "one": 1, "zero": 0, "empty": ""}.items()
}
BAD_PATHS: dict[str, tuple[object, str]] = {
    "a string": ("/health", r"exclude_paths must be an iterable of paths such as \['/health'\]"),
    "bytes": (b"/health", "exclude_paths must be an iterable of paths"),
    "a number": (5, "exclude_paths must be an iterable of paths"),
    "no slash": (["health"], "exclude_paths must hold paths that begin with '/', not 'health'"),
    "numbers": ([1], "exclude_paths must hold paths that begin with '/', not 1"),
    "lists": ([["/health"]], r"exclude_paths must hold paths that begin with '/', not \['/health'\]"),
}
BAD_RULES: dict[str, tuple[object, str]] = {
    "a number": (3, "commit_when must be a plain function of a status and an exception, not 3"),
    "a coroutine function": (always, "commit_when must be a plain function .*not .*always"),
}
BAD_CUSTOM_ENGINES: dict[str, tuple[object, str]] = {
    "a synchronous engine": (create_engine("sqlite://"), NO_ENGINE),
    "a URL": (URL, NO_ENGINE),
    "a number": (5, NO_ENGINE),
}
BAD_ENGINES: dict[str, tuple[object, str]] = {
    name: (value, r"engine must be an AsyncEngine of create_async_engine\(\)")
    for name, value in {"a synchronous engine": create_engine("sqlite://"), "a URL": URL}.items()
}
BAD_CLASSES: dict[str, tuple[object, str]] = {
    name: (value, "session_class must be a subclass of sqlalchemy.ext.asyncio.AsyncSession, not ")
    for name, value in {"another class": int, "a synchronous session": Session, "a name": "Mine"}.items()
}

Call = Callable[[SessionProxy[AsyncSession], type[SQLAlchemyMiddleware[AsyncSession]], Any], object]
CALLS: dict[str, tuple[Call, str, dict[str, tuple[object, str]]]] = {
    "middleware db_url": (lambda db, middleware, value: middleware(app, db_url=value), "db_url", BAD_URLS),
    "middleware engine_args": (
        lambda db, middleware, value: middleware(app, db_url=URL, engine_args=value),
        "engine_args",
        BAD_ENGINE_ARGS,
    ),
    "middleware session_args": (
        lambda db, middleware, value: middleware(app, db_url=URL, session_args=value),
        "session_args",
        BAD_SESSION_ARGS,
    ),
    "middleware commit_on_exit": (
        lambda db, middleware, value: middleware(app, db_url=URL, commit_on_exit=value),
        "commit_on_exit",
        BAD_FLAGS,
    ),
    "middleware exclude_paths": (
        lambda db, middleware, value: middleware(app, db_url=URL, exclude_paths=value),
        "exclude_paths",
        BAD_PATHS,
    ),
    "middleware commit_when": (
        lambda db, middleware, value: middleware(app, db_url=URL, commit_when=value),
        "commit_when",
        BAD_RULES,
    ),
    "middleware custom_engine": (
        lambda db, middleware, value: middleware(app, custom_engine=value),
        "custom_engine",
        BAD_CUSTOM_ENGINES,
    ),
    "factory": (
        lambda db, middleware, value: create_middleware_and_session_proxy(value),
        "session_class",
        BAD_CLASSES,
    ),
    "connect url": (lambda db, middleware, value: db.connect(value), "url", BAD_URLS),
    "connect engine_args": (
        lambda db, middleware, value: db.connect(URL, engine_args=value),
        "engine_args",
        BAD_ENGINE_ARGS,
    ),
    "connect session_args": (
        lambda db, middleware, value: db.connect(URL, session_args=value),
        "session_args",
        BAD_SESSION_ARGS,
    ),
    "bind engine": (lambda db, middleware, value: db.bind(value), "engine", BAD_ENGINES),
    "bind session_args": (
        lambda db, middleware, value: db.bind(an_engine(), session_args=value),
        "session_args",
        BAD_SESSION_ARGS,
    ),
}


each_mistake = pytest.mark.parametrize(
    ("call", "value", "message"),
    [
        pytest.param(call, value, f"^(the )?{message.replace('{name}', name)}", id=f"{place}: {case}")
        for place, (call, name, values) in CALLS.items()
        for case, (value, message) in values.items()
    ],
)


@each_mistake
def test_mistake_is_refused_where_it_is_made(call: Call, value: object, message: str) -> None:
    """A wrong argument raises at once, naming the argument and the remedy; then a right call succeeds."""
    middleware, db = create_middleware_and_session_proxy()
    with pytest.raises(ConfigurationError, match=message):
        call(db, middleware, value)
    with pytest.raises(SessionNotInitialisedError, match=r"db\.connect\(url\)"):
        _ = db.session
    engine = an_engine()
    middleware(app, custom_engine=engine)
    assert db.engine is engine


@pytest.mark.parametrize(("value", "message"), BAD_SESSION_ARGS.values(), ids=BAD_SESSION_ARGS)
def test_unit_refuses_session_args(value: Any, message: str) -> None:
    """`db(...)` itself raises for wrong session arguments, not the first use of the session."""
    _, db = create_middleware_and_session_proxy()
    db.bind(an_engine())
    with pytest.raises(ConfigurationError, match=f"^{message}"):
        db(session_args=value)


@pytest.mark.parametrize(("value", "message"), BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_unit_refuses_a_flag_that_is_none(value: Any, message: str) -> None:
    """`db(...)` itself raises for a `commit_on_exit` that is neither True nor False."""
    _, db = create_middleware_and_session_proxy()
    db.bind(an_engine())
    with pytest.raises(ConfigurationError, match=f"^{message}"):
        db(commit_on_exit=value)


def test_two_engines_are_refused() -> None:
    """`db_url` and `custom_engine` exclude each other."""
    middleware, _ = create_middleware_and_session_proxy()
    with pytest.raises(ConfigurationError, match="db_url and custom_engine exclude each other: give one"):
        middleware(app, db_url=URL, custom_engine=an_engine())


@pytest.mark.parametrize("name", ["engine_args", "session_args"])
def test_arguments_of_no_engine(name: str) -> None:
    """Arguments for an engine that comes from elsewhere would be ignored: they are refused."""
    middleware, _ = create_middleware_and_session_proxy()
    given: dict[str, Any] = {name: {"echo": True} if name == "engine_args" else {"autoflush": False}}
    with pytest.raises(ConfigurationError, match=f"^{name} go with "):
        middleware(app, **given)


def test_empty_engine_args_are_none() -> None:
    """An empty mapping beside a ready engine is no argument; what is no mapping is a mistake there, too."""
    wrong: Any = 5
    middleware, db = create_middleware_and_session_proxy()
    engine = an_engine()
    middleware(app, custom_engine=engine, engine_args={})
    db.connect(engine, engine_args={})
    with pytest.raises(ConfigurationError, match="engine_args must be a mapping"):
        middleware(app, custom_engine=engine, engine_args=wrong)
    with pytest.raises(ConfigurationError, match="engine_args must be a mapping"):
        db.connect(engine, engine_args=wrong)


def test_arguments_are_checked_before_an_engine_is_made() -> None:
    """A wrong argument is told before anything of the user's is made or looked for."""
    middleware, db = create_middleware_and_session_proxy()
    made = list[object]()
    wrong: Any = 5
    engine_args: Any = {"plugins": [], "json_serializer": str, "creator": made.append, "module": None}
    for given in ({"session_args": wrong}, {"pool_warn_threshold": wrong}, {"exclude_paths": wrong}):
        with pytest.raises(ConfigurationError, match=f"^{next(iter(given))} must "):
            middleware(app, db_url="postgresql+nosuch://", engine_args=engine_args, **given)
    db.bind(an_engine())
    with pytest.raises(ConfigurationError, match=r"^session_args must be a mapping"):
        db.bind(an_engine(), session_args=wrong)
    assert made == []


def test_engine_args_need_a_url() -> None:
    """Engine arguments beside a ready engine would be ignored: they are refused."""
    middleware, db = create_middleware_and_session_proxy()
    with pytest.raises(ConfigurationError, match="engine_args go with db_url: custom_engine has its own"):
        middleware(app, custom_engine=an_engine(), engine_args={"echo": True})
    with pytest.raises(ConfigurationError, match="engine_args go with a URL: an engine has its own"):
        db.connect(an_engine(), engine_args={"echo": True})


async def test_mistake_in_add_middleware_stops_the_startup() -> None:
    """An application with a wrong argument does not start, so that no request is served."""
    middleware, _ = create_middleware_and_session_proxy()
    application = Starlette()
    application.add_middleware(middleware, db_url="")
    with pytest.raises(ConfigurationError, match=r"db_url cannot be parsed: write it as dialect\+driver"):
        async with asgi_client(application):
            pass


@pytest.mark.parametrize("paths", [None, [], ["/health"], ("/health", "/"), {"/health"}, iter(["/health"])])
def test_paths_may_come_in_any_collection(paths: Any) -> None:
    """Every iterable of paths is accepted, an iterator too."""
    middleware, _ = create_middleware_and_session_proxy()
    middleware(app, db_url=URL, exclude_paths=paths)


def test_url_object_and_every_mapping_are_accepted() -> None:
    """A URL object stands for its text, and any mapping holds arguments; neither is changed."""
    middleware, db = create_middleware_and_session_proxy()
    engine_args: dict[str, Any] = {"poolclass": NullPool, "connect_args": {"timeout": 3}}
    session_args: dict[str, Any] = {"class_": AsyncSession, "autoflush": False}
    middleware(app, db_url=make_url(URL), engine_args=engine_args, session_args=session_args)
    assert isinstance(db.engine.sync_engine.pool, NullPool)
    assert engine_args == {"poolclass": NullPool, "connect_args": {"timeout": 3}}
    assert session_args == {"class_": AsyncSession, "autoflush": False}


UNREACHABLE = "postgresql+asyncpg://user:s3cret@127.0.0.1:1/database?password=s3cret2"


def assert_no_secret(shown: object) -> None:
    """Fail if a secret of UNREACHABLE is in this text."""
    assert re.findall("s3cret2?", str(shown)) == []


def shown(error: BaseException) -> str:
    """Return all that a log would show of an error, its causes included."""
    return "".join((*traceback.format_exception(error), repr(error), repr(vars(error))))


async def test_no_repr_shows_a_secret() -> None:
    """Proxies, middlewares, units and scopes, open and closed, name the database without its secrets."""
    middleware, db = create_middleware_and_session_proxy()
    instance = middleware(app, db_url=UNREACHABLE)
    scope = db()
    objects: list[object] = [middleware, instance, db, scope, db.connect(UNREACHABLE)]
    async with scope as unit:
        _ = unit.session
        for thing in (*objects, unit):
            assert_no_secret(f"{thing!r} {thing}")
    for thing in (*objects, unit):
        assert_no_secret(f"{thing!r} {thing}")
    assert "127.0.0.1" in repr(db)
    assert "database" in repr(unit)


async def test_no_error_of_ours_shows_a_secret() -> None:
    """Errors that name the database name it without its secrets."""
    middleware, db = create_middleware_and_session_proxy()
    middleware(app, db_url=UNREACHABLE)
    with pytest.raises(MissingSessionError, match=r"127\.0\.0\.1") as missing:
        _ = db.session
    assert_no_secret(shown(missing.value))
    with pytest.raises(EngineAlreadyBoundError, match=r"127\.0\.0\.1") as bound:
        db.bind(an_engine())
    assert_no_secret(shown(bound.value))


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("postgresql+asyncpg://user:s3cret@host:port/db?password=s3cret2", id="no port"),
        pytest.param("postgresql+asyncpg//user:s3cret@host/db?password=s3cret2", id="a missing colon"),
        pytest.param("oracle://user:s3cret@host/db?password=s3cret2", id="no driver"),
        pytest.param("nosuch://user:s3cret@host/db?password=s3cret2", id="an unknown dialect"),
        pytest.param("mssql+aioodbc://user:s3cret@host/db?password=s3cret2", id="a driver not installed"),
        pytest.param("sqlite://user:s3cret@host/db?password=s3cret2", id="a synchronous driver"),
        pytest.param("sqlite+aiosqlite://user:s3cret@host/db?password=s3cret2", id="a server for SQLite"),
    ],
)
def test_refused_url_is_not_quoted(url: str) -> None:
    """A URL that is refused is not shown with its password, in the message or in any cause."""
    middleware, db = create_middleware_and_session_proxy()
    with pytest.raises(ConfigurationError, match=r"^db_url") as refused:
        middleware(app, db_url=url)
    assert_no_secret(shown(refused.value))
    with pytest.raises(ConfigurationError, match=r"^url") as refused:
        db.connect(url)
    assert_no_secret(shown(refused.value))


async def test_nothing_logged_or_warned_shows_a_secret(caplog: pytest.LogCaptureFixture) -> None:
    """A unit whose database cannot be reached logs and raises no secret, at any level."""
    caplog.set_level(logging.DEBUG)
    middleware, db = create_middleware_and_session_proxy()
    application = Starlette()
    application.add_middleware(middleware, db_url=UNREACHABLE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        async with asgi_client(application):
            with pytest.raises(OSError, match=r"127\.0\.0\.1") as refused:
                await use(db)
    assert_no_secret(shown(refused.value))
    assert "A hook of" in caplog.text
    assert_no_secret(caplog.text)
    assert_no_secret([warning.message for warning in caught])


async def use(db: SessionProxy[AsyncSession]) -> None:
    """Try to reach the database, in a unit with a hook that fails."""
    async with db() as unit:
        unit.on_rollback(fail)
        await unit.session.execute(text("SELECT 1"))


def fail() -> None:
    """Fail as a hook."""
    message = "boom"
    raise ValueError(message)
