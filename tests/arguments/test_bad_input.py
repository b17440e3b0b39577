"""Every public argument refuses wrong values of every kind where they are given, and shows no secret.

What is wrong in one argument's own way is in `test_options`, `test_admission`, `test_transaction_settings`.
"""

import inspect
import logging
import math
import re
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from urllib.parse import quote

import pytest
from attrs import frozen
from sqlalchemy import URL, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from starlette.applications import Starlette
from starlette.types import Message

import fastapi_async_sqlalchemy
from fastapi_async_sqlalchemy import (
    ConfigurationError,
    SessionProxy,
    SQLAlchemyMiddleware,
    UnitOfWork,
    UnitTaskGroup,
    WalPosition,
    add_pool_timeout_handler,
    atomic,
    create_middleware_and_session_proxy,
    is_conflict,
    is_unavailable,
    recovery,
    violated_constraint,
)
from fastapi_async_sqlalchemy._arguments.engines import place_of

Pair = tuple[type[SQLAlchemyMiddleware[AsyncSession]], SessionProxy[AsyncSession]]
Call = Callable[[Pair, Any], object]
GOOD = "postgresql+asyncpg://127.0.0.1:1/database"
POSITION = WalPosition("0/1")
app = Starlette()


async def work() -> None:
    """Work as a coroutine function."""


def plain(*_: object) -> bool:
    """Work as a plain function."""
    return True


VALUES: dict[str, object] = {
    "None": None,
    "True": True,
    "zero": 0,
    "one below": -1,
    "a number": 5,
    "half": 0.5,
    "no number": math.nan,
    "infinite": math.inf,
    "nothing": "",
    "a word": "yes",
    "bytes": b"yes",
    "a list": [1],
    "a tuple": (None,),
    "a set": {1},
    "a mapping": {"nosuch": 1},
    "a class": int,
    "an object": object(),
    "an error": ValueError("yes"),
    "a function": plain,
    "a coroutine function": work,
}
"""One value of each kind."""
NOTHING: frozenset[str] = frozenset()
FLAG = frozenset({"True"})
OPTIONAL = frozenset({"None"})
OPTIONAL_FLAG = OPTIONAL | FLAG
COUNT = OPTIONAL | {"a number"}
SECONDS = COUNT | {"half"}
FUNCTION = frozenset({"a function", "a class"})
ANYTHING = frozenset(VALUES)
SERIAL = {"read_only": True, "isolation_level": "SERIALIZABLE"}
"""What `deferrable` needs."""
UNIT = {
    "session_args": OPTIONAL,
    "read_only": OPTIONAL_FLAG,
    "isolation_level": OPTIONAL,
    "deferrable": OPTIONAL_FLAG,
    "begin": OPTIONAL,
    "pool_timeout": SECONDS,
}
"""What each block takes."""


async def never_connect() -> None:
    """Take the place of a connection that nobody may ask for."""
    pytest.fail("somebody has connected")


def idle_engine(url: str = GOOD) -> AsyncEngine:
    """Make an engine that fails the test when it connects."""
    return create_async_engine(url, async_creator=never_connect)


@frozen
class Argument:
    """A public argument: how it is given, and which of the values it takes."""

    call: Call
    takes: frozenset[str]


def of_middleware(name: str, **others: Any) -> Call:
    """Return what makes a middleware with a value."""
    given: dict[str, Any] = {"app": app, **others}
    return lambda pair, value: pair[0](**(given | {name: value}))


def of_db(method: str, name: str, *positional: object, **others: Any) -> Call:
    """Return what calls the proxy, or one of its methods, with a value."""
    return lambda pair, value: getattr(pair[1], method)(*positional, **(others | {name: value}))


def of_positional(method: str) -> Call:
    """Return what calls one of the proxy's methods with a value alone."""
    return lambda pair, value: getattr(pair[1], method)(value)


def of_unit(method: str) -> Call:
    """Return what calls a method of the current unit with a value."""
    return lambda pair, value: getattr(pair[1].unit, method)(value)


