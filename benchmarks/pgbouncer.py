"""Requests through PgBouncer beside direct connections, in turn: `python -m benchmarks.pgbouncer`.

The application runs in this process and so does its load; times are those of all requests together.
"""

import argparse
import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from itertools import count
from time import perf_counter

from sqlalchemy import AsyncAdaptedQueuePool, NullPool, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Message, Scope

from benchmarks.measuring import Figure, Measurement, in_turn, plain, ratio
from fastapi_async_sqlalchemy import (
    EngineArgs,
    SessionProxy,
    create_middleware_and_session_proxy,
    pgbouncer_engine_args,
)
from tests.support.databases import fresh_database, postgresql_server
from tests.support.pgbouncer import pgbouncer
from tests.support.serving import run_lifespan

CLIENTS = 50
SERVERS = 10
TABLE = "CREATE TABLE line (id integer PRIMARY KEY, words text NOT NULL)"
SELECT = text("SELECT words FROM line WHERE id = :id")
INSERT = text("INSERT INTO line (id, words) VALUES (:id, 'these are some words')")
DIRECT = f"direct, a pool of {SERVERS}"

ids = count(1)
"""Every row of a run has an id of its own."""


def contenders(direct: str, bounced: str) -> dict[str, tuple[str, EngineArgs]]:
    """Return the ways to the database: the URL of each, and its engine's arguments."""
    pool = EngineArgs(poolclass=AsyncAdaptedQueuePool, pool_size=SERVERS, max_overflow=0)
    through = pgbouncer_engine_args()
    null: EngineArgs = {**through, "poolclass": NullPool}
    return {
        DIRECT: (direct, pool),
        "direct, NullPool": (direct, {"poolclass": NullPool}),
        "PgBouncer, NullPool": (bounced, null),
        f"PgBouncer, a pool of {SERVERS}": (bounced, {**through, **pool}),
        f"PgBouncer, a pool of {CLIENTS}": (bounced, {**through, **pool, "pool_size": CLIENTS}),
    }


def application(db: SessionProxy[AsyncSession]) -> Starlette:
    """Make the application, without its middleware yet."""

    async def select(_: Request) -> Response:
        return PlainTextResponse(await db.session.scalar(SELECT, {"id": 0}))

    async def insert(_: Request) -> Response:
        await db.session.execute(INSERT, {"id": next(ids)})
        return PlainTextResponse("written")

    return Starlette(routes=[Route("/select", select), Route("/insert", insert)])


@asynccontextmanager
async def started(url: str, engine_args: EngineArgs) -> AsyncGenerator[Starlette]:
    """Start an application of its own for one way to the database."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    app = application(db)
    app.add_middleware(middleware, db_url=url, engine_args=engine_args, commit_on_exit=True)
    async with run_lifespan(app):
        yield app


async def load(app: Starlette, path: str, requests: int) -> float:
    """Return the seconds that all clients need for so many requests in all."""

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        assert message.get("status", 200) == 200, message

    async def client() -> None:
        for _ in range(requests // CLIENTS):
            scope: Scope = {"type": "http", "method": "GET", "path": path, "headers": [], "query_string": b""}
            await app(scope, receive, send)

    begin = perf_counter()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return perf_counter() - begin


async def measure(direct: str, bounced: str, rounds: int, requests: int) -> None:
    """Measure both kinds of request by every way, and print the table."""
    engine = create_async_engine(direct, poolclass=NullPool)
    async with engine.begin() as connection:
        await connection.execute(text(TABLE))
        await connection.execute(INSERT, {"id": 0})
    async with AsyncExitStack() as stack:
        apps = {
            name: await stack.enter_async_context(started(*way))
            for name, way in contenders(direct, bounced).items()
        }
        for path in ("/select", "/insert"):
            measurements: Mapping[str, Measurement] = {
                name: partial(load, app, path, requests) for name, app in apps.items()
            }
            samples = await in_turn(measurements, rounds)
            print(f"\n{path}: {CLIENTS} clients, {requests} requests a round, median of {rounds} rounds")
            show(
                requests,
                plain(samples),
                {n: (f.median, f.low, f.high) for n, f in ratio(samples, DIRECT).items()},
            )


def show(requests: int, times: dict[str, Figure], ratios: dict[str, tuple[float, float, float]]) -> None:
    """Print a row for each way: requests a second, and its throughput as a part of the direct pool's."""
    for name, figure in times.items():
        median, low, high = (1 / value for value in ratios[name])
        print(f"{name:34} {requests / figure.median:6.0f}/s  x{median:.2f} ({high:.2f} to {low:.2f})")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pgbouncer", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--requests", type=int, default=400)
    options = parser.parse_args()
    with (
        postgresql_server() as server,
        fresh_database(server) as direct,
        pgbouncer(direct, default_pool_size=SERVERS) as bounced,
    ):
        asyncio.run(measure(direct, bounced, options.rounds, options.requests))


if __name__ == "__main__":
    main()
