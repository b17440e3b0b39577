"""The layout of the package, read from its syntax trees: who may import whom, and what a room may hold."""

import ast
import logging
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NewType, TypeVar

import pytest
from typing_extensions import TypeVar as TypeVarWithDefault

import fastapi_async_sqlalchemy
from fastapi_async_sqlalchemy._transaction import TransactionSettings

PACKAGE = "fastapi_async_sqlalchemy"
ROOMS = (
    "_pool_status",
    "exceptions",
    "_arguments",
    "_options",
    "_pool",
    "_hooks",
    "_transaction",
    "_streams",
    "_statements",
    "_session_state",
    "_session",
    "_ending",
    "_observer",
    "_database",
    "_lifecycle",
    "_unit",
    "_task_units",
    "_context",
    "_replica",
    "_transactional",
    "_concurrency",
    "_proxy",
    "_admission",
    "_request",
    "middleware",
    "_atomic",
    "recovery",
    "testing",
    "__init__",
)
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
)
LONGEST_FUNCTION = 45
LONGEST_MODULE = 420

FOLDER = Path(fastapi_async_sqlalchemy.__file__).parent
SOURCES = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.py"))}
TREES = {room: ast.parse(source) for room, source in SOURCES.items()}
every_room = pytest.mark.parametrize("room", TREES)
public_room = pytest.mark.parametrize("room", [room for room in TREES if not re.match(r"_[a-z]", room)])


def test_every_room_has_its_place() -> None:
    """A new module is put into the order of the rooms, and none lies in a folder below."""
    assert set(TREES) <= set(ROOMS)
    assert [path for path in FOLDER.rglob("*.py") if path.parent != FOLDER] == []


def imported_rooms(tree: ast.Module) -> Iterator[str]:
    """Name the rooms that a module imports, wherever in it and for whichever purpose."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith(PACKAGE)):
            source = f"{PACKAGE}.{node.module}" if node.level and node.module else node.module or PACKAGE
            names = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == PACKAGE:
                room = rest.partition(".")[0]
                yield room if room in TREES else "__init__"


@every_room
def test_room_imports_only_from_rooms_above(room: str) -> None:
    """Data flows one way, so that no two rooms import each other, for type checkers neither."""
    above = ROOMS[: ROOMS.index(room)]
    assert set(imported_rooms(TREES[room])) <= set(above)


def public_definitions(tree: ast.Module) -> set[str]:
    """Name the public classes and functions that a module defines."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")}


@public_room
def test_all_is_sorted(room: str) -> None:
    """A public module lists its names in order, each once."""
    names = import_module(f"{PACKAGE}.{room}").__all__
    assert names == sorted(set(names))


@public_room
def test_all_is_exact(room: str) -> None:
    """A public module lists what it defines, the proxy of the default pair, and nothing else."""
    tree = TREES[room]
    expected = public_definitions(tree)
    if room == "middleware":
        expected.add("db")
    if room == "__init__":
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        expected |= {alias.asname or alias.name for node in imports for alias in node.names}
    assert set(import_module(f"{PACKAGE}.{room}").__all__) == expected


@pytest.mark.parametrize("room", ["exceptions", "middleware"])
def test_package_offers_all_that_its_public_modules_do(room: str) -> None:
    """What a public module lists can be imported from the package itself, as the same object."""
    module = import_module(f"{PACKAGE}.{room}")
    for name in module.__all__:
        assert getattr(fastapi_async_sqlalchemy, name) is getattr(module, name)


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


@every_room
def test_module_holds_no_mutable_state(room: str) -> None:
    """At the top level of a module there are constants and loggers, and the default pair once."""
    module = import_module(f"{PACKAGE}.{room}")
    names = set(module_variables(TREES[room])) - {"__all__"} - DEFAULT_PAIR.get(room, set())
    assert [name for name in names if not isinstance(getattr(module, name), IMMUTABLE)] == []


@every_room
def test_no_function_assigns_a_global(room: str) -> None:
    """What a module holds stays as it was imported."""
    assert [node.names for node in ast.walk(TREES[room]) if isinstance(node, ast.Global)] == []


def documented(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines of a docstring."""
    return len((ast.get_docstring(function) or "").splitlines())


@every_room
def test_functions_are_short(room: str) -> None:
    """A function fits on a screen, its docstring aside, and defines no class."""
    functions = [
        node for node in ast.walk(TREES[room]) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 - documented(node) for node in functions}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}
    inner = [node for function in functions for node in ast.walk(function)]
    assert [node.name for node in inner if isinstance(node, ast.ClassDef)] == []


@every_room
def test_modules_are_short(room: str) -> None:
    """A module can be read in one sitting."""
    assert len(SOURCES[room].splitlines()) <= LONGEST_MODULE
