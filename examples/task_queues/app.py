"""The shop's application, which enqueues a task for each order.

`uvicorn --factory examples.task_queues.app:create_app` serves it; shop.py names what it needs.
"""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy.exc import IntegrityError

from examples.task_queues import shop
from examples.task_queues.with_taskiq import broker, reserve
from fastapi_async_sqlalchemy import SQLAlchemyMiddleware, db

router = APIRouter()


class NewOrder(BaseModel):
    """The body of a client's request."""

    product: str
    quantity: int


@router.post("/orders", status_code=201)
async def order(new: NewOrder) -> int:
    """Store an order, and enqueue its reservation after COMMIT."""
    number = await store(new)

    async def enqueue() -> None:
        await reserve.kiq(number)

    db.unit.on_commit(enqueue)
    return number


@router.post("/orders/by-outbox", status_code=201)
async def order_by_outbox(new: NewOrder) -> int:
    """Store an order together with the message that enqueues its reservation."""
    number = await store(new)
    db.session.add(shop.OutboxMessage(order_id=number))
    return number


async def store(new: NewOrder) -> int:
    """Store an order in the request's transaction; return its number."""
    order = shop.Order(product=new.product, quantity=new.quantity)
    db.session.add(order)
    await db.session.flush()
    return order.id


async def refuse(_: Request, error: Exception) -> JSONResponse:
    """Answer 409 for an order that the database refuses at COMMIT."""
    return JSONResponse({"refused": type(error).__name__}, status_code=409)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    """Connect the queue."""
    await broker.startup()
    yield
    await broker.shutdown()


def create_app(database_url: str = shop.DATABASE_URL) -> FastAPI:
    """Create the application."""
    app = FastAPI(title="Shop", lifespan=lifespan)
    app.add_middleware(SQLAlchemyMiddleware, db_url=database_url, commit_on_exit=True)
    app.add_exception_handler(IntegrityError, refuse)
    app.include_router(router)
    return app