def of_recovery(name: str) -> Call:
    """Return what asks for a recovery of two databases with a value."""
    given: dict[str, Any] = {}
    engines = idle_engine(), idle_engine(f"{GOOD}_2")
    return lambda _, value: recovery.recover(*engines, **(given | {name: value}))


with_url = partial(of_middleware, db_url=GOOD)
in_tasks = partial(of_db, "__call__", multi_sessions=True)
on_replica = partial(of_db, "after", position=POSITION)

ARGUMENTS: dict[tuple[str, str], Argument] = {
    ("SQLAlchemyMiddleware", "app"): Argument(with_url("app"), FUNCTION | {"a coroutine function"}),
    ("SQLAlchemyMiddleware", "db_url"): Argument(of_middleware("db_url"), OPTIONAL),
    ("SQLAlchemyMiddleware", "custom_engine"): Argument(of_middleware("custom_engine"), OPTIONAL),
    ("SQLAlchemyMiddleware", "engine_args"): Argument(with_url("engine_args"), OPTIONAL),
    ("SQLAlchemyMiddleware", "session_args"): Argument(with_url("session_args"), OPTIONAL),
    ("SQLAlchemyMiddleware", "commit_on_exit"): Argument(with_url("commit_on_exit"), OPTIONAL_FLAG),
    ("SQLAlchemyMiddleware", "exclude_paths"): Argument(with_url("exclude_paths"), OPTIONAL),
    ("SQLAlchemyMiddleware", "commit_when"): Argument(with_url("commit_when"), OPTIONAL | FUNCTION),
    ("SQLAlchemyMiddleware", "max_concurrent_requests"): Argument(with_url("max_concurrent_requests"), COUNT),
    ("SQLAlchemyMiddleware", "request_queue_timeout"): Argument(
        with_url("request_queue_timeout", max_concurrent_requests=1), SECONDS
    ),
    ("SQLAlchemyMiddleware", "pool_warn_threshold"): Argument(
        with_url("pool_warn_threshold"), OPTIONAL | {"half"}
    ),
    ("SQLAlchemyMiddleware", "pool_warn_interval"): Argument(
        with_url("pool_warn_interval"), SECONDS - OPTIONAL
    ),
    ("SQLAlchemyMiddleware", "begin"): Argument(with_url("begin"), OPTIONAL),
    ("SQLAlchemyMiddleware", "pool_warm_up"): Argument(with_url("pool_warm_up"), COUNT),
    ("SQLAlchemyMiddleware", "observers"): Argument(with_url("observers"), OPTIONAL),
    ("SQLAlchemyMiddleware", "server_timing"): Argument(with_url("server_timing"), FLAG),
    ("create_middleware_and_session_proxy", "session_class"): Argument(
        lambda pair, value: create_middleware_and_session_proxy(value), OPTIONAL
    ),
    ("create_middleware_and_session_proxy", "read_only"): Argument(
        lambda pair, value: create_middleware_and_session_proxy(read_only=value), FLAG
    ),
    ("SQLAlchemyMiddleware", "concurrent_use"): Argument(with_url("concurrent_use"), OPTIONAL),
    ("create_middleware_and_session_proxy", "concurrent_use"): Argument(
        lambda pair, value: create_middleware_and_session_proxy(concurrent_use=value), NOTHING
    ),
    ("create_middleware_and_session_proxy", "commit_on_exit"): Argument(
        lambda pair, value: create_middleware_and_session_proxy(commit_on_exit=value), FLAG
    ),
    ("create_middleware_and_session_proxy", "begin"): Argument(
        lambda pair, value: create_middleware_and_session_proxy(begin=value), OPTIONAL
    ),
    ("create_middleware_and_session_proxy", "observers"): Argument(
        lambda pair, value: create_middleware_and_session_proxy(observers=value), OPTIONAL
    ),
    ("atomic", "databases"): Argument(lambda pair, value: atomic(pair[1], value), NOTHING),
    ("is_conflict", "error"): Argument(lambda pair, value: is_conflict(value), frozenset({"an error"})),
    ("is_unavailable", "error"): Argument(lambda pair, value: is_unavailable(value), frozenset({"an error"})),
    ("violated_constraint", "error"): Argument(
        lambda pair, value: violated_constraint(value), frozenset({"an error"})
    ),
    ("add_pool_timeout_handler", "app"): Argument(
        lambda pair, value: add_pool_timeout_handler(value), NOTHING
    ),
    ("SessionProxy.__call__", "session_args"): Argument(of_db("__call__", "session_args"), OPTIONAL),
    ("SessionProxy.__call__", "commit_on_exit"): Argument(of_db("__call__", "commit_on_exit"), OPTIONAL_FLAG),
    ("SessionProxy.__call__", "propagation"): Argument(of_db("__call__", "propagation"), NOTHING),
    ("SessionProxy.__call__", "read_only"): Argument(of_db("__call__", "read_only"), OPTIONAL_FLAG),
    ("SessionProxy.__call__", "isolation_level"): Argument(of_db("__call__", "isolation_level"), OPTIONAL),
    ("SessionProxy.__call__", "deferrable"): Argument(
        of_db("__call__", "deferrable", **SERIAL), OPTIONAL_FLAG
    ),
    ("SessionProxy.__call__", "begin"): Argument(of_db("__call__", "begin"), OPTIONAL),
    ("SessionProxy.__call__", "multi_sessions"): Argument(of_db("__call__", "multi_sessions"), FLAG),
    ("SessionProxy.__call__", "max_concurrent"): Argument(in_tasks("max_concurrent"), COUNT),
    ("SessionProxy.__call__", "pool_timeout"): Argument(of_db("__call__", "pool_timeout"), SECONDS),
    **{
        (f"SessionProxy.{method}", name): Argument(
            of_db(method, name, **(SERIAL if name == "deferrable" else {})), takes
        )
        for method, more in (
            ("begin", {"propagation": NOTHING}),
            ("per_task", {"max_concurrent": COUNT, "commit_on_exit": OPTIONAL_FLAG}),
        )
        for name, takes in (UNIT | more).items()
    },
    ("SessionProxy.after", "position"): Argument(of_db("after", "position"), NOTHING),
    ("SessionProxy.after", "timeout"): Argument(on_replica("timeout"), SECONDS - OPTIONAL),
    ("SessionProxy.after", "fallback"): Argument(on_replica("fallback"), OPTIONAL),
    ("SessionProxy.after", "session_args"): Argument(on_replica("session_args"), OPTIONAL),
    ("SessionProxy.after", "isolation_level"): Argument(on_replica("isolation_level"), OPTIONAL),
    ("SessionProxy.after", "pool_timeout"): Argument(on_replica("pool_timeout"), SECONDS),
    ("SessionProxy.create_all", "metadata"): Argument(of_db("create_all", "metadata"), NOTHING),
    ("SessionProxy.drop_all", "metadata"): Argument(of_db("drop_all", "metadata"), NOTHING),
    ("SessionProxy.connection", "timeout"): Argument(of_db("connection", "timeout"), SECONDS),
    ("SessionProxy.connection", "commit_on_exit"): Argument(
        of_db("connection", "commit_on_exit"), OPTIONAL_FLAG
    ),
    ("SessionProxy.gather", "coroutines"): Argument(of_positional("gather"), NOTHING),
    ("SessionProxy.gather", "return_exceptions"): Argument(of_db("gather", "return_exceptions"), FLAG),
    ("SessionProxy.gather", "max_concurrent"): Argument(of_db("gather", "max_concurrent"), COUNT),
    ("SessionProxy.gather", "commit_on_exit"): Argument(of_db("gather", "commit_on_exit"), OPTIONAL_FLAG),
    ("SessionProxy.gather", "session_args"): Argument(of_db("gather", "session_args"), OPTIONAL),
    ("SessionProxy.task_group", "max_concurrent"): Argument(of_db("task_group", "max_concurrent"), COUNT),
    ("SessionProxy.task_group", "commit_on_exit"): Argument(
        of_db("task_group", "commit_on_exit"), OPTIONAL_FLAG
    ),
    ("SessionProxy.task_group", "session_args"): Argument(of_db("task_group", "session_args"), OPTIONAL),
    ("SessionProxy.transactional", "function"): Argument(
        lambda pair, value: pair[1].transactional(value), OPTIONAL | {"a coroutine function"}
    ),
    ("SessionProxy.transactional", "propagation"): Argument(of_db("transactional", "propagation"), NOTHING),
    ("SessionProxy.transactional", "read_only"): Argument(of_db("transactional", "read_only"), OPTIONAL_FLAG),
    ("SessionProxy.transactional", "isolation_level"): Argument(
        of_db("transactional", "isolation_level"), OPTIONAL
    ),
    ("SessionProxy.transactional", "deferrable"): Argument(
        of_db("transactional", "deferrable"), OPTIONAL_FLAG
    ),
    ("SessionProxy.transactional", "retries"): Argument(
        of_db("transactional", "retries"), frozenset({"zero", "a number"})
    ),
    ("SessionProxy.connect", "url"): Argument(of_db("connect", "url"), NOTHING),
    ("SessionProxy.connect", "engine_args"): Argument(of_db("connect", "engine_args", GOOD), OPTIONAL),
    ("SessionProxy.connect", "session_args"): Argument(of_db("connect", "session_args", GOOD), OPTIONAL),
    ("SessionProxy.connect", "commit_on_exit"): Argument(
        of_db("connect", "commit_on_exit", GOOD), OPTIONAL_FLAG
    ),
    ("SessionProxy.connect", "begin"): Argument(of_db("connect", "begin", GOOD), OPTIONAL),
    ("SessionProxy.connect", "pool_warm_up"): Argument(of_db("connect", "pool_warm_up", GOOD), COUNT),
    ("SessionProxy.connect", "observers"): Argument(of_db("connect", "observers", GOOD), OPTIONAL),
    ("SessionProxy.ping", "timeout"): Argument(of_db("ping", "timeout"), SECONDS - OPTIONAL),
    ("SessionProxy.on_open", "callback"): Argument(of_db("on_open", "callback"), FUNCTION),
    ("SessionProxy.bind", "engine"): Argument(of_db("bind", "engine"), NOTHING),
    ("SessionProxy.bind", "session_args"): Argument(
        lambda pair, value: pair[1].bind(pair[1].engine, session_args=value), OPTIONAL
    ),
    ("UnitOfWork.on_commit", "hook"): Argument(of_unit("on_commit"), FUNCTION | {"a coroutine function"}),
    ("UnitOfWork.on_rollback", "hook"): Argument(of_unit("on_rollback"), FUNCTION | {"a coroutine function"}),
    ("UnitOfWork.before_commit", "hook"): Argument(
        of_unit("before_commit"), FUNCTION | {"a coroutine function"}
    ),
    ("UnitOfWork.on_begin", "hook"): Argument(of_unit("on_begin"), FUNCTION),
    ("UnitTaskGroup.create_task", "coroutine"): Argument(
        lambda pair, value: pair[1].task_group().create_task(value), NOTHING
    ),
    ("recover", "engines"): Argument(lambda pair, value: recovery.recover(pair[1].engine, value), NOTHING),
    ("recover", "older_than"): Argument(of_recovery("older_than"), SECONDS - OPTIONAL),
    ("recover", "dry_run"): Argument(of_recovery("dry_run"), FLAG),
    ("recover", "group"): Argument(of_recovery("group"), OPTIONAL),
}
"""Every public argument."""
GIVEN_BY_OTHERS = {
    ("SQLAlchemyMiddleware.__call__", "scope"),  # the server's
    ("SQLAlchemyMiddleware.__call__", "receive"),
    ("SQLAlchemyMiddleware.__call__", "send"),
    ("SessionProxy.dependency", "connection"),  # FastAPI's
    ("SessionProxy.unit_dependency", "connection"),
    ("UnitTaskGroup.create_task", "name"),  # asyncio's: whatever it is, its text is the name
    ("main", "arguments"),  # argparse's
    ("pgbouncer_engine_args", "connect_args"),  # asyncpg's
}


