"""Routes whose session comes to two engines, and routes by a second driver."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, Final, cast

from fastapi import HTTPException, Request
from fastapi.responses import StreamingResponse
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.ext.horizontal_shard import ShardedSession

from campaign.case import current
from campaign.pairs import main, routed, second
from campaign.routes import add, hook, sleep, sleep_in_database, write
from campaign.tables import Copy
from fastapi_async_sqlalchemy import SessionArgs


async def both() -> None:
    """Write to both databases by one session."""
    await write("a", routed)
    await write("l", routed, Copy)


async def routed_both() -> None:
    """Write to both databases, to one of them again at the flush before COMMIT."""
    await both()
    add("m", routed, Copy)


async def routed_refuses() -> None:
    """Refuse after writes to both databases."""
    await both()
    raise HTTPException(409)


async def routed_aborted() -> None:
    """Swallow a statement's error on the engine that the pair does not know."""
    await both()
    with suppress(IntegrityError):
        await write("l", routed, Copy)


async def routed_hooked() -> None:
    """Write to the other engine alone, and more from hooks."""
    await write("l", routed, Copy)
    hook(routed)


def by_name(request: Request) -> dict[str, Any]:
    """Return the arguments of a statement that is to go to the ledger."""
    away: AsyncEngine = request.app.state.away
    return {"bind_arguments": {"bind": away.sync_engine}}


async def named(request: Request) -> None:
    """Name the other engine with the statement."""
    await write("a")
    await write("l", **by_name(request))


async def named_aborted(request: Request) -> None:
    """Swallow the error of a statement whose engine was named."""
    await named(request)
    with suppress(IntegrityError):
        await write("l", **by_name(request))


def shards(away: AsyncEngine) -> SessionArgs:
    """Return the arguments of a session whose parts are on two shards."""

    def choose(_: object, row: Any, __: object = None) -> str:
        return "away" if row is not None and row.part == "l" else "here"

    def all_(*_: object, **__: object) -> list[str]:
        return ["here", "away"]

    arguments = {
        "sync_session_class": ShardedSession,
        "shards": {"here": main.engine.sync_engine, "away": away.sync_engine},
        "shard_chooser": choose,
        "identity_chooser": all_,
        "execute_chooser": all_,
    }
    return cast("SessionArgs", arguments)  # sharding has arguments of its own


async def sharded(request: Request) -> None:
    """Write to both shards, in a unit of its own with a deadline."""
    async with main(commit_on_exit=True, session_args=shards(request.app.state.away), pool_timeout=2):
        add("a")
        add("l")
        await main.session.flush()
        await current.get().step()
    current.get().committed("own")
    current.get().committed("away", "ledger")


async def sharded_aborted(request: Request) -> None:
    """Swallow a statement's error on the second shard."""
    async with main(commit_on_exit=True, session_args=shards(request.app.state.away)):
        add("a")
        add("l")
        await main.session.flush()
        with suppress(IntegrityError):
            await write("l", bind_arguments={"shard_id": "away"})


async def second_plain() -> None:
    """Write two parts, one of them at the flush before COMMIT."""
    await write("a", second)
    add("b", second)


async def second_hooked() -> None:
    """Write, and more from hooks."""
    await write("a", second)
    hook(second)


async def second_stream() -> StreamingResponse:
    """Write in the stream."""

    async def body() -> AsyncIterator[str]:
        yield "first"
        await write("t", second)
        yield "last"

    await write("a", second)
    return StreamingResponse(body())


async def second_aborted() -> None:
    """Swallow a statement's error."""
    await write("a", second)
    with suppress(IntegrityError):
        await write("a", second)


async def second_timed_out() -> None:
    """Give up a statement, and refuse."""
    await write("a", second)
    await sleep_in_database(second)
    raise HTTPException(504)


async def second_exposed() -> None:
    """Refuse while a task is in the middle of a statement on the session's own connection."""
    await write("a", second)
    connection = await second.session.connection()

    async def wait() -> None:
        with suppress(SQLAlchemyError):
            await connection.execute(sleep(second))

    current.get().leave(wait())
    await asyncio.sleep(0.01)
    raise HTTPException(409)


ENDPOINTS: Final[tuple[Callable[..., Awaitable[object]], ...]] = (
    routed_both,
    routed_refuses,
    routed_aborted,
    routed_hooked,
    named,
    named_aborted,
    sharded,
    sharded_aborted,
    second_plain,
    second_hooked,
    second_stream,
    second_aborted,
    second_timed_out,
    second_exposed,
)
