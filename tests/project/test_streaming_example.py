"""The example of long responses: flat memory, clients that leave, and events that hold no connection."""

import tracemalloc
from contextlib import AsyncExitStack

import pytest
from httpx2 import AsyncClient
from sqlalchemy import AsyncAdaptedQueuePool

from examples.streaming import ROWS_AT_A_TIME, create_app
from examples.streaming_memory import fill
from fastapi_async_sqlalchemy import EngineArgs, db
from fastapi_async_sqlalchemy.testing import SandboxedApp
from tests.support.serving import asgi_client, raw_get, serve

pytestmark = pytest.mark.filterwarnings(
    "ignore:(?s).*session.exec:DeprecationWarning"  # SQLModel's, about its execute()
)
ATTIC = {"place": "attic", "celsius": 31}
ONE_CONNECTION: EngineArgs = {"poolclass": AsyncAdaptedQueuePool, "pool_size": 1, "max_overflow": 0}
MEGABYTE = 2**20


async def test_readings_are_sent_as_csv(deferring_url: str) -> None:
    """The CSV has a line for each reading, and one alone where there is none."""
    async with asgi_client(SandboxedApp(create_app(deferring_url), db)) as client:
        assert (await client.get("/readings.csv")).text == "id,place,celsius\r\n"
        lines = ["id,place,celsius"]
        for celsius in (31, 32):
            added = await client.post("/readings", json={"place": 'the "old", attic', "celsius": celsius})
            lines.append(f'{added.json()},"the ""old"", attic",{celsius}')
        assert (await client.get("/readings.csv")).text.splitlines() == lines


async def test_memory_is_flat(deferring_url: str) -> None:
    """A CSV of 80,000 rows takes 1 MB, where to hold the rows would take 24."""
    count = 80 * ROWS_AT_A_TIME
    lines = 0
    async with serve(create_app(deferring_url)) as address, AsyncClient(timeout=30) as client:
        await client.get(f"{address.url}/readings.csv")
        await fill(count)
        tracemalloc.start()
        try:
            async with client.stream("GET", f"{address.url}/readings.csv") as response:
                async for part in response.aiter_bytes():
                    lines += part.count(b"\n")
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert lines == 1 + count
    assert peak < 3 * MEGABYTE


async def test_client_that_leaves_gives_its_connection_back(deferring_url: str) -> None:
    """The only connection is in use while a client does not read on, and free once it has left."""
    async with serve(create_app(deferring_url, ONE_CONNECTION)) as address, AsyncClient(timeout=30) as client:
        await fill(100 * ROWS_AT_A_TIME, place="attic " * 20)
        async with raw_get(address, "/readings.csv") as response:
            assert await response.status() == 200
            await response.until(b"attic")
            assert db.pool_status().checked_out == 1
            response.cut()
            assert (await client.post(f"{address.url}/readings", json=ATTIC)).status_code == 201
        assert db.pool_status().checked_out == 0


async def test_events_tell_of_what_is_committed(deferring_url: str) -> None:
    """Three streams share one connection with those who write, and each is told of a reading."""
    async with AsyncExitStack() as opened:
        address = await opened.enter_async_context(serve(create_app(deferring_url, ONE_CONNECTION)))
        client = await opened.enter_async_context(AsyncClient(timeout=30))
        streams = [await opened.enter_async_context(raw_get(address, "/events")) for _ in range(3)]
        for stream in streams:
            await stream.until(b":\n\n")
        assert db.pool_status().checked_out == 0
        for celsius in (31, 32):
            added = await client.post(f"{address.url}/readings", json={**ATTIC, "celsius": celsius})
            event = f'id: {added.json()}\ndata: {{"place": "attic", "celsius": {celsius}}}\n\n'
            for stream in streams:
                assert event.encode() in await stream.until(b"}\n\n")


async def test_refused_reading_wakes_nobody(deferring_url: str) -> None:
    """Where COMMIT fails the client is told so, and no reading is there for a stream."""
    sandboxed = SandboxedApp(create_app(deferring_url), db)
    async with asgi_client(sandboxed, raise_app_exceptions=False) as client:
        sandboxed.box.fail_commit()
        assert (await client.post("/readings", json=ATTIC)).status_code == 500
        assert sandboxed.box.hooks_run == 0
        assert (await client.get("/readings.csv")).text == "id,place,celsius\r\n"
