"""One `asyncio.run()` a job: `python -m tests.support.jobs URL KIND POOL_SIZE PRE_PING`.

More tasks than the pool has connections ask at once, so that some must wait. Prints nothing unless it fails.
"""

import asyncio
import sys
from collections.abc import Callable

from sqlalchemy import AsyncAdaptedQueuePool, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from fastapi_async_sqlalchemy import db

JOBS = 4


async def ask() -> object:
    """Ask in a unit."""
    async with db(commit_on_exit=True) as unit:
        return await unit.session.scalar(text("SELECT 1"))


async def job() -> None:
    """Ask by three tasks more than the pool has connections."""
    found = await asyncio.gather(*(ask() for _ in range(int(sys.argv[3]) + 3)))
    assert set(found) == {1}


async def connect(engine: AsyncEngine) -> None:
    """Use the engine before it is bound."""
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))


def bound(engine: AsyncEngine) -> None:
    """Bind it at module level."""
    db.bind(engine)
    for _ in range(JOBS):
        asyncio.run(job())


def connected_in_an_ended_loop(engine: AsyncEngine) -> None:
    """Connect in a loop that ends, then bind at module level."""
    asyncio.run(connect(engine))
    bound(engine)


def bound_in_the_next_loop(engine: AsyncEngine) -> None:
    """Connect in a loop that ends, and bind in the next one."""

    async def main() -> None:
        db.bind(engine)
        await job()

    asyncio.run(connect(engine))
    asyncio.run(main())
    bound(engine)


def connected_in_this_loop(engine: AsyncEngine) -> None:
    """Connect and bind in the same loop."""

    async def main() -> None:
        await connect(engine)
        db.bind(engine)
        await job()

    asyncio.run(main())
    bound(engine)


def turns(engine: AsyncEngine) -> None:
    """Have two loops take turns, neither of which ends; what they leave must not add up."""
    db.bind(engine)
    loops = [asyncio.new_event_loop(), asyncio.new_event_loop()]
    for turn in range(12):
        loops[turn % 2].run_until_complete(job())
    if engine.dialect.name == "postgresql":
        count = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    elif engine.dialect.name == "mysql":
        count = "SELECT count(*) FROM information_schema.processlist WHERE db = database()"
    else:
        return

    async def connections() -> int:
        async with db() as unit:
            found = await unit.session.scalar(text(count))
        assert isinstance(found, int)
        return found

    size = int(sys.argv[3])
    assert loops[1].run_until_complete(connections()) <= 3 * size


KINDS: dict[str, Callable[[AsyncEngine], None]] = {
    kind.__name__: kind
    for kind in (bound, connected_in_an_ended_loop, bound_in_the_next_loop, connected_in_this_loop, turns)
}

if __name__ == "__main__":
    KINDS[sys.argv[2]](
        create_async_engine(
            sys.argv[1],
            poolclass=AsyncAdaptedQueuePool,
            pool_size=int(sys.argv[3]),
            max_overflow=0,
            pool_timeout=20,
            pool_pre_ping=sys.argv[4] == "True",
        )
    )