def callables() -> Iterator[tuple[str, Callable[..., object]]]:
    """Find what users call: functions and classes of the package, and methods of what it gives them."""
    for module in (fastapi_async_sqlalchemy, recovery):
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isfunction(thing):
                yield name, thing
    yield "SQLAlchemyMiddleware", SQLAlchemyMiddleware
    for kind in (SQLAlchemyMiddleware, SessionProxy, UnitOfWork, UnitTaskGroup):
        for base in kind.__mro__:
            for name, member in vars(base).items():
                if inspect.isfunction(member) and (name == "__call__" or not name.startswith("_")):
                    yield f"{kind.__name__}.{name}", getattr(kind, name)


LIFECYCLE = {"settle", "roll_back", "finish_idle", "finish", "abandon", "doom", "belongs_to"}
"""What the package itself calls on a unit, and the stubs do not show."""


def test_every_argument_is_in_the_table() -> None:
    """A new public argument gets a row above."""
    found = {
        (name, parameter)
        for name, function in callables()
        if name.removeprefix("UnitOfWork.") not in LIFECYCLE
        for parameter in inspect.signature(function).parameters
        if parameter != "self"
    }
    assert found == set(ARGUMENTS) | GIVEN_BY_OTHERS


REMEDY = re.compile(r" must (be|hold) | correct the |\b(give|use|write|check|call) ")
COROUTINE_FUNCTIONS = r"transactional is for coroutine functions \(`async def`\)"


