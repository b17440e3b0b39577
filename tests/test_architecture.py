"""The layout of the package, read from its syntax trees: who may import whom, and what a module may hold."""

import ast
import logging
import re
from collections.abc import Iterator
from enum import Enum
from importlib import import_module
from pathlib import Path
from types import FunctionType, MappingProxyType
from typing import NewType, TypeVar

import pytest
from sqlalchemy import TextClause
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from typing_extensions import TypeVar as TypeVarWithDefault

import fastapi_async_sqlalchemy
from fastapi_async_sqlalchemy._dialects.begin import TransactionSettings
from fastapi_async_sqlalchemy._session.ledger import Ledger

PACKAGE = "fastapi_async_sqlalchemy"
STOREYS = (
    "__init__",
    "testing",
    "middleware",
    "recovery",
    "opentelemetry",
    "_proxy",
    "_tasks",
    "_web",
    "_cluster",
    "_unit",
    "_session",
    "_telemetry",
    "_dialects",
    "_arguments",
    "exceptions",
    "_pool_status",
)
"""From the top down; imports go down this list only."""
STRANGERS = {("_tasks", "_web"), ("_web", "_cluster")}
"""Storeys that do not know each other although one lies above the other."""
STARLETTE = {"middleware", "_web", "_proxy"}
"""Where Starlette is imported at run time; in `_proxy` for one annotation that FastAPI reads."""
DRIVERS = {
    "asyncpg",
    "psycopg",
    "aiosqlite",
    "aiomysql",
    "asyncmy",
    "postgresql",
    "mysql",
    "mariadb",
    "sqlite",
}
NAMES_DIALECTS = {"_dialects", "_cluster"}
FOREIGN = {
    "_max_overflow": "Pool: the limit of its overflow has no public name",
    "_on_connect_isolation_level": "Dialect: what create_engine(isolation_level=) was given",
    "_soft_closed": "Result: Result.closed reports an explicit close() alone",
    "_flushing": "Session: whether a flush is under way, in which nothing may be added",
    "_is_clean": "Session: the public sets take thirty times as long to make",
    "_execute_mutex": "asyncpg's adapter: whether a statement is under way on a connection",
    "_handle_exception": "asyncpg's adapter: makes SQLAlchemy's error of one of asyncpg's",
    "_writer": "connections of aiomysql: the socket that the server may have closed",
    "_stream_broken": "connections of asyncmy: whether the server has closed the socket",
    "_loop": "connections of asyncpg, aiomysql and asyncmy: the event loop that they serve",
    "_sa_adapter": "instrumented collections: whether a value is one",
    "_real_result": "ScalarResult: the result whose rows it fetches",
    "_all_registries": "sqlalchemy.orm: a Table does not know the models that map it, and no list is public",
    "_connections": "SessionTransaction: `connections` is new in SQLAlchemy 2.1.7",
}
"""Private names of other packages, each with the reason."""
SESSIONS = {"session", "sync_session", "opened", "_watched", "watched"}
"""How the package calls its variables and attributes that are sessions."""
CALLED_ON_SESSIONS = {
    *("commit", "rollback", "flush", "get_bind"),  # extension points: a user's override is meant to be called
    *("identity_map", "hash_key", "twophase"),  # SQLAlchemy could not work without its own
}
"""The public names of a session that are looked up on it; `_session/plain.py` has what others mean."""
DEFAULT_PAIR = {"middleware": {"_default_database", "_default_current", "db"}}
IMMUTABLE = (
    str,
    int,
    float,
    tuple,
    frozenset,
    re.Pattern,
    NewType,
    logging.Logger,
    TypeVar,
    TypeVarWithDefault,
    TransactionSettings,
    Ledger,  # BLANK, which is never written into
    Enum,
    TextClause,
    type,
    FunctionType,
    MappingProxyType,
)
LONGEST_FUNCTION = 45
LONGEST_MODULE = 350

