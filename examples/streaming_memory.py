"""The memory that a long CSV export needs; `make example NAME=streaming_memory` measures it.

It serves examples/streaming.py with uvicorn, on an SQLite file and on PostgreSQL, and reads the whole CSV.
It prints how much the process grew, with server, client and SQLite together, and how much it grows if all
rows are loaded at the same time. ARGS=100000 asks for fewer rows.
"""

import argparse
import asyncio
import gc
import signal
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import psutil  # type: ignore[import-untyped]  # it has no types
from httpx2 import AsyncClient
from sqlalchemy import insert, literal, select

from examples.streaming import Reading, create_app
from fastapi_async_sqlalchemy import db
from tests.support.databases import fresh_database, postgresql_server
from tests.support.serving import serve


async def fill(count: int, place: str = "attic") -> None:
    """Generate this many readings in the database."""
    numbers = select(literal(1).label("n")).cte(recursive=True)
    numbers = numbers.union_all(select(numbers.c.n + 1).where(numbers.c.n < count))
    made = select(literal(place), numbers.c.n % 40)
    async with db.begin() as unit:
        await unit.session.execute(insert(Reading).from_select(["place", "celsius"], made))


def resident() -> int:
    """Return this process's memory in bytes."""
    rss: int = psutil.Process().memory_info().rss
    return rss


async def measure(name: str, url: str, count: int) -> None:
    """Print the memory for streaming the rows, and for loading all of them."""
    async with serve(create_app(url)) as address, AsyncClient(timeout=None) as client:
        await fill(count)
        await client.get(f"{address.url}/docs")  # what is imported and made once
        gc.collect()
        before = most = resident()
        size, began = 0, perf_counter()
        async with client.stream("GET", f"{address.url}/readings.csv") as response:
            async for part in response.aiter_bytes():
                size += len(part)
                most = max(most, resident())
        seconds = perf_counter() - began
        sent = f"{count:,} rows, {size / 1e6:.1f} MB in {seconds:.1f} s"
        print(f"{name}: {sent}: {(most - before) / 1e6:.1f} MB more")
        async with db() as unit:
            rows = (await unit.session.execute(select(Reading.id, Reading.place, Reading.celsius))).all()
            print(f"{name}: {len(rows):,} rows at once: {(resident() - before) / 1e6:.1f} MB more")


def main() -> None:
    """Measure both databases."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.streaming_memory", description="Measure the memory of a CSV export."
    )
    parser.add_argument("rows", type=int, nargs="?", default=1_000_000, help="the number of rows (1000000)")
    count = parser.parse_args().rows
    print(f"Measures {count:,} rows on SQLite, then on PostgreSQL; a million takes a minute.", flush=True)
    with TemporaryDirectory() as folder:
        asyncio.run(measure("SQLite", f"sqlite+aiosqlite:///{Path(folder, 'readings.db')}", count))
    with postgresql_server() as server, fresh_database(server) as url:
        asyncio.run(measure("PostgreSQL", url, count))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing stays behind
    with suppress(KeyboardInterrupt):
        main()
