"""Orders from a stock, for any ASGI server: `uvicorn examples.deployment.app:app --workers 2`.

The settings are environment variables: DATABASE_URL, and POOL_SIZE and MAX_OVERFLOW for each process. The
database is PostgreSQL by asyncpg, and a migration has created the tables of tables.py.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError

from examples.deployment.tables import Order, Stock
from fastapi_async_sqlalchemy import (
    EngineArgs,
    SQLAlchemyMiddleware,
    add_pool_timeout_handler,
    db,
    violated_constraint,
)

DATABASE_URL = os.environ["DATABASE_URL"]
POOL_SIZE = int(os.environ.get("POOL_SIZE", "5"))
MAX_OVERFLOW = int(os.environ.get("MAX_OVERFLOW", "0"))
CLIENT_HAS_LEFT = 499


def engine_args() -> EngineArgs:
    """Return the engine's arguments; the name shows a connection's process in `pg_stat_activity`."""
    return {
        "pool_size": POOL_SIZE,
        "max_overflow": MAX_OVERFLOW,
        "pool_timeout": 3.0,
        "pool_pre_ping": True,
        "connect_args": {
            "timeout": 5,
            "command_timeout": 15,
            "server_settings": {
                "application_name": f"orders-{os.getpid()}",
                "client_connection_check_interval": "1s",  # end the statements of a dead process
            },
        },
    }


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    """Refuse to start if the database lacks the table."""
    async with db() as unit:
        await unit.session.execute(select(Order.id).limit(1))
    yield


app = FastAPI(lifespan=lifespan)
app.add_middleware(
    SQLAlchemyMiddleware,
    db_url=DATABASE_URL,
    engine_args=engine_args(),
    commit_on_exit=True,
    exclude_paths=["/health/live", "/health/ready"],
    max_concurrent_requests=4 * (POOL_SIZE + MAX_OVERFLOW),
    request_queue_timeout=5,
    pool_warm_up=1,
)
add_pool_timeout_handler(app)


@app.exception_handler(IntegrityError)
async def refuse(_: Request, error: IntegrityError) -> JSONResponse:
    """Answer 409 for a violated constraint."""
    return JSONResponse({"violates": violated_constraint(error)}, status_code=409)


@app.get("/health/live")
async def live() -> str:
    """Report that the process is alive."""
    return "alive"


@app.get("/health/ready")
async def ready() -> str:
    """Report whether this process can take requests."""
    try:
        await db.ping(timeout=1)
    except Exception as error:
        raise HTTPException(503, "the database does not answer") from error
    return "ready"


async def place(item: str) -> int:
    """Take one item from the stock, and return the order's number."""
    taken = update(Stock).where(Stock.item == item).values(amount=Stock.amount - 1)
    if await db.session.scalar(taken.returning(Stock.amount)) is None:
        raise HTTPException(404, "no such item")
    order = Order(item=item)
    db.session.add(order)
    await db.session.flush()
    return order.id


@app.post("/orders", status_code=201)
async def order_one(item: str) -> int:
    """Place an order, even if its client has left."""
    return await place(item)


@asynccontextmanager
async def while_connected(request: Request) -> AsyncGenerator[None]:
    """Cancel the block when the client leaves, even in the middle of a statement, and roll back."""
    await request.body()  # the next message is the disconnect
    scope = asyncio.timeout(None)

    async def watch() -> None:
        await request.receive()
        scope.reschedule(0)  # now

    try:
        async with scope:
            watching = asyncio.create_task(watch())
            try:
                yield
            finally:
                watching.cancel()
    except TimeoutError:
        if not scope.expired():
            raise
        raise HTTPException(CLIENT_HAS_LEFT) from None


@app.post("/orders/if-wanted", status_code=201)
async def order_if_wanted(item: str, request: Request) -> int:
    """Place an order, but only while its client is waiting."""
    async with while_connected(request):
        return await place(item)


@app.post("/orders/import", status_code=201)
async def import_orders(request: Request) -> int:
    """Place an order for each line of the body as it arrives, or none at all."""
    count, rest = 0, b""
    async for part in request.stream():  # raises ClientDisconnect
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            await place(line.decode())
            count += 1
    if rest:
        await place(rest.decode())
        count += 1
    return count


@app.post("/orders/export")
async def export_orders() -> StreamingResponse:
    """Send all new orders; they count as exported once the client has received the last one."""

    async def lines() -> AsyncIterator[str]:
        for order in await db.session.scalars(select(Order).where(~Order.exported).order_by(Order.id)):
            order.exported = True
            await db.session.flush()
            yield f"{order.id} {order.item}\n"

    return StreamingResponse(lines(), media_type="text/plain")
