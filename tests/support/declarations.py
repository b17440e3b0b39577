"""What stubs and sources declare, read from their syntax trees, and where the two differ."""

import ast
import re
from collections.abc import Iterable

Declarations = dict[str, str]
"""Each name with what is declared of it, such as `SessionProxy.session` with `read-only S_co`."""
Classes = dict[str, ast.ClassDef]

PUBLIC_DUNDERS = {"__init__", "__call__"}


def spelled(node: ast.AST) -> str:
    """Write a node in one spelling: the `_S_co` of a stub is the `S_co` of the sources."""
    return re.sub(r"\b_(?=(?:S_co|B_contra|F|T)\b)", "", ast.unparse(node))


def function(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Tell a function's decorators, async-ness, parameters, defaults and result; a property's result."""
    result = spelled(node.returns) if node.returns else "nothing declared"
    decorators = [f"@{spelled(decorator)}" for decorator in node.decorator_list]
    if decorators == ["@property"] and isinstance(node, ast.FunctionDef):
        return f"read-only {result}"
    kind = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return f"{' '.join(decorators)} {kind}({spelled(node.args)}) -> {result}".lstrip()


def attributes(init: ast.FunctionDef) -> Declarations:
    """Find what `__init__` sets: with an annotation, or to a parameter that has one."""
    parameters = {node.arg: node.annotation for node in ast.walk(init) if isinstance(node, ast.arg)}
    found: Declarations = {}
    for statement in init.body:
        match statement:
            case ast.AnnAssign(target=ast.Attribute(attr=name), annotation=annotation):
                found[name] = spelled(annotation)
            case ast.Assign(targets=[ast.Attribute(attr=name)], value=ast.Name(id=value)):
                annotation_of_value = parameters.get(value)
                found[name] = spelled(annotation_of_value) if annotation_of_value else "nothing declared"
            case _:
                pass
    return found


def declared(body: Iterable[ast.stmt]) -> Declarations:
    """Tell what a module or a class declares, classes aside; overloads stand for their implementation."""
    found: Declarations = {}
    for statement in body:
        match statement:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                overloads, text = found.get(name, ""), function(statement)
                if not overloads.startswith("@overload"):
                    found[name] = text
                elif text.startswith("@overload"):
                    found[name] = f"{overloads}\n{text}"
                if name == "__init__" and isinstance(statement, ast.FunctionDef):
                    found = attributes(statement) | found
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=value):
                is_alias = spelled(annotation) == "TypeAlias"
                found[name] = spelled(value if is_alias and value else annotation)
            case ast.Assign(
                targets=[ast.Name(id=name)], value=ast.Call(func=ast.Name(id="TypeVar" | "NewType")) as value
            ):
                found[name.lstrip("_")] = spelled(value)
            case _:
                pass
    return found


def classes(trees: Iterable[ast.Module]) -> Classes:
    """Find the classes of modules by their names."""
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def inherited(node: ast.ClassDef, hidden: Classes) -> tuple[list[str], Declarations]:
    """Tell a class's bases and members; a hidden base stands for its own bases and lends its members."""
    bases: list[str] = []
    members: Declarations = {}
    for base in map(spelled, node.bases):
        parent = hidden.get(base.partition("[")[0])
        lent = ([base], dict[str, str]()) if parent is None else inherited(parent, hidden)
        bases += lent[0]
        members |= lent[1]
    return bases, members | declared(node.body)


def declarations(trees: list[ast.Module], hidden: Classes) -> Declarations:
    """Tell what modules declare, members by their class's name."""
    found: Declarations = {}
    for tree in trees:
        found |= declared(tree.body)
    for name, node in classes(trees).items():
        bases, members = inherited(node, hidden)
        found[name] = f"class({', '.join([*bases, *map(spelled, node.keywords)])})"
        found |= {f"{name}.{member}": text for member, text in members.items()}
    return found


def drift(stubs: list[ast.Module], sources: list[ast.Module]) -> set[str]:
    """Name what stubs and sources declare differently, and public members that the stubs lack."""
    public = classes(stubs).keys()
    hidden = {name: node for name, node in classes(sources).items() if name not in public}
    promised, kept = declarations(stubs, {}), declarations(sources, hidden)
    own = {
        f"{name}.{member}"
        for name, node in classes(sources).items()
        if name in public
        for member in declared(node.body)
        if member in PUBLIC_DUNDERS or not member.startswith("_")
    }
    # a property in the stub may be a plain attribute that nobody outside should set
    return (own - promised.keys()) | {
        name
        for name, text in promised.items()
        if kept.get(name) not in {text, text.removeprefix("read-only ")}
    }
