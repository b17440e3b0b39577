"""The tables of both databases; each base belongs to one of them."""

from datetime import datetime
from typing import Literal, NewType
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    ForeignKey,
    Identity,
    MetaData,
    String,
    UniqueConstraint,
    func,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

Isbn = NewType("Isbn", str)
OrderId = NewType("OrderId", int)
MessageId = NewType("MessageId", int)
Kind = Literal["confirmation", "sale"]

NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}
"""Each constraint has a name that migrations can drop and error handlers can read."""
TYPES = {
    Isbn: String(13),
    OrderId: BigInteger(),
    MessageId: BigInteger(),
    datetime: DateTime(timezone=True),
}


class ShopBase(DeclarativeBase):
    """The tables of the shop's database."""

    metadata = MetaData(naming_convention=NAMES)
    type_annotation_map = TYPES


class ReportingBase(DeclarativeBase):
    """The tables of the reporting database."""

    metadata = MetaData(naming_convention=NAMES)
    type_annotation_map = TYPES


class Book(ShopBase):
    """A title, its price, and how many copies are left."""

    __tablename__ = "book"
    __table_args__ = (CheckConstraint("cents > 0", "price"), CheckConstraint("stock >= 0", "stock"))

    isbn: Mapped[Isbn] = mapped_column(primary_key=True)
    title: Mapped[str]
    cents: Mapped[int]
    stock: Mapped[int]


class Order(ShopBase):
    """An order; its customer's key makes it safe to send again."""

    __tablename__ = "orders"
    __table_args__ = (UniqueConstraint("customer", "idempotency_key"),)

    id: Mapped[OrderId] = mapped_column(Identity(always=True), primary_key=True)
    customer: Mapped[str] = mapped_column(String(254))
    idempotency_key: Mapped[UUID]
    placed_at: Mapped[datetime] = mapped_column(server_default=func.now())
    lines: Mapped[list["OrderLine"]] = relationship(lazy="raise", order_by="OrderLine.isbn")


class OrderLine(ShopBase):
    """A quantity of one title, at the price when it was ordered."""

    __tablename__ = "order_line"
    __table_args__ = (CheckConstraint("quantity > 0", "quantity"),)

    order_id: Mapped[OrderId] = mapped_column(ForeignKey("orders.id"), primary_key=True)
    isbn: Mapped[Isbn] = mapped_column(ForeignKey("book.isbn"), primary_key=True)
    quantity: Mapped[int]
    cents: Mapped[int]
    book: Mapped[Book] = relationship(lazy="raise")


class Message(ShopBase):
    """A pending task for an order; the row is deleted when the task is done."""

    __tablename__ = "outbox"

    id: Mapped[MessageId] = mapped_column(Identity(always=True), primary_key=True)
    kind: Mapped[Kind] = mapped_column(String(20))
    order_id: Mapped[OrderId] = mapped_column(ForeignKey("orders.id"))
    due_at: Mapped[datetime] = mapped_column(server_default=func.now(), index=True)
    attempts: Mapped[int] = mapped_column(server_default="0")
    last_error: Mapped[str | None]


class Sale(ReportingBase):
    """An order line in the reports; its key makes a second copy harmless."""

    __tablename__ = "sale"

    order_id: Mapped[OrderId] = mapped_column(primary_key=True, autoincrement=False)
    isbn: Mapped[Isbn] = mapped_column(primary_key=True)
    title: Mapped[str]
    quantity: Mapped[int]
    cents: Mapped[int]
    sold_at: Mapped[datetime] = mapped_column(index=True)
