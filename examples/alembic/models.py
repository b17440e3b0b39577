"""The tables of two databases, and the names of their constraints."""

from sqlalchemy import CheckConstraint, ForeignKey, MetaData, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}
"""Migrations and error handlers can identify a constraint only by its name."""


class ShopBase(DeclarativeBase):
    """The tables of the shop's database."""

    metadata = MetaData(naming_convention=NAMES)


class Product(ShopBase):
    """A product of the shop."""

    __tablename__ = "product"
    __table_args__ = (CheckConstraint("stock >= 0", name="stock"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(80), unique=True)
    stock: Mapped[int]


class Sale(ShopBase):
    """A sale of a product."""

    __tablename__ = "sale"

    id: Mapped[int] = mapped_column(primary_key=True)
    product_id: Mapped[int] = mapped_column(ForeignKey("product.id"), index=True)


class AuditBase(DeclarativeBase):
    """The tables of the audit database."""

    metadata = MetaData(naming_convention=NAMES)


class Entry(AuditBase):
    """A recorded action."""

    __tablename__ = "entry"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(Text)
