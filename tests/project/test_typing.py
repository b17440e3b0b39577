"""The static contract cannot drift: from the sources, from SQLAlchemy, or from what is asserted of it."""

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_overloads, get_type_hints

import pytest
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

import fastapi_async_sqlalchemy
from fastapi_async_sqlalchemy import (
    EngineArgs,
    SessionArgs,
    exceptions,
    middleware,
    opentelemetry,
    recovery,
    testing,
)
from tests.support.declarations import classes, declared, drift, spelled

FOLDER = Path(fastapi_async_sqlalchemy.__file__).parent
STUBS = {
    path.parent.name if path.parent != FOLDER and path.stem == "__init__" else path.stem: ast.parse(
        path.read_text("utf-8")
    )
    for path in FOLDER.rglob("*.pyi")
}
SOURCES = {
    ".".join(path.relative_to(FOLDER).with_suffix("").parts): ast.parse(path.read_text("utf-8"))
    for path in FOLDER.rglob("*.py")
    if not path.stem.startswith("__") or path.parent == FOLDER
}
INFERRED = {
    "db",
    *(f"Observed{kind}.__init__" for kind in ("Pool", "Transaction", "Unit")),
    "PoolStatus.__init__",
    "Sandbox.__init__",
    "Resolved.__init__",
    "SessionProxy.__init__",
    "UnitOfWork.__init__",
    "UnitStats.__init__",
    "UnitTaskGroup.__init__",
    "atomic",
    "recover",
    "SessionProxy.dependency",
    "SessionProxy.gather",
    "SessionProxy.unit_dependency",
    *(f"T{number}" for number in range(1, 7)),
    *(f"ModelSession.{name}" for name in ("add", "add_all", "delete", "refresh", "expunge", "expire")),
    *("ModelSession.get", "ModelSession.get_one", "_Entity", "_Entity.__call__", "B", "B_co", "M", "M_co"),
}
"""What the sources do not write out: what is assigned, what attrs makes, the overloads of each arity, that
FastAPI gives a dependency its parameter, that two databases are the least, and the methods of SQLAlchemy's
that a `ModelSession` narrows for type checkers."""
ASSERTED = (Path(__file__).parent.parent.parent / "typing_tests/inferred.py").read_text("utf-8")
REFUSED = (Path(__file__).parent.parent.parent / "typing_tests/refused.py").read_text("utf-8")


def test_stubs_and_sources_declare_the_same() -> None:
    """What type checkers are told of every public class, function, key and alias is what the sources say."""
    assert drift(list(STUBS.values()), list(SOURCES.values())) == INFERRED


