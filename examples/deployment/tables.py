"""The tables of the deployed application."""

from sqlalchemy import CheckConstraint, ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


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
