"""K: what a parked request keeps, and what the import takes."""

import asyncio
import gc
import os
import sys
import tracemalloc
from functools import partial
from tempfile import TemporaryDirectory

from benchmarks.contenders import OURS
from benchmarks.measuring import Figure, Plan, Row, in_turn, over_bare
from benchmarks.sites import Site, Stand

PARKED = 2_000
_IMPORT = """
from time import perf_counter
import attrs, starlette.applications, sqlalchemy.ext.asyncio, sqlalchemy.orm
start = perf_counter()
import fastapi_async_sqlalchemy
print(perf_counter() - start)
"""


async def parked(stand: Stand, plan: Plan) -> list[Row]:
    """K: bytes of each request in the middle of its handler, over those of the bare application."""
    kinds = (("/parked", "untouched", 700), ("/parked-taken", "its session taken", 2_500))
    rows: list[Row] = []
    for path, kind, target in kinds:
        samples = await in_turn(
            {
                name: partial(_bytes, site, "/parked" if site.contender is None else path, plan.times(PARKED))
                for name, site in stand.sites.items()
            },
            1,
        )
        rows.append(
            Row(
                key="K",
                what=f"parked request, {kind}",
                unit="bytes over bare",
                framework=stand.framework,
                figures=over_bare(samples),
                target=target,
            )
        )
    return rows


async def importing(plan: Plan) -> list[Row]:
    """K: milliseconds of the import where SQLAlchemy, Starlette and attrs have been imported before."""
    with TemporaryDirectory() as bytecode:
        await _import(bytecode)  # compiles everything
        values = [await _import(bytecode) for _ in range(max(1, plan.rounds // 2))]
    what = "import, over SQLAlchemy, Starlette and attrs"
    return [Row(key="K", what=what, unit="ms", figures={OURS: Figure.of(values)}, target=2.5)]


async def _bytes(site: Site, path: str, count: int) -> float:
    await _park(site, path, 10)  # what is made once, is made
    tracemalloc.start()
    try:
        return await _park(site, path, count) / count
    finally:
        tracemalloc.stop()


async def _park(site: Site, path: str, count: int) -> int:
    site.gate.opened.clear()
    gc.collect()
    before, _ = tracemalloc.get_traced_memory()
    requests = [asyncio.ensure_future(site.get(path)) for _ in range(count)]
    await site.gate.hold(count)
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    site.gate.opened.set()
    await asyncio.gather(*requests)
    return after - before


async def _import(bytecode: str) -> float:
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _IMPORT, env=environment, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    return float(output) * 1e3
