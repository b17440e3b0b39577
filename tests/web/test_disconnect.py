"""Clients that leave and servers that stop, over real sockets: no connection is lost, no write is torn."""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest
from attrs import define
from sqlalchemy import select
from starlette.middleware import Middleware
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.support.gate import Gate, closed, gate_of, passing
from tests.support.serving import Address, raw_get, serve
from tests.support.site import MakeSite, Site
from tests.support.tables import Note
from tests.support.versions import survives_cancellation

pytestmark = survives_cancellation

CLIENTS = 60


class Running:
    """Counts the requests that the application is at work on, and tells when there are none."""

    def __init__(self) -> None:
        self._count = 0
        self.none = asyncio.Event()

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """Wrap the application, around everything that settles and closes the unit."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            self._count += 1
            self.none.clear()
            try:
                await app(scope, receive, send)
            finally:
                self._count -= 1
                if not self._count:
                    self.none.set()

        return counted


@define(eq=False)
class Gated:
    """A site whose routes wait at a gate."""

    site: Site
    gate: Gate
    running: Running


@asynccontextmanager
async def gated(make_site: MakeSite, url: str) -> AsyncGenerator[Gated]:
    """Make such a site; each route writes a head, and the stream a tail."""
    running = Running()
    site = await make_site(url, outside=[Middleware(running.middleware)], commit_on_exit=True)
    gate = gate_of(site.engine, site.judge)
    await site.engine.dispose()

    async def write(text: str) -> None:
        site.db.session.add(Note(text=text))
        await site.db.session.flush()

    async def wait() -> None:
        await site.db.session.execute(passing(gate))

    @site.app.get("/slow")
    async def slow() -> Response:
        await write("head")
        await wait()
        return Response("done")

    @site.app.get("/stream")
    async def stream() -> Response:
        async def chunks() -> AsyncIterator[bytes]:
            yield b"first"
            await write("tail")
            await wait()
            yield b"last"

        await write("head")
        return StreamingResponse(chunks())

    @site.app.get("/idle")
    async def idle() -> Response:
        async def chunks() -> AsyncIterator[bytes]:
            await write("tail")
            yield b"first"
            await asyncio.Event().wait()

        await write("head")
        return StreamingResponse(chunks())

    @site.app.get("/texts")
    async def texts() -> list[str]:
        return list(await site.db.session.scalars(select(Note.text).order_by(Note.text)))

    yield Gated(site, gate, running)


async def test_client_leaves_before_the_response(make_site: MakeSite, database_url: str) -> None:
    """A route that nobody cancels runs to its end though its client has left, and commits."""
    async with gated(make_site, database_url) as bench, serve(bench.site.app) as address:
        async with closed(bench.gate), raw_get(address, "/slow") as response:
            await bench.gate.reached()
            response.cut()
        await bench.running.none.wait()
        assert bench.site.checked_out() == 0
        async with raw_get(address, "/texts") as response:
            assert (await response.rest()).endswith(b'["head"]')


async def test_client_leaves_a_stream_in_a_statement(make_site: MakeSite, locking_url: str) -> None:
    """A stream whose client leaves does not wait for its statement; the tail is lost, the head stays."""
    async with (
        gated(make_site, locking_url) as bench,
        serve(bench.site.app) as address,
        closed(bench.gate),
    ):
        async with raw_get(address, "/stream") as response:
            assert await response.status() == 200
            await response.until(b"first")
            await bench.gate.reached()
            response.cut()
            await bench.running.none.wait()
        assert bench.site.checked_out() == 0
        async with raw_get(address, "/texts") as response:
            assert (await response.rest()).endswith(b'["head"]')


async def test_client_leaves_an_idle_stream(make_site: MakeSite, database_url: str) -> None:
    """A stream whose client leaves while it has nothing to send loses its tail, though nothing failed."""
    async with gated(make_site, database_url) as bench, serve(bench.site.app) as address:
        async with raw_get(address, "/idle") as response:
            await response.until(b"first")
            response.cut()
            await bench.running.none.wait()
        assert bench.site.checked_out() == 0
        async with raw_get(address, "/texts") as response:
            assert (await response.rest()).endswith(b'["head"]')


async def test_clients_leave_at_any_moment(make_site: MakeSite, locking_url: str) -> None:
    """Of many clients that leave at random moments those that saw a 200 have their row; the pool is whole."""
    rng = random.Random(7)  # noqa: S311  # a mix that can be had again, not a secret
    running = Running()
    site = await make_site(locking_url, outside=[Middleware(running.middleware)], commit_on_exit=True)

    @site.app.get("/{number}")
    async def route(number: int) -> Response:
        async def chunks() -> AsyncIterator[bytes]:
            yield b"first"
            site.db.session.add(Note(text=f"{number:02} tail"))
            await site.db.session.flush()
            yield b"last"

        site.db.session.add(Note(text=f"{number:02} head"))
        await site.db.session.flush()
        return StreamingResponse(chunks())

    promised: set[object] = set()

    async def visit(number: int) -> None:
        stage = rng.choice(["send", "look away", "head", "first", "stay"])
        async with raw_get(address, f"/{number}") as response:
            if stage == "look away":
                with suppress(TimeoutError):
                    async with asyncio.timeout(rng.random() / 50):
                        await response.status()
            elif stage != "send":
                assert await response.status() == 200
                promised.add(f"{number:02} head")
                if stage == "first":
                    await response.until(b"first")
                if stage == "stay":
                    assert b"last" in await response.rest()
                    whole.add(f"{number:02} tail")
            response.cut()

    whole: set[object] = set()
    async with serve(site.app) as address:
        await asyncio.gather(*(visit(number) for number in range(CLIENTS)))
        await running.none.wait()
        assert site.checked_out() == 0
    notes = set(await site.notes())
    assert promised | whole <= notes
    assert {f"{note}".replace("tail", "head") for note in notes} <= notes


async def stopped(address: Address) -> None:
    """Wait until a server that has been told to stop takes no more connections."""
    with suppress(ConnectionError):
        while True:
            _, writer = await asyncio.open_connection(address.host, address.port)
            writer.close()
            await writer.wait_closed()


async def test_server_stops_during_a_request(make_site: MakeSite, database_url: str) -> None:
    """A server that is told to stop lets a request finish, whose write is committed and answered."""
    async with gated(make_site, database_url) as bench, AsyncExitStack() as server:
        address = await server.enter_async_context(serve(bench.site.app))
        async with raw_get(address, "/slow") as response:
            async with closed(bench.gate):
                await bench.gate.reached()
                stopping = asyncio.create_task(server.aclose())
                await stopped(address)
            assert (await response.rest()).endswith(b"done")
            await stopping
        assert bench.site.checked_out() == 0
        assert await bench.site.notes() == ["head"]


async def test_server_gives_up_a_request(
    make_site: MakeSite, locking_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A request that the server cancels when its patience ends is rolled back, and the pool is whole."""
    async with gated(make_site, locking_url) as bench, AsyncExitStack() as server:
        address = await server.enter_async_context(serve(bench.site.app, patience=1))
        async with closed(bench.gate), raw_get(address, "/slow") as response:
            await bench.gate.reached()
            await server.aclose()
            await bench.running.none.wait()
            assert bench.site.checked_out() == 0
            assert b"done" not in await response.rest()
        assert await bench.site.notes() == []
    assert "timeout graceful shutdown exceeded" in caplog.text
