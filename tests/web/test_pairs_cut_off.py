"""Two pairs in one application: many requests at once, and requests that are cut off."""

import asyncio
import itertools
import sys
from collections import Counter
from collections.abc import AsyncIterator

import pytest
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import PlainTextResponse, StreamingResponse
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_async_sqlalchemy import PartialCommitError
from tests.support.gate import closed, gate_of, passing
from tests.support.interruption import Exchange, Interrupted, Moment
from tests.support.pairs import COMBINATIONS, Pair, app_of, every_combination, id_of
from tests.support.serving import asgi_client, raw_get, serve
from tests.support.versions import survives_cancellation

WITH_ASYNCMY = [kinds for kinds in COMBINATIONS if "asyncmy" in kinds]
REQUESTS = 50
lost_by_wait_for = pytest.mark.xfail(
    sys.version_info < (3, 12),
    strict=True,
    reason="asyncmy connects by asyncio.wait_for, which loses a late cancellation; so does plain SQLAlchemy",
)


# Many at once, and cut off.


@every_combination
async def test_concurrent_requests_that_partly_fail(pair: Pair) -> None:
    """Of many concurrent requests each side holds what was acknowledged, and what was reported as partial."""
    app = pair.app(debug=True)  # whose answers tell their errors

    @app.get("/{number}")
    async def write(number: int) -> str:
        await pair.add(f"{number:02}")
        if number % 5 == 1:
            raise HTTPException(409)
        if number % 5 == 2:
            pair.outer.break_commit()
        if number % 5 == 3:
            pair.inner.break_commit()
        return "written"

    @app.exception_handler(PartialCommitError)
    async def partial(request: Request, error: PartialCommitError) -> PlainTextResponse:
        return PlainTextResponse(error.committed[0], status_code=503)

    async with asgi_client(app, raise_app_exceptions=False) as client:
        responses = await asyncio.gather(*(client.get(f"/{number}") for number in range(REQUESTS)))
    statuses = [response.status_code for response in responses]
    errors = Counter(response.text[-500:] for response in responses if response.status_code == 500)
    assert Counter(statuses) == {200: 20, 409: 10, 503: 10, 500: 10}, errors
    acknowledged = [f"{number:02}" for number, status in enumerate(statuses) if status == 200]
    partly = [f"{number:02}" for number, status in enumerate(statuses) if status == 503]
    assert await pair.notes() == (sorted(acknowledged + partly), acknowledged)
    assert pair.checked_out() == [0, 0]


@survives_cancellation
@every_combination
@pytest.mark.parametrize("waiting", ["inner", "outer"])
async def test_cancelled_in_a_statement(pair: Pair, waiting: str) -> None:
    """A request that is cancelled in a statement on one side is rolled back on both; the pools are whole."""
    app = pair.app()
    side = pair.inner if waiting == "inner" else pair.outer
    gate = gate_of(side.engine, side.judge)
    await side.engine.dispose()

    @app.get("/{name}")
    async def write(name: str) -> list[list[str]]:
        await pair.add(name)
        if name == "cancelled":
            await side.db.session.execute(passing(gate))
        return [await side.read() for side in pair.sides]

    async with asgi_client(app) as client, closed(gate):
        request = asyncio.create_task(client.get("/cancelled"))
        await gate.reached()
        request.cancel()
        if side.engine.dialect.name == "sqlite":  # its statement must end before its connection can be closed
            await gate.open()
        with pytest.raises(asyncio.CancelledError, match=r"^$"):
            await request
        assert pair.checked_out() == [0, 0]
        await gate.open()
        for name in ("1", "2"):
            assert (await client.get(f"/{name}")).status_code == 200
    assert await pair.notes() == (["1", "2"], ["1", "2"])


# asyncmy, cut off anywhere.