FOLDER = Path(fastapi_async_sqlalchemy.__file__).parent
SOURCES = {
    ".".join(path.relative_to(FOLDER).with_suffix("").parts): path.read_text()
    for path in sorted(FOLDER.rglob("*.py"))
}
TREES = {module: ast.parse(source) for module, source in SOURCES.items()}
every_module = pytest.mark.parametrize("module", TREES)
public_module = pytest.mark.parametrize(
    "module", [name for name in TREES if not re.search(r"(^|\.)_[a-z]", name)]
)


def storey(module: str) -> str:
    """Name the storey of a module."""
    return module.partition(".")[0]


def imported_modules(module: str, *, at_run_time: bool = False) -> Iterator[str]:
    """Name the package's modules that one imports, also for type checkers alone unless asked otherwise."""
    tree: ast.AST = TREES[module]
    skipped = set[ast.AST]()
    if at_run_time:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                skipped |= {inner for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if node in skipped or not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            folder = [*module.split("."), "x"][: -node.level - 1] if "." in module else []
            yield from found([*folder, *(node.module or "").split(".")], node)
        elif (node.module or "").startswith(PACKAGE):
            yield from found((node.module or "").split(".")[1:], node)


def found(parts: list[str], node: ast.ImportFrom) -> Iterator[str]:
    """Name the module, or modules, that an import statement means."""
    name = ".".join(part for part in parts if part)
    if name in TREES:
        yield name
        return
    for alias in node.names:
        inner = f"{name}.{alias.name}" if name else alias.name
        yield inner if inner in TREES else name or "__init__"


def imported_packages(module: str) -> Iterator[str]:
    """Name other packages that a module imports at run time."""
    for node in TREES[module].body:
        if isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").partition(".")[0]
        elif isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)


def test_every_module_has_its_storey() -> None:
    """A new module or folder is put into the order of the storeys; folders hold no folders."""
    assert {storey(module) for module in TREES} <= set(STOREYS)
    assert [module for module in TREES if module.count(".") > 1] == []


def test_every_storey_says_what_it_holds() -> None:
    """The door of a storey is one sentence, and nothing else."""
    doors = [tree for module, tree in TREES.items() if re.match(r"_\w+\.__init__$", module)]
    assert len(doors) > 0
    assert [len(tree.body) for tree in doors] == [1] * len(doors)
    assert all((ast.get_docstring(tree) or "").endswith(".") for tree in doors)


@every_module
def test_imports_go_down(module: str) -> None:
    """A storey knows those below it, for type checkers neither more nor less than at run time."""
    own = STOREYS.index(storey(module))
    known = {storey(one) for one in imported_modules(module)} - {storey(module)}
    assert [one for one in known if STOREYS.index(one) < own] == []
    assert {(storey(module), one) for one in known} & STRANGERS == set()


def test_no_circle_inside_a_storey() -> None:
    """Modules of one storey form no circle at run time."""
    edges = {module: set(imported_modules(module, at_run_time=True)) for module in TREES}
    while leaves := [module for module, known in edges.items() if not known & set(edges)]:
        for leaf in leaves:
            del edges[leaf]
    assert sorted(edges) == []


@every_module
def test_frameworks_are_known_at_the_edge_alone(module: str) -> None:
    """Starlette is imported by the storeys that face the web, FastAPI by none."""
    packages = set(imported_packages(module))
    assert "fastapi" not in packages
    assert "starlette" not in packages or storey(module) in STARLETTE


@every_module
def test_dialects_are_named_in_two_storeys(module: str) -> None:
    """What a database or a driver does differently is asked in one place."""
    if storey(module) in NAMES_DIALECTS:
        return
    words = {node.value for node in ast.walk(TREES[module]) if isinstance(node, ast.Constant)}
    assert words & DRIVERS == set()


def own_names() -> set[str]:
    """Name what the package defines, as attributes, functions, classes or variables."""
    names = set[str]()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.AnnAssign):
                names.add(ast.unparse(node.target).rpartition(".")[2])
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    names |= {
                        ast.unparse(one).rpartition(".")[2]
                        for one in ast.walk(target)
                        if isinstance(one, (ast.Name, ast.Attribute))
                    }
    return names


