"""F and G: `db.session` in an open unit, and units outside requests."""

import timeit
from collections.abc import Mapping
from functools import partial
from time import perf_counter

from benchmarks.contenders import Contender
from benchmarks.measuring import Measurement, Plan, Row, in_turn, plain, ratio
from benchmarks.sites import SELECT


async def lookup(contenders: tuple[Contender, ...], plan: Plan) -> list[Row]:
    """F: nanoseconds of one look-up, the loop around it included."""
    times = plan.times(40_000)
    samples = await in_turn(
        {contender.name: partial(_look_up, contender, times) for contender in contenders}, plan.rounds
    )
    figures = plain(samples)
    return [Row(key="F", what="`db.session` in an open unit", unit="ns", figures=figures, target=60)]


async def outside_requests(contenders: tuple[Contender, ...], plan: Plan) -> list[Row]:
    """G: microseconds of an empty unit; one with a SELECT, as a ratio to `handwritten`."""
    empty = await in_turn(_all(contenders, "empty", plan.times(2_000)), plan.rounds)
    selecting = await in_turn(_all(contenders, "selecting", plan.times(70)), plan.rounds)
    what = "unit outside requests"
    return [
        Row(key="G", what=f"{what}, empty", unit="us", figures=plain(empty), target=1.5),
        Row(key="G", what=f"{what}, one SELECT on PostgreSQL", unit="ratio", figures=ratio(selecting)),
    ]


def _all(contenders: tuple[Contender, ...], kind: str, times: int) -> Mapping[str, Measurement]:
    measure = _empty if kind == "empty" else _select
    return {contender.name: partial(measure, contender, times) for contender in contenders}


async def _look_up(contender: Contender, times: int) -> float:
    # timeit compiles the expression anew for each contender: no inline cache is shared with another
    async with contender.unit():
        timer = timeit.Timer("db.session", globals={"db": contender.db})
        timer.timeit(times // 10)
        return timer.timeit(times) / times * 1e9


async def _empty(contender: Contender, times: int) -> float:
    unit = contender.unit
    for _ in range(times // 4):
        async with unit():
            pass
    start = perf_counter()
    for _ in range(times):
        async with unit():
            pass
    return (perf_counter() - start) / times * 1e6


async def _select(contender: Contender, times: int) -> float:
    db, unit = contender.db, contender.unit
    start = perf_counter()
    for _ in range(times):
        async with unit():
            (await db.session.execute(SELECT)).scalar_one()
    return (perf_counter() - start) / times * 1e6