async def refused(call: Call, value: object) -> Exception | None:
    """Give a wrong value inside a unit of a fresh pair; returns the error."""
    inner = create_middleware_and_session_proxy(AsyncSession)
    outer = create_middleware_and_session_proxy(AsyncSession)
    outer[1].bind(idle_engine())
    pair = inner if "of_middleware" in call.__qualname__ else outer
    async with outer[1]():
        try:
            outcome = call(pair, value)
            if inspect.iscoroutine(outcome):
                await outcome
        except Exception as error:  # noqa: BLE001  # looked at by the tests
            return error
    return None


each_argument = pytest.mark.parametrize("place", ARGUMENTS, ids=" ".join)


@each_argument
async def test_wrong_values_are_refused(place: tuple[str, str]) -> None:
    """Values of wrong kinds raise at once, in one sentence that names the argument and the remedy."""
    argument = ARGUMENTS[place]
    for name in sorted(ANYTHING - argument.takes):
        error = await refused(argument.call, VALUES[name])
        assert isinstance(error, ConfigurationError | TypeError), name
        message, _, link = str(error).partition("\n")
        assert place[1].removesuffix("s") in message
        assert REMEDY.search(message) or re.match(COROUTINE_FUNCTIONS, message)
        assert message.endswith(".")
        assert link.startswith("(Background on") or isinstance(error, TypeError)


