"""Round trips: how often a unit waits for its database, and how long that takes over a network.

`python -m benchmarks.trips` prints the table alone.
"""

import asyncio
import selectors
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    contextmanager,
)
from functools import partial
from threading import Event, Thread
from time import perf_counter
from typing import Final

from attrs import frozen
from sqlalchemy import URL, NullPool, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from benchmarks import handwritten, lean
from benchmarks.contenders import HANDWRITTEN, LEAN, OURS, Db
from benchmarks.sites import SELECT, Base, Entry
from fastapi_async_sqlalchemy import (
    Begin,
    EngineArgs,
    SessionProxy,
    atomic,
    create_middleware_and_session_proxy,
    pgbouncer_engine_args,
)
from tests.support.databases import fresh_database, postgresql_server
from tests.support.mariadb import MariadbMissingError, own_mariadb
from tests.support.trips import Trips, counting

Proxy = SessionProxy[AsyncSession]
Work = Callable[[Db], Awaitable[object]]

ON_FIRST_WRITE: Final = "on_first_write"
COLUMNS: Final = (LEAN, HANDWRITTEN, OURS, ON_FIRST_WRITE)
ONE: Final = EngineArgs(pool_size=1, max_overflow=0)
WARM: Final = 7
"""So often a unit runs before it is counted: psycopg prepares a statement at its sixth use."""
EACH_WAY: Final = 0.0005
"""Seconds of network."""
TIMED: Final = 40
"""So many units are timed."""


async def select(db: Db) -> None:
    """Read once."""
    (await db.session.execute(SELECT)).scalar_one()


async def select_twice(db: Db) -> None:
    """Read twice."""
    await select(db)
    await select(db)


async def insert(db: Db) -> None:
    """Write once."""
    db.session.add(Entry(text="measured"))


async def select_and_update(db: Db) -> None:
    """Read, and write."""
    await select(db)
    await db.session.execute(text("UPDATE entry SET text = 'updated' WHERE id = 0"))


WORKS: Final = {
    "one SELECT": select,
    "two SELECTs": select_twice,
    "one INSERT": insert,
    "SELECT and UPDATE": select_and_update,
}


@frozen
class Side:
    """Who is measured, through a proxy."""

    trips: Trips
    db: Db
    unit: Callable[[], AbstractAsyncContextManager[object]]

    async def run(self, work: Work) -> None:
        """Run one unit."""
        async with self.unit():
            await work(self.db)

    async def count(self, work: Work) -> int:
        """Count the round trips of a unit whose statements are prepared."""
        for _ in range(WARM):
            await self.run(work)
        self.trips.taken()
        await self.run(work)
        return self.trips.taken()

    async def time(self, work: Work, times: int) -> float:
        """Return the milliseconds of the quickest unit: others wait for the machine as well."""
        taken = list[float]()
        for _ in range(WARM + times):
            start = perf_counter()
            await self.run(work)
            taken.append((perf_counter() - start) * 1e3)
        return min(taken[WARM:])


@asynccontextmanager
async def by_hand(kind: Callable[..., lean.Db | handwritten.Db], trips: Trips) -> AsyncGenerator[Side]:
    """Make a floor."""
    engine = create_async_engine(trips.url, **ONE)
    db = kind(engine)
    yield Side(trips, db, db)
    await engine.dispose()


@asynccontextmanager
async def by_the_package(begin: Begin | None, trips: Trips) -> AsyncGenerator[Side]:
    """Make a pair of this package, on an engine of its own."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    async with db.connect(trips.url, engine_args=ONE, begin=begin):
        yield Side(trips, db, partial(db, commit_on_exit=True))


def makers(url: URL | str) -> dict[str, Callable[[Trips], AbstractAsyncContextManager[Side]]]:
    """Name who can be measured on a database."""
    found: dict[str, Callable[[Trips], AbstractAsyncContextManager[Side]]] = {
        LEAN: partial(by_hand, lean.Db),
        HANDWRITTEN: partial(by_hand, handwritten.Db),
        OURS: partial(by_the_package, None),
    }
    if f"{url}".startswith("postgresql"):
        found[ON_FIRST_WRITE] = partial(by_the_package, ON_FIRST_WRITE)
    return found


@contextmanager
def at_a_distance(url: str) -> Generator[Trips]:
    """Put a proxy with a network's delay in a thread of its own; `epoll` counts in whole milliseconds."""
    found, ready, over = list[tuple[Trips, asyncio.AbstractEventLoop]](), Event(), asyncio.Event()

    async def serve() -> None:
        async with counting(url, delay=EACH_WAY) as trips:
            found.append((trips, asyncio.get_running_loop()))
            ready.set()
            await over.wait()

    def run() -> None:
        loop = partial(asyncio.SelectorEventLoop, selectors.SelectSelector())
        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(serve())

    thread = Thread(target=run, name="network")
    thread.start()
    ready.wait()
    ((trips, loop),) = found
    try:
        yield trips
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()


