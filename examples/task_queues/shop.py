"""The tables of a small shop, and the work of its tasks, which all task queues share.

The application and the workers need a PostgreSQL database with these tables, and Redis. The
environment variables DATABASE_URL and REDIS_URL name them.
"""

import os
from datetime import datetime

from sqlalchemy import BigInteger, ForeignKey, Identity, func
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fastapi_async_sqlalchemy import db

DATABASE_URL = os.environ.get("DATABASE_URL", "postgresql+asyncpg://app:secret@localhost/shop")
REDIS_URL = os.environ.get("REDIS_URL", "redis://localhost:6379/0")


class Base(DeclarativeBase):
    """The tables."""


class Product(Base):
    """A product in stock."""

    __tablename__ = "product"

    name: Mapped[str] = mapped_column(primary_key=True)
    stock: Mapped[int]


class Order(Base):
    """An order; its product is checked at COMMIT."""

    __tablename__ = "order"

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    product: Mapped[str] = mapped_column(ForeignKey("product.name", deferrable=True, initially="DEFERRED"))
    quantity: Mapped[int]
    state: Mapped[str] = mapped_column(default="new")


class DoneTask(Base):
    """The idempotency key of a task that has been done."""

    __tablename__ = "done_task"

    key: Mapped[str] = mapped_column(primary_key=True)
    done_at: Mapped[datetime] = mapped_column(server_default=func.now())


class OutboxMessage(Base):
    """A task to enqueue, stored in the same transaction as its order."""

    __tablename__ = "outbox_message"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    order_id: Mapped[int]


async def is_first_time(key: str) -> bool:
    """Store an idempotency key in the current transaction; return False if it was stored before."""
    statement = insert(DoneTask).values(key=key).on_conflict_do_nothing().returning(DoneTask.key)
    return await db.session.scalar(statement) is not None


async def reserve(order_id: int) -> bool:
    """Take an order's quantity from the stock, only once; return whether this call did so."""
    order = await db.session.get_one(Order, order_id)
    if not await is_first_time(f"reserve-{order_id}"):
        return False
    product = await db.session.get_one(Product, order.product)
    product.stock -= order.quantity
    order.state = "reserved"
    return True