TOGETHER: dict[str, tuple[Callable[[Any, Any], object], str]] = {
    "a fallback that has no positions": (
        lambda db, _: db.after(POSITION, fallback=sqlite_db()),
        "^fallback is PostgreSQL's alone: leave it out for sqlite",
    ),
    "a fallback on the same engine": (
        lambda db, other: db.after(POSITION, fallback=bound_to(other, db.engine)),
        "^fallback must be the primary's proxy, which has a separate engine",
    ),
    "an unknown propagation in each task": (
        lambda db, _: db(multi_sessions=True, propagation=URLS["plain"]),
        "^propagation must be one of",
    ),
    "one database": (lambda db, _: atomic(*[db]), r"^atomic\(\) takes two databases.*: use `db\(\)` for one"),
    "a database twice": (lambda db, _: atomic(db, db), r"^atomic\(\) takes two databases or more"),
    "a database without two phases": (
        lambda db, _: atomic(db, sqlite_db()),
        "^sqlite has no two-phase commit: leave",
    ),
}
"""Calls with arguments that do not go together, or that nothing would look at, and what is said of them."""


def sqlite_db() -> SessionProxy[AsyncSession]:
    """Make a proxy of a database that has neither positions nor two phases."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    return bound_to(db, create_async_engine("sqlite+aiosqlite://"))


def bound_to(db: SessionProxy[AsyncSession], engine: AsyncEngine) -> SessionProxy[AsyncSession]:
    """Give a proxy an engine in place of its own."""
    db.unbind()
    db.bind(engine)
    return db


@pytest.mark.parametrize("case", TOGETHER)
def test_what_does_not_go_together_is_refused(case: str) -> None:
    """The error names the argument that cannot be had, before there is a unit."""
    call, match = TOGETHER[case]
    _, db = create_middleware_and_session_proxy(AsyncSession)
    _, other = create_middleware_and_session_proxy(AsyncSession)
    db.bind(idle_engine())
    other.bind(idle_engine())
    with pytest.raises(ConfigurationError, match=match) as error:
        call(db, other)
    assert leaks(error.value) == []


# Secrets.


PASSWORD, TOKEN = "S3CRET/pass word", "H1DDEN&token"
SECRETS = re.compile("S3CRET|H1DDEN|%53", re.IGNORECASE)
"""What must not be seen, plain or encoded; `%53` is an `S` that need not have been encoded."""
PASSWORDS = {"plain": "S3CRET", "encoded": quote(PASSWORD, safe=""), "over-encoded": "%533CRET"}
REST = f"127.0.0.1:1/database?token={quote(TOKEN)}"
URLS: dict[str, str] = {
    name: f"postgresql+asyncpg://user:{password}@{REST}" for name, password in PASSWORDS.items()
}


def misplaced(value: object) -> dict[str, object]:
    """Return a URL in the places where it may be put by mistake."""
    return {
        "as it is": value,
        "in a list": [value],
        "as 'url'": {"url": value},
        "as 'class_'": {"class_": value},
        "as 'isolation_level'": {"isolation_level": value},
        "as 'connect_args'": {"connect_args": value},
        "as 'binds'": {"binds": {"note": value}},
    }


def chain(error: BaseException) -> Iterator[BaseException]:
    """Follow an error's causes and contexts, those that a traceback does not show included."""
    seen: list[BaseException | None] = [None]
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or one in seen:
            continue
        seen.append(one)
        yield one
        waiting += [one.__cause__, one.__context__]