@survives_cancellation
@pytest.mark.parametrize("moment", ["waiting", "done"])
@pytest.mark.parametrize("kinds", WITH_ASYNCMY, ids=id_of)
async def test_cancelled_at_every_suspension(
    pair: Pair, moment: Moment, caplog: pytest.LogCaptureFixture
) -> None:
    """Cancelled anywhere, COMMIT included, each side has all or nothing, and its connections are clean."""
    app = pair.app()

    @app.get("/{name}")
    async def write(name: str) -> list[list[str]]:
        for note in (f"{name} a", f"{name} b"):
            await pair.add(note)
        return [[note for note in await side.read() if note.startswith(f"{name} ")] for side in pair.sides]

    async with asgi_client(app) as client:
        for point in itertools.count(1):
            for name in (f"before{point}", f"after{point}"):
                mine = [f"{name} a", f"{name} b"]
                if name.startswith("after"):
                    exchange, cancelled = await cancelled_at(app, f"/cut{point}", point, moment)
                    assert pair.checked_out() == [0, 0], point
                    await judge_attempt(pair, f"cut{point}", acknowledged=exchange.status == 200)
                    if not cancelled:
                        assert exchange.status == 200
                        assert point > 10
                        assert "COMMIT on" in caplog.text
                        return
                assert (await client.get(f"/{name}")).json() == [mine, mine], point


async def judge_attempt(pair: Pair, name: str, *, acknowledged: bool) -> None:
    """Look at what a request that was cut off has left: the inner side is never behind the outer one."""
    mine = {f"{name} a", f"{name} b"}
    inner, outer = [mine & set(notes) for notes in await pair.notes()]
    assert inner in (set(), mine), name
    assert outer in (set(), inner), name
    assert not acknowledged or outer == mine, name


async def cancelled_at(app: FastAPI, path: str, point: int, moment: Moment) -> tuple[Exchange, bool]:
    """Call an application and cancel it at one of its suspensions, if it has so many."""
    exchange, interrupted = Exchange(path), list[Interrupted[None]]()

    async def call() -> None:
        cancel = task.cancel
        interrupted.append(Interrupted(exchange.call(app), {point}, cancel, moment))
        await interrupted[0]

    task = asyncio.create_task(call())
    await asyncio.wait({task})
    assert task.cancelled() == (interrupted[0].cancellations > 0), point
    return exchange, task.cancelled()


@survives_cancellation
@pytest.mark.parametrize("moment", ["waiting", pytest.param("done", marks=lost_by_wait_for)])
@pytest.mark.parametrize("kinds", [("asyncmy", "asyncmy")], ids=id_of)
async def test_cancelled_while_connecting(pair: Pair, moment: Moment) -> None:
    """A request that is cancelled while asyncmy connects ends at once, and the next one is served."""
    app = pair.app()

    @app.get("/{name}")
    async def write(name: str) -> str:
        await pair.add(name)
        return name

    async with asgi_client(app) as client:
        for side in pair.sides:
            await side.engine.dispose()
        await cancelled_at(app, "/cut", 1, moment)
        assert pair.checked_out() == [0, 0]
        assert (await client.get("/next")).json() == "next"
    assert await pair.notes() == (["next"], ["next"])


class TellsTheEnd:
    """A middleware that tells when the application has returned from a request."""

    def __init__(self, app: ASGIApp, ended: asyncio.Event) -> None:
        self.app = app
        self.ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application, and tell when it has returned."""
        try:
            await self.app(scope, receive, send)
        finally:
            if scope["type"] == "http":
                self.ended.set()


@survives_cancellation
@pytest.mark.parametrize("kinds", WITH_ASYNCMY, ids=id_of)
async def test_client_leaves_in_a_statement(pair: Pair) -> None:
    """A client that leaves a stream in asyncmy's statement loses both tails, and no connection."""
    ended = asyncio.Event()
    app = app_of(Middleware(TellsTheEnd, ended=ended), pair.outer.mounted(), pair.inner.mounted())
    side = next(side for side in pair.sides if side.engine.driver == "asyncmy")
    gate = gate_of(side.engine, side.judge)

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            yield b"first"
            await pair.add("2 tail")
            await side.db.session.execute(passing(gate))

        await pair.add("1 head")
        return StreamingResponse(chunks())

    @app.get("/next")
    async def read() -> list[list[str]]:
        return [await side.read() for side in pair.sides]

    async with serve(app) as address:
        async with closed(gate), raw_get(address, "/stream") as response:
            await response.until(b"first")
            await gate.reached()
            response.cut()
            await ended.wait()
            assert pair.checked_out() == [0, 0]
        async with raw_get(address, "/next") as response:
            assert (await response.rest()).endswith(b'[["1 head"],["1 head"]]')
    assert await pair.notes() == (["1 head"], ["1 head"])
