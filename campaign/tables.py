"""What the campaign writes: numbered rows in both databases, and accounts whose sum never changes."""

from sqlalchemy import BigInteger, ForeignKey, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

ACCOUNTS = 6
BALANCE = 1000
ANCHOR = 1
"""The only anchor there is: a pledge to another one fails at COMMIT."""


class Base(DeclarativeBase):
    """The metadata of all tables here."""


class Entry(Base):
    """A part of what one request wrote."""

    __tablename__ = "entry"

    number: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    part: Mapped[str] = mapped_column(String(20), primary_key=True)
    route: Mapped[str] = mapped_column(String(30))


class Away(DeclarativeBase):
    """The metadata of what is mapped a second time, to be found on another engine."""


class Copy(Away):
    """An entry that a routing session writes to the ledger."""

    __tablename__ = "entry"

    number: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    part: Mapped[str] = mapped_column(String(20), primary_key=True)
    route: Mapped[str] = mapped_column(String(30))


class Account(Base):
    """An account that transfers change."""

    __tablename__ = "account"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    balance: Mapped[int]


class Transfer(Base):
    """What a request moved from one account to another, in the transaction that moved it."""

    __tablename__ = "transfer"

    number: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    source: Mapped[int]
    target: Mapped[int]
    amount: Mapped[int]


class Anchor(Base):
    """What a pledge refers to."""

    __tablename__ = "anchor"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class Pledge(Base):
    """A row that PostgreSQL checks at COMMIT only; MariaDB has no such constraint."""

    __tablename__ = "pledge"

    number: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    anchor_id: Mapped[int] = mapped_column(ForeignKey("anchor.id", deferrable=True, initially="DEFERRED"))


def names(*, deferring: bool) -> list[str]:
    """Name the tables that a database can have."""
    return [name for name in Base.metadata.tables if deferring or name != "pledge"]
