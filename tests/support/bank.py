"""A bank: accounts and doctors that two units write at once, and a record of the retries."""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from attrs import Factory, asdict, define
from fastapi import FastAPI
from sqlalchemy import update
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column
from stamina.instrumentation import RetryDetails

from fastapi_async_sqlalchemy import create_middleware_and_session_proxy
from tests.support.databases import JudgeFor
from tests.support.site import Site
from tests.support.tables import Base, engine_with_tables

CONFLICT = r"could not serialize access|Record has changed since last read|database is locked|Deadlock found"
MANY = 10
"""Retries that a round never needs."""


class Doctor(Base):
    """Somebody who is on call or not; at least one must be."""

    __tablename__ = "doctor"

    id: Mapped[int] = mapped_column(primary_key=True)
    on_call: Mapped[bool]


class Account(Base):
    """Money, of which none may come into being and none be lost."""

    __tablename__ = "account"

    id: Mapped[int] = mapped_column(primary_key=True)
    balance: Mapped[int]


@asynccontextmanager
async def open_bank(url: str, judge_for: JudgeFor) -> AsyncGenerator[Site]:
    """Open a process without an application, with two doctors and two accounts; SQLite waits 50 ms."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    connect_args = {"timeout": 0.05} if url.startswith("sqlite") else {}
    async with engine_with_tables(url, connect_args=connect_args) as engine:
        tables = [Base.metadata.tables["doctor"], Base.metadata.tables["account"]]
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all, tables)
        db.bind(engine)
        bank = Site(FastAPI(), db, engine, await judge_for(url))
        if engine.dialect.name == "sqlite":
            await bank.judge.execute("PRAGMA journal_mode = WAL")  # others write while one reads
        await bank.judge.execute("INSERT INTO doctor (id, on_call) VALUES (1, true), (2, true)")
        await bank.judge.execute("INSERT INTO account (id, balance) VALUES (1, 100), (2, 100)")
        yield bank
        assert bank.checked_out() == 0
        db.unbind()


@define(eq=False)
class Retries:
    """What stamina tells of before each pause: the error that caused it. `then` is called there."""

    errors: list[Exception] = Factory(list[Exception])
    then: Callable[[], object] | None = None

    def __call__(self, details: RetryDetails) -> None:
        """Note a retry."""
        self.errors.append(details.caused_by)
        if self.then is not None:
            self.then()

    def kinds(self) -> dict[str, int]:
        """Count the errors by what their databases call them."""
        return dict(Counter(kind(error) for error in self.errors))


def kind(error: Exception) -> str:
    """Return the database's own code of an error."""
    driver = error.orig if isinstance(error, DBAPIError) else None
    if driver is None:
        return type(error).__name__
    named: object = getattr(driver, "sqlite_errorname", None) or driver.args[0]
    return str(named if isinstance(named, int) else getattr(driver, "sqlstate", named))


@define
class Tally:
    """What many rounds came to."""

    rounds: int = 0
    calls: int = 0
    attempts: int = 0
    raised: int = 0
    violations: int = 0

    async def meet(self, *calls: Coroutine[Any, Any, None]) -> None:
        """Run one round: these calls at once; each returns, or raises the conflict itself."""
        self.rounds += 1
        self.calls += len(calls)
        results = await asyncio.gather(*calls, return_exceptions=True)
        errors = [error for error in results if error is not None]
        assert [error for error in errors if not re.search(CONFLICT, str(error))] == []
        self.raised += len(errors)

    def report(self, retries: Retries, record: Callable[[str, object], None]) -> None:
        """Write the totals into the report, and judge those that each schedule must show."""
        totals: dict[str, object] = asdict(self)
        totals["retries"] = self.attempts - self.calls
        totals["conflicts"] = len(retries.errors) + self.raised
        totals["kinds"] = retries.kinds()
        for name, value in totals.items():
            record(name, value)
        assert self.violations == 0
        assert self.raised == 0
        assert self.attempts - self.calls == len(retries.errors) > 0


@define
class Call:
    """One call of a function that is retried, which meets the other one in its first attempt only."""

    tally: Tally
    barrier: asyncio.Barrier
    attempts: int = 0
    met: bool = False

    def begin(self) -> None:
        """Count an attempt."""
        self.attempts += 1
        self.tally.attempts += 1

    async def meet(self) -> None:
        """Wait for the other one, once."""
        if not self.met:
            self.met = True
            await self.barrier.wait()


def begin_by(sql: str | None) -> Callable[[Connection], object]:
    """Make a hook that sends SQL at the beginning of a transaction."""
    return lambda connection: sql and connection.exec_driver_sql(sql)


def hurry(bank: Site) -> None:
    """Have PostgreSQL look for deadlocks soon."""
    sql = "SET LOCAL deadlock_timeout = '10ms'" if bank.engine.dialect.name == "postgresql" else None
    bank.db.unit.on_begin(begin_by(sql))


async def transfer(bank: Site, source: int, target: int, call: Call) -> None:
    """Take from one account, meet the other one who does so, and give to the other account."""
    call.begin()
    for account, amount in ((source, -1), (target, +1)):
        statement = update(Account).where(Account.id == account)
        await bank.db.session.execute(statement.values(balance=Account.balance + amount))
        await call.meet()


SNAPSHOT = {
    "postgresql": "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ",
    "mysql": "SET SESSION innodb_snapshot_isolation = ON",
    "sqlite": "BEGIN",  # else the driver begins at the first statement that writes
}
"""What makes a transaction refuse to write to rows that have changed since it began to read."""


async def deposit(bank: Site, *, overtaken: bool) -> int:
    """Add 10 to the first account; if overtaken, somebody else adds 1 between reading and writing."""
    bank.db.unit.on_begin(begin_by(SNAPSHOT[bank.engine.dialect.name]))
    session = bank.db.session
    account = await session.get_one(Account, 1)
    if overtaken:
        await bank.judge.execute("UPDATE account SET balance = balance + 1 WHERE id = 1")
    account.balance += 10
    await session.flush()
    return account.balance


async def balance(bank: Site) -> object:
    """Return what the first account has, as others see it."""
    return await bank.judge.scalar("SELECT balance FROM account WHERE id = 1")


async def nothing() -> None:
    """Do nothing."""
