"""The blocks of the documentation; `python -m tests.support.pages FOLDER` writes Python for type checkers."""

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from attrs import frozen

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "examples/README.md", *sorted(ROOT.glob("docs/**/*.md"))]
FENCE = re.compile(
    r"^(?:<!-- (?:not executed: (?P<reason>.+?)|needs (?P<needed>[\w-]+)(?: (?P<version>[\d.]+))?) -->\n+)?"
    r"```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@frozen
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    reason: str | None
    """Why it is not executed; None if it is."""
    quoted: Path | None = None
    """The file of the repository that the block is a part of; that file has tests of its own."""


def blocks(page: Path) -> Iterator[Block]:
    """Find the fenced blocks of a page."""
    source = page.read_text("utf-8")
    for found in FENCE.finditer(source):
        line = source.count("\n", 0, found.start("text")) + 1
        reason = found["reason"] or (missing(found["needed"], found["version"]) if found["needed"] else None)
        quoted = ROOT / found["title"] if (found["title"] or "").startswith("examples/") else None
        yield Block(page, line, found["language"], found["text"], reason, quoted)


def quoted_parts(block: Block) -> list[range]:
    """Return the lines of the file that each part of a quote shows; none if it is not in the file.

    A line `...` or `# ...` stands for lines left out, and so ends a part.
    """
    assert block.quoted is not None
    source = block.quoted.read_text("utf-8")
    parts = re.split(r"^ *(?:# )?\.\.\.\n", block.text, flags=re.MULTILINE)
    in_turn = ".*?".join(f"^({re.escape(part)})" for part in parts)
    found = re.search(in_turn, source, re.DOTALL | re.MULTILINE)
    if found is None:
        return []
    starts = [source.count("\n", 0, found.start(number + 1)) + 1 for number in range(len(parts))]
    return [range(start, start + part.count("\n")) for start, part in zip(starts, parts, strict=True)]


def headless(block: Block) -> Iterator[str]:
    """Yield the functions and classes of which a quote shows a part, and not what the part belongs to.

    That is a docstring, or a body after lines left out, without its `def`, or a `def` without its decorators.
    """
    assert block.quoted is not None
    parts = quoted_parts(block)
    shown = {line for part in parts for line in part}
    for node in ast.walk(ast.parse(block.quoted.read_text("utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        heads = {node.lineno, *(decorator.lineno for decorator in node.decorator_list)}
        body = {line for line in shown if node.lineno < line <= (node.end_lineno or 0)}
        has_docstring = ast.get_docstring(node) is not None and node.body[0].lineno in body
        is_entered = bool(body) and min(body) in {part.start for part in parts[1:]}
        if not heads <= shown and (node.lineno in shown or has_docstring or is_entered):
            yield node.name


def missing(needed: str, lowest: str | None) -> str | None:
    """Say why a block that needs a package, or a version of it, cannot be executed."""
    try:
        installed = version(needed)
    except PackageNotFoundError:
        return f"{needed} is not installed"
    if lowest is None or _numbers(installed) >= _numbers(lowest):
        return None
    return f"it needs {needed} {lowest}, and this is {installed}"


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def program(page: Path) -> str:
    """Return a page's Python, each line where it is in the page; shown mistakes are left out."""
    lines = [""] * len(page.read_text("utf-8").splitlines())
    for block in blocks(page):
        if block.language == "python" and block.quoted is None and "mistake" not in (block.reason or ""):
            found = block.text.splitlines()
            lines[block.line - 1 : block.line - 1 + len(found)] = found
    return "\n".join(lines).rstrip() + "\n"


def main(folder: Path) -> None:
    """Write the programs of all pages, by names that tell the pages."""
    folder.mkdir(parents=True, exist_ok=True)
    for page in PAGES:
        name = "_".join(page.relative_to(ROOT).with_suffix("").parts).replace("-", "_")
        (folder / f"page_{name}.py").write_text(program(page), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