def shown(error: BaseException) -> str:
    """Return all that can be seen of an error."""
    parts = ["".join(traceback.format_exception(error))]
    for one in chain(error):
        parts += [str(one), repr(one), repr(one.args), repr(vars(one))]
    return "\n".join(parts)


def leaks(error: BaseException | None) -> list[str]:
    """Return the lines in which a secret is seen."""
    return [] if error is None else [line for line in shown(error).splitlines() if SECRETS.search(line)]


@pytest.mark.slow
async def test_misplaced_url_is_not_quoted() -> None:
    """A URL that is given as another argument by mistake is refused without its password and its query."""
    leaking: set[str] = set()
    for place, argument in ARGUMENTS.items():
        for kind, url in ((kind, url) for kind in (str, make_url) for url in URLS.values()):
            for where, value in misplaced(kind(url)).items():
                if place[1] in {"db_url", "url"} and where == "as it is":
                    continue  # the right place
                if leaks(await refused(argument.call, value)):
                    leaking.add(f"{' '.join(place)}, {kind.__name__} {where}")
    assert leaking == set()


DRIVERS = {
    "a synchronous driver": "mysql",
    "a driver that is not installed": "mssql+aioodbc",
    "an unknown dialect": "nosuch",
    "an unknown driver": "postgresql+nosuch",
    "SQLite": "sqlite",
    "a server for SQLite": "sqlite+aiosqlite",
}
ENGINE_ARGS: dict[str, dict[str, Any]] = {
    "an unknown key": {"pool_sise": 5},
    "a pool that is no class": {"poolclass": 3},
    "a wrong value": {"connect_args": 3},
    "an unknown plugin": {"plugins": ["nosuch"]},
    "an echo that is no level": {"echo": "yes"},
}


