"""A bank in one file: `python examples/quickstart.py` serves it on a temporary SQLite file.

It needs this package with its extra [sqlite], and uvicorn. Every request is one transaction: a status
below 400 commits it before the client hears of it, anything else rolls it back.
"""

import os
import socket
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, PositiveInt
from sqlalchemy import CheckConstraint, ForeignKey, String, event, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fastapi_async_sqlalchemy import SQLAlchemyMiddleware, db


class Base(DeclarativeBase):
    """The tables of the bank."""


class Account(Base):
    """An account is never overdrawn: its constraint refuses the UPDATE."""

    __tablename__ = "account"
    __table_args__ = (CheckConstraint("balance >= 0", name="never_overdrawn"),)

    name: Mapped[str] = mapped_column(String(50), primary_key=True)
    balance: Mapped[int]


class Transfer(Base):
    """Both names must be accounts, and the database looks at that when it commits, not earlier."""

    __tablename__ = "transfer"

    id: Mapped[int] = mapped_column(primary_key=True)
    sender: Mapped[str] = mapped_column(ForeignKey("account.name", deferrable=True, initially="DEFERRED"))
    receiver: Mapped[str] = mapped_column(ForeignKey("account.name", deferrable=True, initially="DEFERRED"))
    amount: Mapped[int]


class NewTransfer(BaseModel):
    """The body of a client's request."""

    sender: str
    receiver: str
    amount: PositiveInt


class Balance(BaseModel):
    """What a client reads."""

    name: str
    balance: int


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    """Make the tables, and three accounts the first time; outside a request you open a unit explicitly."""
    if db.engine.dialect.name == "sqlite":
        event.listen(db.engine.sync_engine, "connect", check_foreign_keys)
    await db.create_all(Base.metadata)
    async with db.begin() as unit:
        if await unit.session.get(Account, "alice") is None:
            unit.session.add_all(Account(name=name, balance=100) for name in ("alice", "bob", "carol"))
    yield


def check_foreign_keys(connection: Any, _: object) -> None:
    """SQLite checks foreign keys only on connections that ask for it."""
    connection.cursor().execute("PRAGMA foreign_keys = ON")


router = APIRouter()


@router.get("/accounts", response_model=list[Balance])
async def read_accounts() -> Sequence[Account]:
    """Return all accounts."""
    return (await db.session.scalars(select(Account).order_by(Account.name))).all()


@router.post("/transfers", status_code=201)
async def send_money(order: NewTransfer) -> int:
    """Move money and return the transfer's number; there is no commit() here, the response commits."""
    changes = [(order.sender, -order.amount), (order.receiver, order.amount)]
    for name, change in sorted(changes):  # always in one order, so that two transfers cannot deadlock
        moved = update(Account).where(Account.name == name).values(balance=Account.balance + change)
        await db.session.scalar(moved.returning(Account.balance))
    transfer = Transfer(sender=order.sender, receiver=order.receiver, amount=order.amount)
    db.session.add(transfer)
    await db.session.flush()
    return transfer.id


async def refuse(_: Request, error: Exception) -> JSONResponse:
    """Answer 409 where a constraint says no, be it at a statement or at COMMIT."""
    return JSONResponse({"refused": str(getattr(error, "orig", error))}, status_code=409)


def create_app(db_url: str) -> FastAPI:
    """Create the application for one database."""
    app = FastAPI(title="Quickstart", lifespan=lifespan)
    app.add_middleware(SQLAlchemyMiddleware, db_url=db_url, commit_on_exit=True)
    app.include_router(router)
    app.add_exception_handler(IntegrityError, refuse)
    return app


GUIDE = """
Open  {url}{page}

Read the balances:
  curl {url}/accounts
Write, and read again: the money has moved.
  {post} '{{"sender": "alice", "receiver": "bob", "amount": 30}}' {url}/transfers
Let COMMIT fail: there is no zoe, so a 409 comes back, and nothing has left alice's account.
  {post} '{{"sender": "alice", "receiver": "zoe", "amount": 30}}' {url}/transfers
Let a statement fail: carol has less than that, and bob got nothing either.
  {post} '{{"sender": "carol", "receiver": "bob", "amount": 999}}' {url}/transfers

Ctrl-C ends it and removes the database.
"""
POST = "curl -i -H 'Content-Type: application/json' -d"


def listen(port: int) -> socket.socket:
    """Listen on a local port, or on a free one if that port is taken."""
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError:
        return socket.create_server(("127.0.0.1", 0))


def serve(make_app: Callable[[str], FastAPI], page: str) -> None:
    """Serve an application on a temporary SQLite file until Ctrl-C."""
    port = int(os.environ.get("PORT", "8000"))
    with TemporaryDirectory(prefix="quickstart-") as folder, listen(port) as listener:
        app = make_app(f"sqlite+aiosqlite:///{Path(folder, 'bank.db').as_posix()}")
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        print(GUIDE.format(url=url, page=page, post=POST), flush=True)
        with suppress(KeyboardInterrupt):
            uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    serve(create_app, "/docs")
