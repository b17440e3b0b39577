"""A to E: what a request costs, called in process."""

from functools import partial

from attrs import evolve, frozen

from benchmarks.contenders import BARE
from benchmarks.measuring import Figure, Plan, Row, Samples, in_turn, over_bare, plain, ratio
from benchmarks.sites import Site, Stand

SQL_ROUNDS = 4
"""So many times the usual rounds, each shorter: a database's time wanders more than the differences."""


@frozen
class Request:
    """What is asked for, how often in a round, and what it may cost."""

    key: str
    what: str
    path: str
    times: int
    target: float | None = None


WITHOUT_SQL = (
    Request("A", "untouched request", "/untouched", 800, 1.5),
    Request("B", "session taken, no SQL", "/taken", 250, 14.0),
)
ON_SQLITE = (Request("C", "one SELECT on SQLite", "/selected", 60),)
ON_POSTGRESQL = (
    Request("D", "one SELECT on PostgreSQL", "/selected", 70, 0.98),
    Request("E", "one INSERT and COMMIT on PostgreSQL", "/inserted", 45, 0.98),
)


async def without_sql(stand: Stand, plan: Plan) -> list[Row]:
    """A and B: microseconds over the bare application, which has no session to take."""
    return [
        _row(stand, request, "us over bare", over_bare(samples))
        for request in WITHOUT_SQL
        for samples in [await _time(stand.sites, request, plan.times(request.times), plan.rounds)]
    ]


async def on_sqlite(stand: Stand, plan: Plan) -> list[Row]:
    """C: the time of a request, as a ratio to `handwritten`."""
    return [row for request in ON_SQLITE for row in await _ratio(stand, request, plan)]


async def on_postgresql(stand: Stand, plan: Plan) -> list[Row]:
    """D and E: likewise."""
    return [row for request in ON_POSTGRESQL for row in await _ratio(stand, request, plan)]


async def _ratio(stand: Stand, request: Request, plan: Plan) -> list[Row]:
    samples = await _time(stand.with_session, request, plan.times(request.times), SQL_ROUNDS * plan.rounds)
    return [
        _row(stand, request, "ratio", ratio(samples)),
        _row(stand, evolve(request, target=None), "us", plain(samples)),
    ]


async def _time(sites: dict[str, Site], request: Request, times: int, rounds: int) -> Samples:
    return await in_turn(
        {
            name: partial(site.time, "/untouched" if name == BARE else request.path, times)
            for name, site in sites.items()
        },
        rounds,
    )


def _row(stand: Stand, request: Request, unit: str, figures: dict[str, Figure]) -> Row:
    return Row(
        key=request.key,
        what=request.what,
        unit=unit,
        framework=stand.framework,
        figures=figures,
        target=request.target,
    )