def test_private_names_of_others_are_listed() -> None:
    """Whoever uses a private name of another package adds it to the list, with the reason."""
    used = {
        node.attr
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr)
    }
    quoted = {
        str(node.value)
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and re.fullmatch(r"_[a-z][a-z_]*", str(node.value))
    }
    imported = {
        alias.name
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and not node.level
        for alias in node.names
        if alias.name.startswith("_")
    }
    assert (used | quoted | imported) - own_names() == set(FOREIGN)


def test_sessions_are_asked_plainly() -> None:
    """Only names that a user's session class cannot give another meaning are looked up on a session."""
    public = {name for name in [*dir(AsyncSession), *vars(Session()), *dir(Session)] if name[0] != "_"}
    used = {
        node.attr
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).rpartition(".")[2] in SESSIONS
        if storey(module) != "testing"  # where a connection is called `opened`
    }
    assert used & public == CALLED_ON_SESSIONS


def public_definitions(tree: ast.Module) -> set[str]:
    """Name the public classes and functions that a module defines."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")}


@public_module
def test_all_is_sorted(module: str) -> None:
    """A public module lists its names in order, each once."""
    names = import_module(f"{PACKAGE}.{module.removesuffix('.__init__')}").__all__
    assert names == sorted(set(names))


@public_module
def test_all_is_exact(module: str) -> None:
    """A public module lists what it defines, the proxy of the default pair, and nothing else."""
    tree = TREES[module]
    expected = public_definitions(tree)
    if module == "middleware":
        expected.add("db")
    if module.endswith("__init__"):
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        expected |= {alias.asname or alias.name for node in imports for alias in node.names}
    assert set(import_module(f"{PACKAGE}.{module.removesuffix('.__init__')}").__all__) == expected


@pytest.mark.parametrize("module", ["exceptions", "middleware"])
def test_package_offers_all_that_its_public_modules_do(module: str) -> None:
    """What a public module lists can be imported from the package itself, as the same object."""
    public = import_module(f"{PACKAGE}.{module}")
    for name in public.__all__:
        assert getattr(fastapi_async_sqlalchemy, name) is getattr(public, name)


def module_variables(tree: ast.Module) -> Iterator[str]:
    """Name what a module assigns at its top level, type aliases aside."""
    for statement in tree.body:
        if isinstance(statement, ast.AnnAssign):
            if ast.unparse(statement.annotation) == "TypeAlias":
                continue
            targets: list[ast.expr] = [statement.target]
        elif isinstance(statement, ast.Assign):
            targets = statement.targets
        else:
            continue
        for target in targets:
            yield from (node.id for node in ast.walk(target) if isinstance(node, ast.Name))


@every_module
def test_module_holds_no_mutable_state(module: str) -> None:
    """At the top level of a module there are constants and loggers, and the default pair once."""
    imported = import_module(f"{PACKAGE}.{module}")
    names = set(module_variables(TREES[module])) - {"__all__"} - DEFAULT_PAIR.get(module, set())
    assert [name for name in names if not isinstance(getattr(imported, name), IMMUTABLE)] == []


@every_module
def test_no_function_assigns_a_global(module: str) -> None:
    """What a module holds stays as it was imported."""
    assert [node.names for node in ast.walk(TREES[module]) if isinstance(node, ast.Global)] == []


@every_module
def test_log_records_have_their_fields(module: str) -> None:
    """Whoever logs gives the fields that every record has."""
    calls = [
        node
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "logger"
    ]
    assert [call.lineno for call in calls if "extra" not in {one.arg for one in call.keywords}] == []


def documented(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines of a docstring."""
    return len((ast.get_docstring(function) or "").splitlines())


@every_module
def test_functions_are_short(module: str) -> None:
    """A function fits on a screen, its docstring aside, and defines no class."""
    functions = [
        node for node in ast.walk(TREES[module]) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 - documented(node) for node in functions}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}
    inner = [node for function in functions for node in ast.walk(function)]
    assert [node.name for node in inner if isinstance(node, ast.ClassDef)] == []


@every_module
def test_modules_are_short(module: str) -> None:
    """A module can be read in one sitting."""
    assert len(SOURCES[module].splitlines()) <= LONGEST_MODULE
