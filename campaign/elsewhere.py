"""Routes whose work is done elsewhere: in a task, in another event loop, in a child process."""

import asyncio
import os
import signal
import sys
import threading
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Annotated, Final, NoReturn

from anyio import from_thread
from fastapi import Depends
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from campaign.case import current
from campaign.pairs import jobs, main, second
from campaign.routes import PartError, note, write, write_alone
from fastapi_async_sqlalchemy import ConcurrentUseError, FastAPIAsyncSQLAlchemyError, SessionProxy

COMMITTED, REFUSED, IN_DOUBT = 0, 3, 4
"""How a child process ends."""
CHILD_SECONDS = 5
_ONE_JOB = threading.Lock()
"""One event loop at a time uses the engine of jobs."""


async def _join(started: asyncio.Event, resume: asyncio.Event) -> None:
    async with main(propagation="required"):
        await write("b")
        started.set()
        await resume.wait()
        await write("e")


async def _start(resume: asyncio.Event) -> None:
    """Start a task that joins the unit, and return in the middle of its block."""
    started = asyncio.Event()
    task = current.get().leave(_join(started, resume))
    entered = asyncio.create_task(started.wait())
    await asyncio.wait({task, entered}, return_when=asyncio.FIRST_COMPLETED)
    entered.cancel()
    if task.done():
        await task  # it has failed before


async def joined_task() -> None:
    """Answer in the middle of a block that a task has joined: COMMIT waits for it."""
    await write("a")
    resume = asyncio.Event()
    await _start(resume)
    asyncio.get_running_loop().call_soon(resume.set)


async def joined_too_long() -> None:
    """Leave a unit in the middle of a task's block, which ends too late."""
    resume = asyncio.Event()
    try:
        async with main(commit_on_exit=True, pool_timeout=0.05):
            await write("a")
            await _start(resume)
    finally:
        resume.set()


async def joined_by_hand() -> None:
    """Commit by hand in the middle of a task's block, which is refused, and swallow that."""
    await write("a")
    resume = asyncio.Event()
    await _start(resume)
    try:
        with suppress(FastAPIAsyncSQLAlchemyError):
            await main.session.commit()
            message = "half a block was committed"
            raise AssertionError(message)
    finally:
        resume.set()


async def held() -> AsyncGenerator[None]:
    """Hold a block that has joined open around the response."""
    async with main(propagation="required"):
        await write("b")
        yield
        await write("e")


async def joined_dependency(_: Annotated[None, Depends(held)]) -> None:
    """Answer in the middle of a dependency's block, in the request's own task."""
    await write("a")


def other_loop() -> None:
    """Run an event loop beside the application's: it is refused, and disturbs nobody."""
    from_thread.run(write, "a")
    with suppress(ConcurrentUseError):
        asyncio.run(write_alone("o"))


def job() -> None:
    """Run one event loop after another, on an engine that serves nothing else."""
    with _ONE_JOB:
        for part in "jk":
            asyncio.run(write_alone(part, jobs))
            current.get().committed(part)


def child() -> None:
    """Write in a child process of a fork, by either driver, and meanwhile by all connections of the pool."""
    db = second if current.get().number % 2 else main
    from_thread.run(write, "a", db)
    pid = os.fork()
    if not pid:
        _be_child(db)
    try:
        from_thread.run(_write_beside, db)
    finally:
        _note_end(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


async def _write_beside(db: SessionProxy[AsyncSession]) -> None:
    note("gh", await db.gather(write("g", db), write("h", db), return_exceptions=True))
    await write("b", db)


async def _write_slowly(db: SessionProxy[AsyncSession]) -> None:
    async with db(commit_on_exit=True):
        await write("c", db)
        for _ in range(5):
            await db.session.execute(select(1))


def _note_end(code: int) -> None:
    case = current.get()
    if code == COMMITTED:
        case.begun["main"] += 1  # where nobody here could see it
        case.committed("child")
    elif code != REFUSED:
        case.doubt.add("main")
    if code:
        message = f"the child has ended with {code}"
        raise PartError(message)


def _be_child(db: SessionProxy[AsyncSession]) -> NoReturn:
    """Write, and end without any end of the parent's: nothing here belongs to the child."""
    signal.alarm(CHILD_SECONDS)
    case, code = current.get(), IN_DOUBT
    try:
        case.begun.clear()
        asyncio.run(_write_slowly(db))
        code = COMMITTED
    except Exception as error:  # noqa: BLE001  # the parent tells of it
        case.failed(error)
        code = IN_DOUBT if case.doubt else REFUSED
        traceback.print_exc(file=sys.stderr)
    finally:
        os._exit(code)


ENDPOINTS: Final[tuple[Callable[..., Awaitable[object] | None], ...]] = (
    joined_task,
    joined_too_long,
    joined_by_hand,
    joined_dependency,
    other_loop,
    job,
    child,
)
