"""H and J: many requests over a small pool, and how long a request holds its connection."""

import asyncio
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from time import perf_counter

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from benchmarks.contenders import HANDWRITTEN, POOL_SIZE
from benchmarks.measuring import Plan, Row, in_turn, plain, ratio
from benchmarks.sites import Site, Stand

CONCURRENT = 100
_SEMAPHORE = "semaphore"


async def queueing(stand: Stand, plan: Plan) -> list[Row]:
    """H: the time of all requests at once, as a ratio to `handwritten` behind a semaphore."""
    sites = stand.with_session
    measurements = {name: partial(_all_at_once, site, CONCURRENT) for name, site in sites.items()}
    measurements[_SEMAPHORE] = partial(_all_at_once, sites[HANDWRITTEN], POOL_SIZE)
    figures = ratio(await in_turn(measurements, 3 * plan.rounds), _SEMAPHORE)
    del figures[_SEMAPHORE]
    what = f"{CONCURRENT} concurrent SELECTs over a pool of {POOL_SIZE}"
    return [
        Row(
            key="H",
            what=what,
            unit="ratio to a semaphore",
            framework=stand.framework,
            figures=figures,
            target=0.98,
        )
    ]


async def holding(stand: Stand, plan: Plan) -> list[Row]:
    """J: milliseconds with the connection out, by the pool's own events; here a sleep is the subject."""
    rounds = max(1, plan.rounds // 4)
    kinds = {"/streamed": "a body streams 100 ms", "/followed": "a background task sleeps 100 ms"}
    return [
        Row(
            key="J",
            what=f"connection held while {kind}",
            unit="ms",
            framework=stand.framework,
            figures=plain(
                await in_turn(
                    {name: partial(_held, site, path) for name, site in stand.with_session.items()}, rounds
                )
            ),
            target=1.4,
        )
        for path, kind in kinds.items()
    ]


async def _all_at_once(site: Site, at_a_time: int) -> float:
    turnstile = asyncio.Semaphore(at_a_time)

    async def queue() -> None:
        async with turnstile:
            await site.get("/selected")

    async def come() -> None:
        await site.get("/selected")

    client = queue if at_a_time < CONCURRENT else come
    start = perf_counter()
    await asyncio.gather(*(client() for _ in range(CONCURRENT)))
    return perf_counter() - start


async def _held(site: Site, path: str) -> float:
    assert site.contender is not None
    for _ in range(2 * POOL_SIZE):  # every connection of the pool knows the statement
        await site.get("/selected")
    with _stopwatch(site.contender.engine) as times:
        await site.get(path)
    out, back = times[::2], times[1::2]
    return sum(end - begin for begin, end in zip(out, back, strict=True)) * 1e3


@contextmanager
def _stopwatch(engine: AsyncEngine) -> Generator[list[float]]:
    """Yield the moments at which the one connection in use goes out and comes back, in turn."""
    times: list[float] = []

    def note(*_: object) -> None:
        times.append(perf_counter())

    pool = engine.pool
    event.listen(pool, "checkout", note)
    event.listen(pool, "checkin", note)
    try:
        yield times
    finally:
        event.remove(pool, "checkout", note)
        event.remove(pool, "checkin", note)
