"""The routes of one unit on one engine: one for each way to write; see promise.py for what they owe."""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from inspect import signature
from typing import Annotated, Any, Final, Literal

from fastapi import BackgroundTasks, Depends, HTTPException, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import Select, func, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from campaign.case import current
from campaign.pairs import ledger, main, manual
from campaign.tables import ACCOUNTS, ANCHOR, Account, Anchor, Copy, Entry, Pledge, Transfer
from fastapi_async_sqlalchemy import SessionProxy

LONG = 3.0
"""Seconds that the database sleeps for a handler that does not wait."""
PATIENCE = 30.0
"""Seconds that a stream waits for its client to leave."""


class DomainError(Exception):
    """Answered with 409."""


class ForgivenError(Exception):
    """Answered with 200, and rolled back all the same."""


class PartError(Exception):
    """Leaves a block whose own part is to be undone."""


async def write(
    part: str, db: SessionProxy[AsyncSession] = main, table: type[Entry | Copy] = Entry, **arguments: Any
) -> None:
    """Write one part of what the request is to write, at once; the arguments are those of `execute()`."""
    case = current.get()
    await case.step()
    values = {"number": case.number, "part": part, "route": case.route}
    await db.session.execute(insert(table).values(values), **arguments)
    await case.step()


def add(part: str, db: SessionProxy[AsyncSession] = main, table: type[Entry | Copy] = Entry) -> None:
    """Add one part to the session; the next flush writes it."""
    case = current.get()
    db.session.add(table(number=case.number, part=part, route=case.route))


async def write_alone(part: str, db: SessionProxy[AsyncSession] = main) -> None:
    """Write one part in a unit of its own."""
    async with db(commit_on_exit=True):
        await write(part, db)


async def plain() -> None:
    """Write two parts, one of them at the flush before COMMIT."""
    await write("a")
    add("b")


async def read() -> int:
    """Write nothing."""
    return await main.session.scalar(select(func.count(Anchor.id))) or 0


async def refuse() -> None:
    """Raise HTTPException after a write."""
    await write("a")
    raise HTTPException(409)


async def returned() -> Response:
    """Return an error's status after a write."""
    await write("a")
    return Response(status_code=409)


async def domain() -> None:
    """Raise an error that is answered with 409."""
    await write("a")
    raise DomainError


async def forgiven() -> None:
    """Raise an error that is answered with 200."""
    await write("a")
    raise ForgivenError


async def stream_read() -> StreamingResponse:
    """Stream what was written."""

    async def body() -> AsyncIterator[str]:
        written = select(Entry.part).where(Entry.number == current.get().number)
        async for part in await main.session.stream_scalars(written):
            yield str(part)

    await write("a")
    return StreamingResponse(body())


async def stream_write() -> StreamingResponse:
    """Write in the stream."""

    async def body() -> AsyncIterator[str]:
        yield "first"
        await write("t")
        yield "second"
        await write("u")
        yield "last"

    await write("a")
    return StreamingResponse(body())


async def stream_fails() -> StreamingResponse:
    """Write in a stream that fails."""

    async def body() -> AsyncIterator[str]:
        await write("t")
        yield "first"
        raise PartError

    await write("a")
    return StreamingResponse(body())


async def stream_left() -> StreamingResponse:
    """Write in a stream whose client always leaves."""

    async def body() -> AsyncIterator[str]:
        await write("t")
        yield "first"
        await asyncio.sleep(PATIENCE)
        raise PartError

    await write("a")
    return StreamingResponse(body())


async def background(tasks: BackgroundTasks) -> None:
    """Write in a background task."""
    await write("a")
    tasks.add_task(write, "t")


async def background_fails(tasks: BackgroundTasks) -> None:
    """Write in a background task that fails."""

    async def fail() -> None:
        await write("t")
        raise PartError

    await write("a")
    tasks.add_task(fail)


async def writes_at_the_end() -> AsyncGenerator[None]:
    """Write in the teardown of a dependency."""
    yield
    await write("t")


def _torn_down(scope: Literal["function", "request"]) -> object:
    """Return the dependency; before 0.121 FastAPI knows one scope."""
    scopes: dict[str, Any] = {"scope": scope} if "scope" in signature(Depends).parameters else {}
    return Depends(writes_at_the_end, **scopes)


async def teardown_function(_: Annotated[None, _torn_down("function")]) -> None:
    """Write in a teardown before the response."""
    await write("a")


async def teardown_request(_: Annotated[None, _torn_down("request")]) -> None:
    """Write in a teardown after the response."""
    await write("a")


async def nested() -> None:
    """Swallow the error of a nested unit, outside of it."""
    await write("a")
    with suppress(PartError):
        async with main(propagation="nested"):
            await write("b")
            raise PartError
    await write("c")


async def savepoint() -> None:
    """Swallow a statement's error outside of its savepoint."""
    await write("a")
    with suppress(IntegrityError):
        async with main.unit.savepoint():
            await write("b")
            await write("a")
    await write("c")


async def swallow() -> None:
    """Swallow whatever leaves a nested unit, a broken connection too, and answer 200."""
    await write("a")
    with suppress(Exception):
        async with main(propagation="nested"):
            await write("b")
            raise PartError


async def aborted() -> None:
    """Swallow a statement's error without a savepoint: PostgreSQL's COMMIT would be a silent rollback."""
    await write("a")
    add("b")
    with suppress(IntegrityError):
        await write("a")


async def joined_fails() -> None:
    """Swallow the error of a joined block, which leaves nothing to commit."""
    await write("a")
    with suppress(PartError):
        async with main(propagation="required"):
            await write("b")
            raise PartError


