"""A bank in one file: `python examples/quickstart.py` serves it on a temporary SQLite file.

It needs this package with its extra [sqlite], and uvicorn. Every request is one transaction: a status
below 400 commits it before the client receives the response; anything else rolls it back.

The other examples use `serve()`, too. A URL after the command names a database to use instead of the file.
"""

import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, PositiveInt
from sqlalchemy import CheckConstraint, ForeignKey, String, event, select, update
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import ConnectionPoolEntry

from fastapi_async_sqlalchemy import SQLAlchemyMiddleware, db


class Base(DeclarativeBase):
    """The tables of the bank."""


class Account(Base):
    """An account; its constraint refuses an UPDATE that would overdraw it."""

    __tablename__ = "account"
    __table_args__ = (CheckConstraint("balance >= 0", name="never_overdrawn"),)

    name: Mapped[str] = mapped_column(String(50), primary_key=True)
    balance: Mapped[int]


class Transfer(Base):
    """A transfer; the database checks only at COMMIT that both accounts exist."""

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
    """The body of a response."""

    name: str
    balance: int


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    """Create the tables, and three accounts the first time; outside a request, open a unit explicitly."""
    if db.engine.dialect.name == "sqlite":
        event.listen(db.engine.sync_engine, "connect", check_foreign_keys)
    await db.create_all(Base.metadata)
    async with db.begin() as unit:
        if await unit.session.get(Account, "alice") is None:
            unit.session.add_all(Account(name=name, balance=100) for name in ("alice", "bob", "carol"))
    yield


def check_foreign_keys(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    """Turn on foreign keys, which SQLite checks only on connections that request it."""
    connection.cursor().execute("PRAGMA foreign_keys = ON")


router = APIRouter()


@router.get("/accounts", response_model=list[Balance])
async def read_accounts() -> Sequence[Account]:
    """Return all accounts."""
    return (await db.session.scalars(select(Account).order_by(Account.name))).all()


@router.post("/transfers", status_code=201)
async def send_money(order: NewTransfer) -> int:
    """Move money and return the transfer's number; the response commits, so there is no commit() here."""
    changes = [(order.sender, -order.amount), (order.receiver, order.amount)]
    for name, change in sorted(changes):  # a fixed order prevents deadlocks between transfers
        moved = update(Account).where(Account.name == name).values(balance=Account.balance + change)
        await db.session.scalar(moved.returning(Account.balance))
    transfer = Transfer(sender=order.sender, receiver=order.receiver, amount=order.amount)
    db.session.add(transfer)
    await db.session.flush()
    return transfer.id


async def refuse(_: Request, error: Exception) -> JSONResponse:
    """Answer 409 if a constraint is violated, at a statement or at COMMIT."""
    return JSONResponse({"refused": str(getattr(error, "orig", error))}, status_code=409)


def create_app(db_url: str) -> FastAPI:
    """Create the application for one database."""
    app = FastAPI(title="Quickstart", lifespan=lifespan)
    app.add_middleware(SQLAlchemyMiddleware, db_url=db_url, commit_on_exit=True)
    app.include_router(router)
    app.add_exception_handler(IntegrityError, refuse)
    return app


GUIDE = """
Open  {url}/docs

Read the balances:
  curl {url}/accounts
Transfer money, then read the balances again.
  {post} '{{"sender": "alice", "receiver": "bob", "amount": 30}}' {url}/transfers
Make COMMIT fail: there is no account zoe, so the response is a 409, and alice's balance is unchanged.
  {post} '{{"sender": "alice", "receiver": "zoe", "amount": 30}}' {url}/transfers
Make a statement fail: carol has less money than that, and bob's balance is also unchanged.
  {post} '{{"sender": "carol", "receiver": "bob", "amount": 999}}' {url}/transfers
"""
POST = "curl -i -H 'Content-Type: application/json' -d"


def listen(port: int) -> socket.socket:
    """Listen on a local port, or on a free one if that port is taken."""
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError:
        return socket.create_server(("127.0.0.1", 0))


def serve(make_app: Callable[[str], FastAPI], guide: str) -> None:
    """Serve an application, by default on a temporary SQLite file, until Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    port = int(os.environ.get("PORT", "8000"))
    with TemporaryDirectory(prefix="example-") as folder, listen(port) as listener:
        temporary = f"sqlite+aiosqlite:///{Path(folder, 'example.db').as_posix()}"
        app = make_app(sys.argv[1] if sys.argv[1:] else temporary)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        print(guide.format(url=f"http://{address}", address=address, post=POST, python=sys.executable))
        print("Ctrl-C stops the program and removes its temporary files.\n", flush=True)
        # a stream of events does not end by itself
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3)
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    serve(create_app, GUIDE)
