"""The tables of the deployed application; `python -m examples.deployment.tables` creates them.

DATABASE_URL names the database.
"""

import asyncio
import os

from sqlalchemy import CheckConstraint, ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fastapi_async_sqlalchemy import db


class Base(DeclarativeBase):
    """The tables; migrations create them before any process starts."""


class Stock(Base):
    """The remaining stock of an item."""

    __tablename__ = "stock"
    __table_args__ = (CheckConstraint("amount >= 0", name="in_stock"),)

    item: Mapped[str] = mapped_column(primary_key=True)
    amount: Mapped[int]


class Order(Base):
    """An order, and whether it has been exported."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str] = mapped_column(ForeignKey("stock.item"))
    exported: Mapped[bool] = mapped_column(default=False)


async def create(db_url: str) -> None:
    """Create the tables, with 100 packets of tea in the stock."""
    async with db.connect(db_url):
        await db.create_all(Base.metadata)
        async with db.begin() as unit:
            await unit.session.merge(Stock(item="tea", amount=100))


if __name__ == "__main__":
    asyncio.run(create(os.environ["DATABASE_URL"]))
