"""The benchmarks run: each measure gives a number. How large it is, no test asks."""

import math
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.__main__ import measure
from benchmarks.chart import chart
from benchmarks.contenders import OURS
from benchmarks.measuring import Plan


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_every_measure_gives_a_number(postgresql_url: str, sqlite_url: str) -> None:
    """One round of next to nothing: every letter of the table has a finite number for this package."""
    rows = await measure(postgresql_url, sqlite_url, Plan(rounds=1, share=0.001))
    assert {row.key for row in rows} == set("ABCDEFGHIJK")
    for row in rows:
        assert math.isfinite(row.figures[OURS].median), row
    assert all(f"| {row.what}" in report.summary(rows) for row in rows)
    assert chart(rows).startswith("<svg")


def test_page_takes_a_table() -> None:
    """What a run writes stands between the marks of the page, and nothing else changes."""
    page = Path(__file__).parent.parent.parent.joinpath("docs/benchmarks.md").read_text("utf-8")
    before, _, rest = page.partition("<!-- begin table -->\n")
    _, _, after = rest.partition("<!-- end table -->")
    assert (
        report.into_page(page, "| a |\n") == f"{before}<!-- begin table -->\n| a |\n<!-- end table -->{after}"
    )