def refused_urls() -> Iterator[tuple[str, str | URL, dict[str, Any] | None]]:
    """Make URLs that are refused, or whose engine's arguments are, as texts and as objects."""
    for name, password in PASSWORDS.items():
        url = f"postgresql+asyncpg://user:{password}@{REST}"
        yield f"{name}, no port", url.replace(":1/", ":port/"), None
        yield f"{name}, no colon", url.replace("://", "//"), None
        yield f"{name}, a space", f" {url}".replace("+", " "), None
        for kind in (str, make_url):
            for driver, drivername in DRIVERS.items():
                yield f"{name}, {driver}", kind(url.replace("postgresql+asyncpg", drivername)), None
            for mistake, engine_args in ENGINE_ARGS.items():
                yield f"{name}, {mistake}", kind(url), engine_args


def test_refused_url_is_not_quoted() -> None:
    """A URL that is refused is not shown with its password or its query, in the error or behind it."""
    leaking: set[str] = set()
    for name, url, engine_args in refused_urls():
        middleware, db = create_middleware_and_session_proxy(AsyncSession)
        wrong: Any = engine_args
        for refuse in (
            partial(middleware, app, db_url=url, engine_args=wrong),
            partial(db.connect, url, engine_args=wrong),
        ):
            with pytest.raises(ConfigurationError, match=r"^(db_)?url|^engine_args do not fit") as error:
                refuse()
            if leaks(error.value):
                leaking.add(name)
    assert leaking == set()


@pytest.mark.parametrize("name", URLS)
@pytest.mark.parametrize("kind", [str, make_url])
async def test_no_repr_shows_a_secret(name: str, kind: Callable[[str], str | URL]) -> None:
    """All that stands for a database shows neither the password nor the query of its URL."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    instance = middleware(app, db_url=kind(URLS[name]), pool_warn_threshold=1)
    _, primary = create_middleware_and_session_proxy(AsyncSession)
    primary.bind(create_async_engine(kind(URLS[name].replace("/database", "/primary"))))
    gathering = db.gather(work())
    plain = db()
    scopes: list[object] = [
        plain,
        db(read_only=True, isolation_level="SERIALIZABLE", pool_timeout=1),
        db(propagation="nested"),
        db(multi_sessions=True, max_concurrent=2),
        db({"info": {}}),
        db.after(POSITION, fallback=primary, timeout=1),
        atomic(db, primary),
    ]
    things: list[object] = [middleware, instance, db, db.pool_status(), *scopes]
    things += [gathering, db.connection(timeout=1), db.task_group(), db.connect(kind(URLS[name]))]
    things += map(partial(getattr, db), ["_database", "_current"])
    async with plain as unit:
        session = unit.session
        things += [unit, session, session.sync_session, session.info, unit.savepoint()]
        for thing in things:
            assert not SECRETS.search(f"{thing!r} {thing}")
    gathering.close()
    for thing in things:
        assert not SECRETS.search(f"{thing!r} {thing}")


UNREACHABLE = {
    "the server refuses": "postgresql+asyncpg://user:{}@127.0.0.1:1/database?passfile=/H1DDEN",
    "the driver refuses the query": "postgresql+asyncpg://user:{}@127.0.0.1:1/database?token=H1DDEN",
    "MySQL": "mysql+aiomysql://user:{}@127.0.0.1:1/database?program_name=H1DDEN",
}


async def receive() -> Message:
    """Give the request's end."""
    return {"type": "http.request"}


async def fail() -> None:
    """Fail as a hook."""
    message = "boom"
    raise ValueError(message)


@pytest.mark.parametrize("name", UNREACHABLE)
@pytest.mark.parametrize("password", PASSWORDS)
async def test_unreachable_server(caplog: pytest.LogCaptureFixture, name: str, password: str) -> None:
    """A unit whose server is not there raises and logs no secret, at any level, wherever it is opened."""
    caplog.set_level(logging.DEBUG, "fastapi_async_sqlalchemy")
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    errors: list[BaseException] = []

    async def use() -> None:
        db.unit.on_rollback(fail)
        await db.session.execute(text("SELECT 1"))

    async def request(*_: object) -> None:
        await use()

    async def in_unit() -> None:
        async with db(commit_on_exit=True, pool_timeout=5):
            await use()

    async def in_group() -> None:
        async with db.task_group() as tasks:
            tasks.create_task(use())

    async def connection() -> None:
        async with db.connection():
            pytest.fail("there is no server")

    async def through_middleware() -> None:
        await instance({"type": "http", "path": "/"}, receive, request)

    instance = middleware(request, db_url=UNREACHABLE[name].format(PASSWORDS[password]))
    for run in (in_unit, in_group, connection, through_middleware, lambda: db.gather(use(), use())):
        with pytest.raises(Exception, match=r"\w") as error:
            await run()
        errors.append(error.value)
    await db.engine.dispose()
    assert "A hook of" in caplog.text
    assert logged_secrets(caplog) == []
    assert [line for one in errors for line in leaks(one)] == []