async def own_unit(part: str) -> None:
    """Write in a unit of its own."""
    await write_alone(part)
    current.get().committed("own")


async def requires_new() -> None:
    """Write in the request's unit and in another one."""
    await write("a")
    await own_unit("b")


async def requires_new_refuses() -> None:
    """Refuse after another unit has committed."""
    await write("a")
    await own_unit("b")
    raise HTTPException(409)


async def gather() -> None:
    """Write in three units of three tasks, of which one fails, and in the request's."""

    async def fail() -> None:
        await write("i")
        raise PartError

    results = await main.gather(write("g"), write("h"), fail(), return_exceptions=True, max_concurrent=2)
    note("gh", results)
    await write("a")


def note(names: str, results: Sequence[BaseException | None]) -> None:
    """Note what has become of units of their own."""
    case = current.get()
    for name, result in zip(names, results, strict=False):
        if result is None:
            case.committed(name)
    for result in results:
        if result is not None:
            case.failed(result)


async def two() -> None:
    """Write to both databases."""
    await write("a")
    await write("l", ledger)


async def commit_by_hand(db: SessionProxy[AsyncSession] = main) -> None:
    """Commit in the middle."""
    await db.session.commit()
    current.get().committed("hand")
    await current.get().step()


async def hand() -> None:
    """Commit by hand, then go on."""
    await write("a")
    await commit_by_hand()
    await write("b")


async def hand_refuses() -> None:
    """Commit by hand, then refuse."""
    await write("a")
    await commit_by_hand()
    await write("b")
    raise HTTPException(409)


async def by_hand_only() -> None:
    """Commit by hand, and write more that nobody commits."""
    await write("a", manual)
    await commit_by_hand(manual)
    await write("b", manual)


async def move() -> None:
    """Move money from one account to another."""
    case = current.get()
    rng = random.Random(case.number)  # noqa: S311  # the same accounts for the same number
    source, target = rng.sample(range(ACCOUNTS), 2)
    amount = rng.randint(1, 50)
    values = {"number": case.number, "source": source, "target": target, "amount": amount}
    await main.session.execute(insert(Transfer).values(values))
    for account, change in ((source, -amount), (target, amount)):
        await case.step()
        balance = Account.balance + change
        await main.session.execute(update(Account).where(Account.id == account).values(balance=balance))
    await write("a")


async def transfer() -> None:
    """Move money, under the database's own isolation."""
    await move()


async def serial() -> None:
    """Move money in a serializable unit, which reads all accounts first."""
    async with main(commit_on_exit=True, isolation_level="SERIALIZABLE"):
        await main.session.scalars(select(Account.balance))
        await current.get().step()
        await move()
    current.get().committed("own")


async def deferred() -> None:
    """Write what is checked at COMMIT, and is right."""
    await write("a")
    main.session.add(Pledge(number=current.get().number, anchor_id=ANCHOR))


async def orphan() -> None:
    """Write what fails at COMMIT."""
    await write("a")
    main.session.add(Pledge(number=current.get().number, anchor_id=ANCHOR + 1))


async def hold(hold: float = 0.0) -> None:
    """Hold a connection as long as the client wants."""
    await write("a")
    await asyncio.sleep(hold)


def hook(db: SessionProxy[AsyncSession] = main) -> None:
    """Write from hooks: one part after COMMIT, another one after ROLLBACK."""
    db.unit.on_commit(lambda: write_after("h"))
    db.unit.on_rollback(lambda: write_after("r"))


async def write_after(part: str) -> None:
    """Write a part in a unit of its own from a hook; an error that comes later says nothing of its COMMIT."""
    await write_alone(part)
    current.get().ended["main"] += 1


async def hooked() -> None:
    """Write, and more from hooks."""
    await write("a")
    hook()


async def hooked_refuses() -> None:
    """Refuse a request that has hooks."""
    await hooked()
    raise HTTPException(409)


def sleep(db: SessionProxy[AsyncSession] = main) -> Select[Any]:
    """Return a statement that lets the database sleep."""
    return select(func.pg_sleep(LONG) if db.engine.dialect.name == "postgresql" else func.sleep(LONG))


async def sleep_in_database(db: SessionProxy[AsyncSession] = main) -> None:
    """Let the database sleep longer than the handler waits."""
    with suppress(TimeoutError):
        async with asyncio.timeout(0.02):
            await db.session.execute(sleep(db))
            message = "the database did not sleep"
            raise AssertionError(message)


async def timed_out() -> None:
    """Give up a statement, and refuse."""
    await write("a")
    await sleep_in_database()
    raise HTTPException(504)


async def impatient() -> None:
    """Give up a statement, which costs the connection, and answer as if nothing had been."""
    await write("a")
    await sleep_in_database()


ENDPOINTS: Final[tuple[Callable[..., Awaitable[object]], ...]] = (
    plain,
    read,
    refuse,
    returned,
    domain,
    forgiven,
    stream_read,
    stream_write,
    stream_fails,
    stream_left,
    background,
    background_fails,
    teardown_function,
    teardown_request,
    nested,
    savepoint,
    swallow,
    aborted,
    joined_fails,
    requires_new,
    requires_new_refuses,
    gather,
    two,
    hand,
    hand_refuses,
    transfer,
    serial,
    deferred,
    orphan,
    hold,
    hooked,
    hooked_refuses,
    timed_out,
    impatient,
)
"""Each is reached by its name, but for the one that commits by hand."""
