"""The tables of the pages, made from what was measured; a test holds the pages to them."""

import re
from pathlib import Path

from benchmarks.field.contenders import CONTENDERS, Results
from benchmarks.field.scenarios import SCENARIOS

DOCS = Path(__file__).parent.parent.parent / "docs"
ROWS = {
    **{name: what for name, (what, _) in SCENARIOS.items()},
    "typed": "mypy --strict knows the session as",
}
MARKED = re.compile(r"(?P<head><!-- measured: (?P<names>[\w, -]+) -->\n\n)(?P<table>(?:\|.*\n)+)")


def title(results: Results, name: str) -> str:
    """Return the head of a column."""
    contender = CONTENDERS[name]
    return contender.title.format(results[name]["versions"][contender.distribution])


def table(results: Results, names: list[str]) -> str:
    """Return a table of Markdown: a row a scenario, a column a contender.

    Of two or three contenders only the rows are shown in which they differ.
    """
    rows = [["", *(title(results, name) for name in names)]]
    for key, what in ROWS.items():
        cells = [results[name]["found"][key] for name in names]
        if len(names) > 3 or len(set(cells)) > 1:
            rows.append([what, *cells])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines) + "\n"


def rewritten(results: Results) -> dict[Path, str]:
    """Return the pages that have measured tables, with the tables as they were measured now."""
    pages: dict[Path, str] = {}
    for page in sorted(DOCS.glob("**/*.md")):
        text = page.read_text("utf-8")
        new = MARKED.sub(lambda found: found["head"] + table(results, found["names"].split(", ")), text)
        if MARKED.search(text):
            pages[page] = new
    return pages
