"""The benchmarks run: each measure gives a number. How large it is, no test asks."""

import asyncio
import math
import re
from contextlib import ExitStack
from pathlib import Path

import pytest
from sqlalchemy import URL

from benchmarks import report, trips
from benchmarks.__main__ import measure
from benchmarks.chart import chart, trips_chart
from benchmarks.contenders import OURS
from benchmarks.measuring import Plan
from benchmarks.trips import WORKS
from tests.support.databases import fresh_database
from tests.support.versions import asyncpg_asks_server


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


@pytest.mark.slow
async def test_round_trips(postgresql_server: URL, databases: ExitStack) -> None:
    """The table of round trips counts what the documentation says, on PostgreSQL by both drivers."""
    first, second = await asyncio.to_thread(
        lambda: [databases.enter_context(fresh_database(postgresql_server)) for _ in range(2)]
    )
    found = await trips.measure(first, second, None, times=1)
    counted = {
        (driver, what): tuple(re.findall(r"^\d+", cell)[0] for cell in cells if cell)
        for driver, what, *cells in found
    }
    for driver in ("asyncpg", "psycopg"):
        assert counted[driver, "one SELECT"] == ("3", "3", "3", "1")
        assert counted[driver, "two SELECTs"] == ("4", "4", "4", "2")
        assert counted[driver, "one INSERT"] == ("3", "3", "3", "3")
        assert counted[driver, "SELECT and UPDATE"] == ("4", "4", "4", "4")
    assert counted["asyncpg", "`commit_position()`"] == ("1",)
    assert counted["asyncpg", "one SELECT of a unit that waits"] == ("4",)
    assert counted["asyncpg", "first SELECT of an engine, `pool_warm_up=1`"] == ("4",)
    assert counted["asyncpg", "one SELECT, `pgbouncer_engine_args()`"] == ("4", "2")
    if asyncpg_asks_server:
        assert counted["asyncpg", "`atomic()` of two, one UPDATE each"] == ("9",)
    assert trips_chart(found, trips.COLUMNS).count("<rect") > 4 * len(WORKS)
    assert trips.table(found).count("\n") == len(found) + 2


def test_page_takes_a_table() -> None:
    """What a run writes stands between the marks of the page, and nothing else changes."""
    page = Path(__file__).parent.parent.parent.joinpath("docs/benchmarks.md").read_text("utf-8")
    before, _, rest = page.partition("<!-- begin table -->\n")
    _, _, after = rest.partition("<!-- end table -->")
    assert (
        report.into_page(page, "| a |\n") == f"{before}<!-- begin table -->\n| a |\n<!-- end table -->{after}"
    )
