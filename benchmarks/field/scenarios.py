"""The scenarios: each makes one request, or two, and says in a few words what came of it."""

import asyncio
import gc
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from inspect import isawaitable
from typing import Any

from fastapi import BackgroundTasks, HTTPException, Response
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse
from sqlalchemy.ext.asyncio import AsyncSession

from benchmarks.field.ground import Ground, ask, logged
from tests.support.gate import closed, gate_of, passing
from tests.support.tables import ORPHAN, Note, Reply

COMMITTED, ROLLED_BACK = "committed", "rolled back"
Scenario = Callable[[Ground], Awaitable[str]]


async def _outcome(ground: Ground, text: str) -> str:
    return COMMITTED if text in await ground.notes() else ROLLED_BACK


async def _write(session: AsyncSession, text: str) -> None:
    session.add(Note(text=text))
    flushing: Any = session.flush()
    if isawaitable(flushing):  # of a synchronous contender it is None
        await flushing


async def order(ground: Ground) -> str:
    """Look from another connection at the moment when the response starts."""
    seen: list[object] = []

    async def look() -> None:
        seen.extend(await ground.notes())

    @ground.app.get("/", status_code=201)
    async def route(session: AsyncSession = ground.session) -> None:
        session.add(Note(text="written"))

    await ask(ground.app, at_start=look)
    assert await ground.notes() == ["written"]
    return "before the response" if seen else "after the response"


async def failing_commit(ground: Ground) -> str:
    """Have COMMIT fail by a deferred constraint, in an application that has a handler for it."""

    @ground.app.get("/", status_code=201)
    async def route(session: AsyncSession = ground.session) -> None:
        session.add(Reply(**ORPHAN))

    answer = await ask(ground.app)
    words = {201: "201 for a row that was not stored", 409: "409, from the handler", 500: "500"}
    return words[answer.status or 500]


async def returned_404(ground: Ground) -> str:
    """Return a response with an error status after a write."""

    @ground.app.get("/")
    async def route(session: AsyncSession = ground.session) -> Response:
        session.add(Note(text="written"))
        return JSONResponse({"detail": "no such thing"}, status_code=404)

    assert (await ask(ground.app)).status == 404
    return await _outcome(ground, "written")


async def raised_404(ground: Ground) -> str:
    """Raise an HTTPException after a write."""

    @ground.app.get("/")
    async def route(session: AsyncSession = ground.session) -> None:
        session.add(Note(text="written"))
        raise HTTPException(404)

    assert (await ask(ground.app)).status == 404
    return await _outcome(ground, "written")


async def redirect(ground: Ground) -> str:
    """Answer a form by a redirect after a write."""

    @ground.app.get("/")
    async def route(session: AsyncSession = ground.session) -> Response:
        session.add(Note(text="written"))
        return RedirectResponse("/elsewhere", 303)

    assert (await ask(ground.app)).status == 303
    return await _outcome(ground, "written")


async def _tail(ground: Ground, failed: list[str]) -> str:
    """Say what became of the write of a tail.

    A leaked connection is out of the pool until the garbage collector finds its session.
    """
    if failed:
        return failed[0]
    if "tail" in await ground.notes():
        return COMMITTED
    return "lost, connection leaked" if ground.out() else "lost"


async def background(ground: Ground) -> str:
    """Write in a background task, by the session that the route had."""
    failed: list[str] = []

    async def work(session: AsyncSession) -> None:
        try:
            await _write(await ground.current(session), "tail")
        except Exception as error:  # noqa: BLE001  # which one it is, is the answer
            failed.append(type(error).__name__)

    @ground.app.get("/")
    async def route(tasks: BackgroundTasks, session: AsyncSession = ground.session) -> None:
        ground.used.append(session)
        session.add(Note(text="written"))
        tasks.add_task(work, session)

    await ask(ground.app)
    return await _tail(ground, failed)


async def stream(ground: Ground) -> str:
    """Write in the body of a stream, by the session that the route had."""
    failed: list[str] = []

    async def body(session: AsyncSession) -> AsyncGenerator[bytes]:
        yield b"first"
        try:
            await _write(await ground.current(session), "tail")
        except Exception as error:  # noqa: BLE001  # which one it is, is the answer
            failed.append(type(error).__name__)
        yield b"last"

    @ground.app.get("/")
    async def route(session: AsyncSession = ground.session) -> Response:
        ground.used.append(session)
        session.add(Note(text="written"))
        return StreamingResponse(body(session))

    await ask(ground.app)
    return await _tail(ground, failed)


