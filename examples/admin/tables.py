"""The table of the shop, and the announcements of its changes."""

import logging

from sqlalchemy import CheckConstraint, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

logger = logging.getLogger(__name__)


class Base(DeclarativeBase):
    """The tables of the shop."""


class Product(Base):
    """A product."""

    __tablename__ = "product"
    __table_args__ = (CheckConstraint("price > 0", name="costs_something"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50), unique=True)
    price: Mapped[int]


def announce(name: str) -> None:
    """Announce a change; a hook calls this after COMMIT."""
    logger.info("%s has changed", name)
