"""What is printed and written: tables, JSON."""

import json
import os
import platform
import re
import statistics
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import attrs

from benchmarks.contenders import AGAIN, BARE, HANDWRITTEN, LEAN, OURS
from benchmarks.instructions import UNIT
from benchmarks.measuring import Figure, Row

COLUMNS = (BARE, LEAN, HANDWRITTEN, AGAIN, OURS)
_MET = {True: "met", False: "missed", None: ""}


def summary(rows: list[Row]) -> str:
    """Write all that is shown of a run."""
    facts = ", ".join(f"{name} {value}" for name, value in circumstances().items())
    return f"{tables(rows)}\n{noise(rows)}\n\nMeasured with {facts}.\n"


def tables(rows: Iterable[Row]) -> str:
    """Write one table a framework, those without one in the first, and one of instructions."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        title = "Instructions a request, Starlette" if row.unit == UNIT else row.framework or "Starlette"
        groups.setdefault(title, []).append(row)
    return "\n".join(f"### {title}\n\n{table(group)}" for title, group in groups.items())


def table(rows: list[Row]) -> str:
    """Write a table, in Markdown that also reads well as it is."""
    head = ("", "measure", "unit", *COLUMNS, "target", "")
    lines = [head, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    written = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    written.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(written) + "\n"


def into_page(page: str, text: str, mark: str = "table") -> str:
    """Replace what stands between the marks of a page."""
    marked = re.compile(f"(?<=<!-- begin {mark} -->\n).*?(?=<!-- end {mark} -->)", re.DOTALL)
    return marked.sub(lambda _: text, page)


def circumstances() -> dict[str, Any]:
    """Tell what was measured, and where."""
    packages = ("fastapi-async-sqlalchemy", "sqlalchemy", "starlette", "fastapi", "asyncpg", "aiosqlite")
    return {
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        **{name: version(name) for name in packages},
    }


def as_json(rows: Iterable[Row], facts: dict[str, Any]) -> str:
    """Write all figures."""
    return json.dumps({"circumstances": facts, "rows": [attrs.asdict(row) for row in rows]}, indent=1) + "\n"


def noise(rows: Iterable[Row]) -> str:
    """Tell how far apart the floor is from itself."""
    apart = {row: abs(row.figures[AGAIN].median - 1) for row in rows if row.unit.startswith("ratio")}
    worst = max(apart, key=lambda row: apart[row])
    return (
        f"`{HANDWRITTEN}` measured twice differs from itself by {statistics.median(apart.values()):.1%} "
        f"in the middle of all ratios, and by {apart[worst]:.1%} at worst ({worst.key}, {worst.framework})."
    )


def _cells(row: Row) -> tuple[str, ...]:
    target = "" if row.target is None else f"<= {row.target:,}"
    figures = (_figure(row.figures.get(name)) for name in COLUMNS)
    return (row.key, row.what, row.unit, *figures, target, _MET[row.met])


def _figure(figure: Figure | None) -> str:
    if figure is None:
        return ""
    number = _number(figure.median)
    if figure.low == figure.high:
        return number
    return f"{number} ({_number(figure.low)} to {_number(figure.high)})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 3 else f"{value:.2f}"
