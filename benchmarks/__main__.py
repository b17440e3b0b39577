"""`python -m benchmarks`: measures all, prints the table, writes JSON; bounded at some five minutes."""

import argparse
import asyncio
import gc
from collections.abc import Awaitable
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from benchmarks import report, trips
from benchmarks.chart import chart, trips_chart
from benchmarks.connections import holding, queueing
from benchmarks.instructions import UNIT, instructions
from benchmarks.measuring import FULL, QUICK, Plan, Row
from benchmarks.memory import importing, parked
from benchmarks.requests import on_postgresql, on_sqlite, without_sql
from benchmarks.serving import over_uvicorn
from benchmarks.sites import stands
from benchmarks.units import lookup, outside_requests
from tests.support.databases import fresh_database, postgresql_server

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/benchmarks.json"
DOCS = ROOT / "docs"


async def measure(postgresql: str, sqlite: str, plan: Plan) -> list[Row]:
    """Measure everything, one after the other."""
    rows: list[Row] = []
    began = perf_counter()

    async def keep(name: str, measuring: Awaitable[list[Row]]) -> None:
        rows.extend(await measuring)
        print(f"{perf_counter() - began:5.0f} s  {name}", flush=True)

    async with stands(postgresql) as on_server, stands(sqlite) as on_file:
        gc.collect()
        gc.freeze()  # what is there for good is not looked at again while requests are measured
        for server, file in zip(on_server, on_file, strict=True):
            name = server.framework
            await keep(f"A, B on {name}", without_sql(server, plan))
            await keep(f"C on {name}", on_sqlite(file, plan))
            await keep(f"D, E on {name}", on_postgresql(server, plan))
            await keep(f"H on {name}", queueing(server, plan))
            await keep(f"J on {name}", holding(server, plan))
            await keep(f"K on {name}", parked(server, plan))
            await keep(f"I on {name}", over_uvicorn(server, plan))
        of_all = tuple(
            site.contender for site in on_server[0].with_session.values() if site.contender is not None
        )
        await keep("F", lookup(of_all, plan))
        await keep("G", outside_requests(of_all, plan))
        await keep("K, import", importing(plan))
        await keep("instructions", counted(postgresql, plan))
        gc.unfreeze()
    order = {"Starlette": 0, "": 0, "FastAPI": 1}
    return sorted(rows, key=lambda row: (row.unit == UNIT, order[row.framework], row.key))


async def counted(url: str, plan: Plan) -> list[Row]:
    """Count instructions where that can be done."""
    try:
        return await instructions(url, plan)
    except FileNotFoundError as error:
        print(f"Instructions are not counted: {error}.")
        return []


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less of everything, within 40 seconds")
    parser.add_argument("--docs", action="store_true", help="write docs/benchmarks.{json,svg,md} as well")
    options = parser.parse_args()
    with (
        TemporaryDirectory() as folder,
        postgresql_server() as server,
        fresh_database(server) as postgresql,
    ):
        sqlite = f"sqlite+aiosqlite:///{Path(folder, 'benchmarks.db')}"
        rows = asyncio.run(measure(postgresql, sqlite, QUICK if options.quick else FULL))
    print(report.summary(rows))
    round_trips = trips.counted(1 if options.quick else trips.TIMED)
    print(trips.table(round_trips))
    write(rows, round_trips, docs=options.docs)


def write(rows: list[Row], round_trips: list[tuple[str, ...]], *, docs: bool) -> None:
    """Write the results, and the pages that show them."""
    written = report.as_json(rows, report.circumstances())
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(written)
    if docs:
        page = DOCS / "benchmarks.md"
        written_page = report.into_page(page.read_text(), report.summary(rows))
        page.write_text(report.into_page(written_page, trips.table(round_trips), "trips"))
        (DOCS / "benchmarks.json").write_text(written)
        (DOCS / "benchmarks.svg").write_text(chart(rows))
        (DOCS / "round-trips.svg").write_text(trips_chart(round_trips, trips.COLUMNS))


if __name__ == "__main__":
    main()