STUB = """
Rule: TypeAlias = Callable[[int], bool]
Place = NewType("Place", str)
class Args(TypedDict, total=False):
    echo: bool
class Unit(Generic[_S_co]):
    app: App
    def __init__(self, app: App) -> None: ...
    @property
    def opened(self) -> _S_co | None: ...
    @property
    def session(self) -> _S_co: ...
    async def commit(self, *, force: bool = False) -> None: ...
def make(kind: type[_S_co] | None = None) -> Unit[_S_co]: ...
"""
SOURCE = '''
Rule: TypeAlias = Callable[[int], bool]
"""A rule."""
Place = NewType("Place", str)
class Args(TypedDict, total=False):
    """Arguments."""
    echo: bool
class Lifecycle(Generic[S_co]):
    opened: S_co | None = None
class Unit(Lifecycle[S_co]):
    def __init__(self, app: App) -> None:
        self.app = app
    @property
    def session(self) -> S_co:
        return self.opened
    async def commit(self, *, force: bool = False) -> None:
        await self.session.commit()
def make(kind: type[S_co] | None = None) -> Unit[S_co]:
    return Unit()
'''
CHANGES = {
    "async turned sync": ("async def commit", "def commit", "Unit.commit"),
    "a keyword renamed": ("force: bool", "forced: bool", "Unit.commit"),
    "keyword only no more": ("*, force", "force", "Unit.commit"),
    "a default changed": ("bool = False", "bool = True", "Unit.commit"),
    "a default lost": ("kind: type[S_co] | None = None", "kind: type[S_co] | None", "make"),
    "a parameter's type": ("kind: type[S_co] | None", "kind: type[S_co]", "make"),
    "a return type": ("-> Unit[S_co]", "-> Unit[Session]", "make"),
    "a property turned method": ("    @property\n", "", "Unit.session"),
    "an attribute's type": ("opened: S_co | None", "opened: S_co", "Unit.opened"),
    "the type of what __init__ sets": ("self, app: App", "self, app: Starlette", "Unit.app"),
    "a key's type": ("echo: bool", "echo: str", "Args.echo"),
    "a new key": ("    echo: bool\n", "    echo: bool\n    pool: Pool\n", "Args.pool"),
    "a key lost": ("    echo: bool\n", "", "Args.echo"),
    "a base": ("Args(TypedDict", "Args(dict[str, Any]", "Args"),
    "a hidden base's base": ("Lifecycle(Generic[S_co])", "Lifecycle(Base)", "Unit"),
    "a new type": ('NewType("Place", str)', 'NewType("Place", int)', "Place"),
    "a new type turned alias": ('Place = NewType("Place", str)', "Place: TypeAlias = str", "Place"),
    "an alias": ("Callable[[int], bool]", "Callable[[str], bool]", "Rule"),
    "a new method": ("def make", "    def close(self) -> None: ...\ndef make", "Unit.close"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_drift_is_seen(change: str) -> None:
    """The comparison finds each kind of change that a source alone may go through."""
    old, new, name = CHANGES[change]
    assert drift([ast.parse(STUB)], [ast.parse(SOURCE)]) == set()
    assert SOURCE.count(old) == 1
    assert name in drift([ast.parse(STUB)], [ast.parse(SOURCE.replace(old, new))])


def test_every_public_module_has_a_stub_with_its_names() -> None:
    """A stub lists in `__all__` what its module does, and the wheel says that it is typed."""
    modules = {
        "__init__": fastapi_async_sqlalchemy,
        "exceptions": exceptions,
        "middleware": middleware,
        "opentelemetry": opentelemetry,
        "recovery": recovery,
        "testing": testing,
    }
    public = {name for name in SOURCES if not re.search(r"(^|\.)_[a-z]", name)}
    assert modules.keys() == STUBS.keys() == public | {"testing"}
    for name, module in modules.items():
        assert dunder_all(STUBS[name]) == module.__all__
    assert (FOLDER / "py.typed").is_file()


def dunder_all(tree: ast.Module) -> object:
    """Read what a stub lists in `__all__`."""
    [listed] = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and spelled(node.targets[0]) == "__all__"
    ]
    return ast.literal_eval(listed)


NOT_IN_ENGINE_ARGS = {
    "convert_unicode": "typed still, but no dialect takes it any more",
    "empty_in_strategy": "no longer used, SQLAlchemy says",
    "future": "must be True, which is its default",
}
NOT_IN_SESSION_ARGS = {
    "autocommit": "must be False, which is its default",
    "bind": "the engine is the pair's",
    "future": "must be True, which is its default",
}
NOT_IN_EVERY_SQLALCHEMY = {
    EngineArgs: {"skip_autocommit_rollback": "since 2.0.43"},
    SessionArgs: {
        "execution_options": "since 2.1",
        "class_": "the pair's session class, as of async_sessionmaker",
    },
}


def documented(*functions: Callable[..., object]) -> set[str]:
    """Name the keywords that functions document: by `:param name:`, by `:param name=default:`, or typed."""
    names: set[str] = set()
    for function in functions:
        names |= set(re.findall(r"^ *:param (\w+)(?:=[^:\n]*)?:", function.__doc__ or "", re.MULTILINE))
        for typed in (function, *get_overloads(function)):
            parameters = inspect.signature(typed).parameters.values()
            names |= {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    return names


def test_engine_args_are_those_of_sqlalchemy() -> None:
    """`EngineArgs` has each keyword that `create_async_engine()` documents, and no other."""
    theirs, ours = documented(create_engine, create_async_engine), EngineArgs.__annotations__.keys()
    assert theirs - ours <= NOT_IN_ENGINE_ARGS.keys()
    assert ours - theirs <= NOT_IN_EVERY_SQLALCHEMY[EngineArgs].keys()
    assert not ours & NOT_IN_ENGINE_ARGS.keys()


def test_session_args_are_those_of_sqlalchemy() -> None:
    """`SessionArgs` has each keyword that `Session` and `AsyncSession` document, `class_`, and no other."""
    theirs, ours = documented(Session.__init__, AsyncSession.__init__), SessionArgs.__annotations__.keys()
    assert theirs - ours <= NOT_IN_SESSION_ARGS.keys()
    assert ours - theirs <= NOT_IN_EVERY_SQLALCHEMY[SessionArgs].keys()
    assert not ours & NOT_IN_SESSION_ARGS.keys()


@pytest.mark.parametrize("arguments", [EngineArgs, SessionArgs])
def test_arguments_can_be_read_at_run_time(arguments: type) -> None:
    """Whoever asks for the types of the keyword arguments, as libraries for settings do, is given them."""
    assert get_type_hints(arguments).keys() == arguments.__annotations__.keys()


def calls(program: str) -> Iterator[tuple[str, ast.Call]]:
    """Find a program's calls, each with the last name of what it calls: `connect` of `db.connect(url)`."""
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.Call):
            yield spelled(node.func).rpartition(".")[2], node


def test_every_public_name_is_asserted() -> None:
    """Each name of an `__all__`, and each member of its classes, is in an `assert_type` of inferred.py."""
    asserted: set[str] = set()
    for called, call in calls(ASSERTED):
        if called == "assert_type":
            asserted |= set(re.findall(r"\w+", " ".join(map(spelled, call.args))))
    holders = [node for node in classes(STUBS.values()).values() if not is_typed_dict(node)]
    members = {name for node in holders for name in declared(node.body) if not name.startswith("_")}
    assert {
        *fastapi_async_sqlalchemy.__all__,
        *opentelemetry.__all__,
        *recovery.__all__,
        *testing.__all__,
        *members,
    } - asserted == set()


def is_typed_dict(node: ast.ClassDef) -> bool:
    """Whether a class is one of keyword arguments."""
    return "TypedDict" in map(spelled, node.bases)


CALLED = {
    "SandboxedApp.__call__": "sandboxed",
    "SessionProxy.__call__": "db",
    "SQLAlchemyMiddleware.__call__": "middleware",
}
"""What one calls in refused.py, where it is no method and no class."""


def public_keywords() -> Iterator[tuple[str, str]]:
    """Name each parameter of each public function, and each key of a TypedDict, with what one calls."""
    for tree in STUBS.values():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and is_typed_dict(node):
                yield from ((node.name, key) for key in declared(node.body))
            elif isinstance(node, ast.ClassDef):
                for method in node.body:
                    if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef):
                        name = node.name if method.name == "__init__" else method.name
                        yield from parameters(CALLED.get(f"{node.name}.{name}", name), method.args)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from parameters(node.name, node.args)


def parameters(called: str, arguments: ast.arguments) -> Iterator[tuple[str, str]]:
    """Name each parameter of a function, with what one calls."""
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        if argument.arg != "self":
            yield called, argument.arg


def test_every_keyword_has_a_mistake() -> None:
    """Each keyword of each public function is in a line of refused.py that both checkers refuse."""
    lines = REFUSED.splitlines()
    mistaken: set[tuple[str, str | None]] = set()
    for called, call in calls(REFUSED):
        if re.search(r"# type: ignore\[.+\]  # pyright: ignore\[.+\]$", lines[call.lineno - 1]):
            through_starlette = called in {"add_middleware", "Middleware"}
            name = spelled(call.args[0]) if through_starlette else called
            mistaken |= {(name, keyword.arg) for keyword in call.keywords}
    assert set(public_keywords()) - mistaken == set()