async def rows(url: str, times: int) -> AsyncGenerator[tuple[str, ...]]:
    """Count, and time, what everybody can do."""
    engine = create_async_engine(url, poolclass=NullPool)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    driver = engine.dialect.driver
    for what, work in WORKS.items():
        cells = dict[str, str]()
        for name, make in makers(url).items():
            async with counting(url) as trips, make(trips) as side:
                cells[name] = f"{await side.count(work)}"
            with at_a_distance(url) as trips:
                async with make(trips) as side:
                    cells[name] += f" ({await side.time(work, times):.1f} ms)"
        yield driver, what, *(cells.get(name, "") for name in COLUMNS)


async def of_ours(url: str) -> AsyncGenerator[tuple[str, ...]]:
    """Count what only this package does, on PostgreSQL."""
    async with counting(url) as trips:
        _, db = create_middleware_and_session_proxy(AsyncSession)
        async with db.connect(trips.url, engine_args=ONE):
            side = Side(trips, db, db)
            await side.count(select)
            position = await db.commit_position()
            trips.taken()
            await db.commit_position()
            yield "asyncpg", "`commit_position()`", "", "", f"{trips.taken()}", ""
            side = Side(trips, db, partial(db.after, position))
            yield "asyncpg", "one SELECT of a unit that waits", "", "", f"{await side.count(select)}", ""
        for warm_up in (None, 1):
            async with db.connect(trips.url, engine_args=ONE, pool_warm_up=warm_up):
                trips.taken()
                await Side(trips, db, db).run(select)
                what = "first SELECT of an engine" + (", `pool_warm_up=1`" if warm_up else "")
                yield "asyncpg", what, "", "", f"{trips.taken()}", ""
        nameless: EngineArgs = {**ONE, **pgbouncer_engine_args()}
        counts = list[str]()
        for begin in (None, ON_FIRST_WRITE):
            async with db.connect(trips.url, engine_args=nameless, begin=begin):
                counts.append(f"{await Side(trips, db, db).count(select)}")
        yield "asyncpg", "one SELECT, `pgbouncer_engine_args()`", "", "", *counts


async def together(urls: Iterable[str]) -> tuple[str, ...]:
    """Count a unit of two databases."""
    async with AsyncExitStack() as stack:
        pairs = list[tuple[Trips, Proxy]]()
        for url in urls:
            trips = await stack.enter_async_context(counting(url))
            _, db = create_middleware_and_session_proxy(AsyncSession)
            pairs.append((trips, await stack.enter_async_context(db.connect(trips.url, engine_args=ONE))))
        (_, first), (_, second) = pairs
        for _ in range(WARM):
            for trips, _ in pairs:
                trips.taken()
            async with atomic(first, second):
                for _, db in pairs:
                    await db.session.execute(text("UPDATE entry SET text = 'updated' WHERE id = 0"))
        return (
            "asyncpg",
            "`atomic()` of two, one UPDATE each",
            "",
            "",
            f"{sum(one.taken() for one, _ in pairs)}",
            "",
        )


async def of_ours_on_mariadb(url: str) -> tuple[str, ...]:
    """Count a unit with an isolation level."""
    async with counting(url) as trips:
        _, db = create_middleware_and_session_proxy(AsyncSession)
        async with db.connect(trips.url, engine_args=ONE):
            count = await Side(trips, db, partial(db, isolation_level="SERIALIZABLE")).count(select)
    return "aiomysql", "one SELECT at an isolation level", "", "", f"{count}", ""


async def measure(postgresql: str, second: str, mariadb: str | None, times: int) -> list[tuple[str, ...]]:
    """Count everything; without a MariaDB, its rows are left out."""
    engine = create_async_engine(second, poolclass=NullPool)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    found = [row async for row in rows(postgresql, times)]
    found += [row async for row in rows(postgresql.replace("asyncpg", "psycopg"), times)]
    found += [row async for row in of_ours(postgresql)]
    found.append(await together((postgresql, second)))
    if mariadb is not None:
        found += [row async for row in rows(mariadb, times)]
        found += [row async for row in rows(mariadb.replace("aiomysql", "asyncmy"), times)]
        found.append(await of_ours_on_mariadb(mariadb))
    return found


def table(found: list[tuple[str, ...]]) -> str:
    """Write the table."""
    lines = [("driver", "a unit with", *COLUMNS), *found]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    written = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    written.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(written) + "\n"


def counted(times: int) -> list[tuple[str, ...]]:
    """Start the servers, and count."""
    with ExitStack() as stack:
        server = stack.enter_context(postgresql_server())
        first, second = (stack.enter_context(fresh_database(server)) for _ in range(2))
        mariadb = None
        try:
            mariadb = stack.enter_context(fresh_database(stack.enter_context(own_mariadb())))
        except MariadbMissingError as error:
            print(f"Round trips to MariaDB are not counted: {error}.")
        return asyncio.run(measure(first, second, mariadb, times))


if __name__ == "__main__":
    print(table(counted(TIMED)))