def logged_secrets(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was logged with a secret: messages, and lines of them with their errors."""
    logged = [record for record in caplog.records if record.name == "fastapi_async_sqlalchemy"]
    lines = [record.getMessage() for record in logged] + caplog.text.splitlines()
    return [line for line in lines if SECRETS.search(line)]


@pytest.mark.parametrize("name", UNREACHABLE)
@pytest.mark.parametrize("password", PASSWORDS)
async def test_two_unreachable_servers(caplog: pytest.LogCaptureFixture, name: str, password: str) -> None:
    """A replica and its primary, and a transaction of both, raise and log no secret either."""
    caplog.set_level(logging.DEBUG, "fastapi_async_sqlalchemy")
    url = UNREACHABLE[name].format(PASSWORDS[password])
    _, replica = create_middleware_and_session_proxy(AsyncSession, read_only=True)
    _, primary = create_middleware_and_session_proxy(AsyncSession)
    replica.bind(create_async_engine(url))
    primary.bind(create_async_engine(url.replace("/database", "/primary")))

    async def read() -> None:
        async with replica.after(POSITION, timeout=5, fallback=primary) as unit:
            await unit.session.execute(text("SELECT 1"))

    async def write() -> None:
        async with atomic(primary, replica):
            await primary.session.execute(text("SELECT 1"))

    async def recover() -> None:
        await recovery.recover(primary.engine, replica.engine)

    for run in (read, write, recover, primary.commit_position):
        with pytest.raises(Exception, match=r"\w") as error:
            await run()
        assert leaks(error.value) == []
    await replica.engine.dispose()
    await primary.engine.dispose()
    assert ("its primary is instead" in caplog.text) == (name != "MySQL")
    assert logged_secrets(caplog) == []


@pytest.mark.parametrize("name", UNREACHABLE)
def test_recovery_of_an_unreachable_server(capsys: pytest.CaptureFixture[str], name: str) -> None:
    """The command that finishes what a crash left names a server that it cannot ask, and shows no secret."""
    url = UNREACHABLE[name].format("S3CRET")
    arguments = [
        url.replace("/database", place) for place in ("/a", "/b")
    ]  # a traceback shows the call itself
    with pytest.raises(SystemExit, match=r"^1$") as error:
        recovery.main(arguments)
    assert leaks(error.value) == []
    seen = "".join(capsys.readouterr())
    assert f"{place_of(make_url(arguments[0]))}: " in seen
    assert not SECRETS.search(seen)


def test_recovery_refuses_in_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake on its command line is told as such, without a traceback and without a secret."""
    monkeypatch.setenv("REFUSED_DATABASE", URLS["plain"].replace("postgresql+asyncpg", "mysql"))
    mistakes = {
        "url: no driver of 'mysql'": ["env:REFUSED_DATABASE"],
        "the environment has no 'NO_SUCH_DATABASE'": ["env:NO_SUCH_DATABASE"],
        "engines must be all databases of the transactions": [URLS["plain"]],
        "older_than must be a finite number above 0": ["--older-than", "0", URLS["plain"], f"{GOOD}_2"],
        "argument --older-than": ["--older-than", "soon", URLS["plain"], f"{GOOD}_2"],
    }
    for told, arguments in mistakes.items():
        with pytest.raises(SystemExit, match=r"^2$") as error:
            recovery.main(arguments)
        seen = "".join(capsys.readouterr())
        assert told in seen
        assert not SECRETS.search(seen)
        assert leaks(error.value) == []
