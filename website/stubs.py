"""A griffe extension: names are as the stubs declare them, and described as the code describes them.

griffe merges a stub into the code of the same module only. Here classes are written in private modules, with
methods of private bases, and are declared where they are public.
"""

from pathlib import Path
from typing import Any

import griffe
from typing_extensions import override

CODE = Path(__file__).parent.parent / "src"


class CodesDocstrings(griffe.Extension):
    """Give the names of a package of stubs the docstrings of its code."""

    @override
    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        if not str(pkg.filepath).endswith(".pyi"):
            return
        code = griffe.load(pkg.path, search_paths=[CODE], resolve_aliases=True)
        for module in (pkg, *pkg.modules.values()):
            prepare(module)
            for name in module.exports or ():
                declared = module[str(name)]
                written = code.modules_collection[module.path].members.get(str(name))
                if written is not None and not declared.is_alias:
                    describe(declared, written.final_target if written.is_alias else written, loader)


def prepare(parent: griffe.Object | griffe.Alias) -> None:
    """Make a member of each function that has overloads only; drop constructors that nobody may call."""
    if isinstance(parent, griffe.Module | griffe.Class):
        for name, overloads in parent.overloads.items():
            if overloads and name not in parent.members:
                first = overloads[0]
                function = griffe.Function(
                    name,
                    parameters=first.parameters,
                    returns=first.returns,
                    lineno=first.lineno,
                    endlineno=first.endlineno,
                )
                function.overloads = overloads
                parent.set_member(name, function)
        for name, member in list(parent.members.items()):
            if name == "__init__" and "Never" in str(getattr(member, "parameters", "")):
                parent.del_member(name)  # callers make none
            elif not member.is_alias:
                prepare(member)


def describe(
    declared: griffe.Object | griffe.Alias,
    written: griffe.Object | griffe.Alias,
    loader: griffe.GriffeLoader,
) -> None:
    """Add the docstrings of the code, those of inherited members too."""
    if written.docstring is not None and isinstance(declared, griffe.Object):
        declared.docstring = griffe.Docstring(
            written.docstring.value, parent=declared, parser=loader.docstring_parser
        )
    if declared.is_class:
        members = written.all_members
        for name, member in declared.members.items():
            if name in members and not member.is_alias:
                describe(member, members[name], loader)