async def pair(ground: Ground) -> str:
    """Let two tasks use one session at the same time, each to write a note."""
    tasks: list[asyncio.Task[None]] = []

    @ground.app.get("/")
    async def route(session: AsyncSession = ground.session) -> None:
        ground.used.append(session)
        await session.connection()
        tasks.extend(asyncio.create_task(_write(session, text), name=text) for text in ("one", "two"))
        await asyncio.gather(*tasks)

    with logged() as records:
        answer = await ask(ground.app)
        await asyncio.gather(*tasks, return_exceptions=True)
    assert await ground.notes() == []
    kind = type(answer.error)  # which one of SQLAlchemy's it is, changes from run to run
    errors = ["a SQLAlchemy error" if kind.__module__ == "sqlalchemy.exc" else kind.__name__]
    errors += ["an ERROR of the pool"] if any("pool" in record.name for record in records) else []
    errors += ["a connection out"] if ground.out() else []
    return ", ".join(errors)


async def late_task(ground: Ground) -> str:
    """Let a task that the route started write after its request has ended."""
    answered = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def late(session: AsyncSession) -> None:
        await answered.wait()
        await _write(await ground.current(session), "tail")

    @ground.app.get("/")
    async def route(session: AsyncSession = ground.session) -> None:
        ground.used.append(session)
        session.add(Note(text="written"))
        tasks.append(asyncio.create_task(late(session)))

    await ask(ground.app)
    answered.set()
    failed: list[str] = []
    try:
        await tasks[0]
    except Exception as error:  # noqa: BLE001  # which one it is, is the answer
        failed.append(type(error).__name__)
    return await _tail(ground, failed)


async def cancelled(ground: Ground) -> str:
    """Cancel a request in the middle of a statement, after a write."""
    gate = gate_of(ground.engine, ground.judge)

    @ground.app.get("/")
    async def route(session: AsyncSession = ground.session) -> None:
        await _write(session, "written")
        await session.execute(passing(gate))

    async with closed(gate):
        request = asyncio.create_task(ask(ground.app))
        reached = asyncio.create_task(gate.reached())
        await asyncio.wait({reached, request}, return_when=asyncio.FIRST_COMPLETED)
        if request.done():
            reached.cancel()
            raise AssertionError(request.result()) from request.result().error
        request.cancel()
        with suppress(asyncio.CancelledError):
            await request
        left = ground.out()
    outcome = await _outcome(ground, "written")
    return outcome + (", connection still out" if left else ", connection returned")


async def slow_client(ground: Ground) -> str:
    """Look whether a connection is out while the body is sent."""
    out: list[int] = []

    async def look() -> None:
        out.append(ground.out())

    @ground.app.get("/")
    async def route(session: AsyncSession = ground.session) -> str:
        await _write(session, "written")
        return "body"

    await ask(ground.app, at_body=look)
    return "held" if out[0] else "in the pool"


async def forgotten(ground: Ground) -> str:
    """Write where nothing commits: no option, and no commit by the route."""

    @ground.app.get("/")
    async def route(session: AsyncSession = ground.session) -> None:
        await _write(session, "written")

    with logged() as records:
        assert (await ask(ground.app)).status == 200
        gc.collect()
    assert await ground.notes() == []
    return "a WARNING" if records else "nothing"


async def outside(ground: Ground) -> str:
    """Write outside of any request."""
    async with ground.block() as session:
        session.add(Note(text="written"))
    return await _outcome(ground, "written")


async def deep(ground: Ground) -> str:
    """Ask for the request's session in a function that has no parameter for it."""
    ambient = ground.ambient
    if ambient is None:
        return "no"
    same: list[bool] = []

    @ground.app.get("/")
    async def route(session: AsyncSession = ground.session) -> None:
        same.append(await ambient() is session)

    await ask(ground.app)
    return "yes" if same == [True] else "no"


SCENARIOS: dict[str, tuple[str, Scenario]] = {
    "order": ("COMMIT comes", order),
    "failing_commit": ("COMMIT fails: the client gets", failing_commit),
    "raised_404": ("`HTTPException(404)` after a write", raised_404),
    "returned_404": ("a 404 returned after a write", returned_404),
    "redirect": ("a redirect after a write", redirect),
    "background": ("a background task writes with the request's session", background),
    "stream": ("a stream's body writes with the request's session", stream),
    "late_task": ("a task writes after its request has ended", late_task),
    "pair": ("two tasks write with one session at the same time", pair),
    "cancelled": ("the request is cancelled in a statement", cancelled),
    "slow_client": ("the connection while the body is sent", slow_client),
    "forgotten": ("logged if nothing commits a write", forgotten),
    "outside": ("a block outside requests", outside),
    "deep": ("the session without a parameter", deep),
}
"""By name: what the table says of each, and its program."""
ASYNCHRONOUS = {"pair", "cancelled"}
"""Scenarios that a synchronous session cannot play: its statements keep the event loop from anything else."""
