"""`@db.transactional(retries=N)`: a unit that lost to another one is done again, COMMIT included."""

import asyncio
import functools
import inspect
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
from attrs import Factory, asdict, define
from fastapi import FastAPI
from sqlalchemy import func, select, text, update
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column
from stamina.instrumentation import RetryDetails, get_on_retry_hooks, set_on_retry_hooks

from fastapi_async_sqlalchemy import (
    ConfigurationError,
    MissingSessionError,
    Propagation,
    PropagationError,
    UnexpectedRollbackError,
    UnitOfWork,
    create_middleware_and_session_proxy,
)
from tests.support.databases import JudgeFor
from tests.support.gate import closed, gate_of
from tests.support.site import MakeSite, Site, complaints
from tests.support.tables import ORPHAN, Base, Note, Reply, engine_with_tables

CONFLICT = r"could not serialize access|Record has changed since last read|database is locked|Deadlock found"
ROUNDS = 200
MANY = 10
"""Retries that a round never needs."""
RECORDED = pytest.mark.filterwarnings("ignore:record_property is incompatible:pytest.PytestWarning")
"""pytest writes properties of a test into every report, and warns of them if its schema is the strict one."""


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


@pytest.fixture
async def bank(database_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """A bank on each of the three databases."""
    async with open_bank(database_url, judge_for) as bank:
        yield bank


@pytest.fixture
async def locking_bank(locking_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """A bank on each of the two databases that lock rows."""
    async with open_bank(locking_url, judge_for) as bank:
        yield bank


@pytest.fixture
async def postgresql_bank(postgresql_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """A bank on PostgreSQL."""
    async with open_bank(postgresql_url, judge_for) as bank:
        yield bank


@pytest.fixture
async def mariadb_bank(mariadb_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """A bank on MariaDB."""
    async with open_bank(mariadb_url, judge_for) as bank:
        yield bank


@pytest.fixture
async def sqlite_bank(sqlite_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """A bank on SQLite."""
    async with open_bank(sqlite_url, judge_for) as bank:
        yield bank


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


@pytest.fixture(autouse=True)
def retries() -> Iterator[Retries]:
    """What is retried in the test."""
    hooks = get_on_retry_hooks()
    retries = Retries()
    set_on_retry_hooks([retries])
    yield retries
    set_on_retry_hooks(hooks)


# Two at once, many times.


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


async def go_off_call(bank: Site, doctor: int, call: Call) -> None:
    """Go off call if somebody else stays on call."""
    call.begin()
    session = bank.db.session
    on_call = await session.scalar(select(func.count()).select_from(Doctor).where(Doctor.on_call))
    await call.meet()
    if on_call == 2:
        await session.execute(update(Doctor).where(Doctor.id == doctor).values(on_call=False))


async def doctors_leave(bank: Site, leave: Callable[..., Coroutine[Any, Any, None]], rounds: int) -> Tally:
    """Let both doctors try to go off call at once, round after round."""
    tally = Tally()
    for _ in range(rounds):
        barrier = asyncio.Barrier(2)
        await tally.meet(*(leave(bank, doctor, Call(tally, barrier)) for doctor in (1, 2)))
        tally.violations += await bank.judge.scalar("SELECT count(*) FROM doctor WHERE on_call") == 0
        await bank.judge.execute("UPDATE doctor SET on_call = true")
    return tally


@RECORDED
@pytest.mark.timeout(180)
async def test_write_skew(
    locking_bank: Site, retries: Retries, record_property: Callable[[str, object], None]
) -> None:
    """Of two doctors who go off call at once under SERIALIZABLE one stays, in each of 200 rounds."""
    bank = locking_bank
    leave = bank.db.transactional(isolation_level="SERIALIZABLE", retries=MANY)(go_off_call)
    tally = await doctors_leave(bank, leave, ROUNDS)
    tally.report(retries, record_property)
    assert tally.rounds == ROUNDS


@RECORDED
@pytest.mark.parametrize("journal_mode", ["DELETE", "WAL"])
@pytest.mark.timeout(180)
async def test_two_readers_turn_writers(
    sqlite_bank: Site, retries: Retries, journal_mode: str, record_property: Callable[[str, object], None]
) -> None:
    """Of two doctors who go off call at once on SQLite one stays, too: his unit was busy, and tried again."""
    bank = sqlite_bank
    await bank.engine.dispose()
    await bank.judge.execute(f"PRAGMA journal_mode = {journal_mode}")
    async with bank.engine.connect():
        pass  # before 2.0.25 SQLAlchemy hangs where two tasks connect first after dispose()
    leave = bank.db.transactional(isolation_level="SERIALIZABLE", retries=MANY)(go_off_call)
    tally = await doctors_leave(bank, leave, 40)
    tally.report(retries, record_property)
    assert all(name.startswith("SQLITE_BUSY") for name in retries.kinds())


async def test_write_skew_without_serializable(locking_bank: Site, retries: Retries) -> None:
    """The schedule is a real one: under READ COMMITTED both doctors leave, and nothing conflicts."""
    leave = locking_bank.db.transactional(isolation_level="READ COMMITTED", retries=MANY)(go_off_call)
    tally = await doctors_leave(locking_bank, leave, 1)
    assert (tally.violations, tally.attempts, retries.errors) == (1, 2, [])


async def test_write_skew_without_retries(locking_bank: Site, retries: Retries) -> None:
    """Without `retries` the conflict reaches the caller, who was called once."""
    leave = locking_bank.db.transactional(isolation_level="SERIALIZABLE")(go_off_call)
    tally = await doctors_leave(locking_bank, leave, 1)
    assert (tally.violations, tally.attempts, tally.raised, retries.errors) == (0, 2, 1, [])


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


@RECORDED
@pytest.mark.timeout(180)
async def test_deadlock(
    locking_bank: Site, retries: Retries, record_property: Callable[[str, object], None]
) -> None:
    """Of two transfers that lock the accounts crosswise both succeed, in each of 200 rounds."""
    bank, tally = locking_bank, Tally()

    @bank.db.transactional(retries=MANY)
    async def work(source: int, target: int, call: Call) -> None:
        hurry(bank)
        await transfer(bank, source, target, call)

    for _ in range(ROUNDS):
        first, second = Call(tally, barrier := asyncio.Barrier(2)), Call(tally, barrier)
        await tally.meet(work(1, 2, first), work(2, 1, second))
        balances = await bank.judge.rows("SELECT balance FROM account")
        tally.violations += balances != [(100,), (100,)]
    tally.report(retries, record_property)
    assert tally.rounds == ROUNDS
    assert retries.kinds().keys() <= {"40P01", "1213"}


async def test_no_update_is_lost(bank: Site, retries: Retries) -> None:
    """Four at once write what each has computed from the same row, and no one's work undoes another's."""
    tally = Tally()

    @bank.db.transactional(isolation_level="SERIALIZABLE", retries=MANY)
    async def work(call: Call) -> None:
        call.begin()
        account = await bank.db.session.get_one(Account, 1)
        await call.meet()
        account.balance += 10

    barrier = asyncio.Barrier(4)
    await tally.meet(*(work(Call(tally, barrier)) for _ in range(4)))
    assert tally.raised == 0
    assert len(retries.errors) >= 3  # of the four one can be the first
    assert await balance(bank) == 140


# One that is overtaken by another, on each database by its own means.

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


@pytest.mark.parametrize("times", [0, 1, 3])
async def test_conflict_is_retried(bank: Site, retries: Retries, times: int) -> None:
    """A function that loses is called again with its arguments, and its last result is returned."""
    attempts: list[tuple[str, int]] = []

    @bank.db.transactional(retries=3)
    async def work(who: str, *, number: int) -> int:
        attempts.append((who, number))
        return await deposit(bank, overtaken=len(attempts) <= times)

    assert await work("Ada", number=7) == 110 + times
    assert attempts == [("Ada", 7)] * (times + 1)
    assert len(retries.errors) == times
    assert await balance(bank) == 110 + times


@pytest.mark.parametrize("allowed", [0, 1, 3])
async def test_retries_exhausted(bank: Site, retries: Retries, allowed: int) -> None:
    """When no retry is left the last attempt's own error is raised, after `retries + 1` calls."""
    errors: list[DBAPIError] = []

    @bank.db.transactional(retries=allowed)
    async def work() -> None:
        try:
            await deposit(bank, overtaken=True)
        except DBAPIError as error:
            errors.append(error)
            raise

    with pytest.raises(DBAPIError, match=CONFLICT) as raised:
        await work()
    assert raised.value is errors[-1]
    assert len(errors) == allowed + 1
    assert retries.errors == errors[:-1]
    assert bank.checked_out() == 0
    assert await balance(bank) == 100 + allowed + 1


async def test_retries_default_to_none(bank: Site) -> None:
    """Without `retries`, with and without parentheses, a conflict is raised at once."""
    attempts = 0

    async def work() -> None:
        nonlocal attempts
        attempts += 1
        await deposit(bank, overtaken=True)

    for number, function in enumerate((bank.db.transactional(work), bank.db.transactional()(work)), 1):
        with pytest.raises(DBAPIError, match=CONFLICT):
            await function()
        assert attempts == number


async def test_each_attempt_has_a_unit_of_its_own(bank: Site) -> None:
    """An attempt begins with a new unit and session; the one before is closed, and none is current after."""
    units: list[UnitOfWork[AsyncSession]] = []
    sessions: list[AsyncSession] = []
    states: list[list[bool]] = []

    @bank.db.transactional(retries=2)
    async def work() -> None:
        assert bank.checked_out() == 0
        units.append(bank.db.unit)
        sessions.append(bank.db.session)
        states.append([unit.closed for unit in units])
        assert bank.db.session.identity_map.values() == []
        await deposit(bank, overtaken=len(units) <= 2)

    await work()
    assert states == [[False], [True, False], [True, True, False]]
    assert len({*map(id, units)}) == len({*map(id, sessions)}) == 3
    with pytest.raises(MissingSessionError, match=r"open `async with db\(\):`"):
        _ = bank.db.session


async def test_hooks_belong_to_their_attempt(bank: Site) -> None:
    """Hooks that each attempt registers run once each: on_rollback of those that failed, one on_commit."""
    ran: list[tuple[str, int]] = []
    attempts = 0

    @bank.db.transactional(retries=5)
    async def work() -> None:
        nonlocal attempts
        attempts += 1
        number, unit = attempts, bank.db.unit
        unit.on_commit(lambda: ran.append(("commit", number)))
        unit.on_rollback(lambda: ran.append(("rollback", number)))
        unit.before_commit(lambda: ran.append(("before", number)))
        await deposit(bank, overtaken=number <= 2)

    await work()
    assert ran == [("rollback", 1), ("rollback", 2), ("before", 3), ("commit", 3)]


async def test_hooks_when_retries_are_exhausted(bank: Site) -> None:
    """If every attempt fails, on_rollback has run for each and on_commit never."""
    ran: list[str] = []

    @bank.db.transactional(retries=2)
    async def work() -> None:
        bank.db.unit.on_commit(lambda: ran.append("commit"))
        bank.db.unit.on_rollback(lambda: ran.append("rollback"))
        await deposit(bank, overtaken=True)

    with pytest.raises(DBAPIError, match=CONFLICT):
        await work()
    assert ran == ["rollback"] * 3


async def test_conflict_in_before_commit_is_retried(bank: Site) -> None:
    """A before_commit hook is part of the unit: its conflict has the function called again."""
    attempts = 0

    @bank.db.transactional(retries=1)
    async def work() -> None:
        nonlocal attempts
        attempts += 1
        bank.db.unit.before_commit(last_words)
        bank.db.unit.on_begin(begin_by(SNAPSHOT[bank.engine.dialect.name]))
        await bank.db.session.get_one(Account, 1)

    async def last_words() -> None:
        account = await bank.db.session.get_one(Account, 1)
        if attempts == 1:
            await bank.judge.execute("UPDATE account SET balance = balance + 1 WHERE id = 1")
        account.balance += 10
        await bank.db.session.flush()

    await work()
    assert attempts == 2
    assert await balance(bank) == 111


async def test_work_before_the_conflict_is_done_once(bank: Site) -> None:
    """What a failed attempt had written is rolled back: the row is there once."""
    attempts = 0

    @bank.db.transactional(retries=2)
    async def work() -> None:
        nonlocal attempts
        attempts += 1
        await deposit(bank, overtaken=False) if attempts == 3 else await write_then_lose()
        bank.db.session.add(Note(text="written"))

    async def write_then_lose() -> None:
        bank.db.unit.on_begin(begin_by(SNAPSHOT[bank.engine.dialect.name]))
        account = await bank.db.session.get_one(Account, 1)
        await bank.judge.execute("UPDATE account SET balance = balance + 1 WHERE id = 1")
        bank.db.session.add(Note(text="written"))
        account.balance += 10
        await bank.db.session.flush()

    await work()
    assert attempts == 3
    assert await bank.notes() == ["written"]


async def test_settings_hold_in_each_attempt(postgresql_bank: Site) -> None:
    """Each attempt runs under the isolation level that was asked for; afterwards it is gone."""
    bank = postgresql_bank
    levels: list[object] = []

    @bank.db.transactional(isolation_level="REPEATABLE READ", retries=2)
    async def work() -> None:
        session = bank.db.session
        levels.append(await session.scalar(text("SHOW transaction_isolation")))
        account = await session.get_one(Account, 1)
        if len(levels) <= 2:
            await bank.judge.execute("UPDATE account SET balance = balance + 1 WHERE id = 1")
        account.balance += 10

    await work()
    async with bank.db() as unit:
        levels.append(await unit.session.scalar(text("SHOW transaction_isolation")))
    assert levels == ["repeatable read"] * 3 + ["read committed"]
    assert await balance(bank) == 112


# Conflicts of other kinds.


async def test_lock_wait_timeout_is_retried(mariadb_bank: Site, retries: Retries) -> None:
    """MariaDB gives up waiting for a row's lock: the function is called again, and then it has the row."""
    bank = mariadb_bank
    attempts = 0
    async with bank.engine.connect() as holder:
        await holder.execute(update(Account).values(balance=1))

        @bank.db.transactional(retries=2)
        async def work() -> None:
            nonlocal attempts
            attempts += 1
            if attempts == 2:
                await holder.rollback()
            bank.db.unit.on_begin(begin_by("SET SESSION innodb_lock_wait_timeout = 1"))
            await bank.db.session.execute(update(Account).values(balance=Account.balance + 1))

        await work()
    assert retries.kinds() == {"1205": 1}
    assert attempts == 2
    assert await balance(bank) == 101


async def test_conflict_at_commit_is_retried(postgresql_bank: Site, retries: Retries) -> None:
    """PostgreSQL refuses COMMIT itself after a write skew: the whole function is called again."""
    bank = postgresql_bank
    reached_the_end: list[object] = []

    async def leave(doctor: int) -> None:
        session = bank.db.session
        on_call = await session.scalar(select(func.count()).select_from(Doctor).where(Doctor.on_call))
        if on_call == 2:
            await session.execute(update(Doctor).where(Doctor.id == doctor).values(on_call=False))
        reached_the_end.append((doctor, on_call))

    attempts = 0

    @bank.db.transactional(isolation_level="SERIALIZABLE", retries=1)
    async def first_one() -> None:
        nonlocal attempts
        attempts += 1
        await leave(1)
        if attempts == 1:
            other.set()
            await done.wait()

    async def second_one() -> None:
        await other.wait()
        async with bank.db(commit_on_exit=True, isolation_level="SERIALIZABLE"):
            await leave(2)
        done.set()

    other, done = asyncio.Event(), asyncio.Event()
    await asyncio.gather(first_one(), second_one())
    assert reached_the_end == [(1, 2), (2, 2), (1, 1)]
    assert retries.kinds() == {"40001": 1}
    assert await bank.judge.scalar("SELECT count(*) FROM doctor WHERE on_call") == 1


async def test_swallowed_conflict_is_retried(locking_bank: Site, retries: Retries) -> None:
    """A conflict that the function swallowed has taken its writes with it: the function is called again."""
    bank = locking_bank
    attempts = 0

    @bank.db.transactional(retries=1)
    async def work() -> None:
        nonlocal attempts
        attempts += 1
        bank.db.unit.on_begin(begin_by(SNAPSHOT[bank.engine.dialect.name]))
        bank.db.session.add(Note(text="written"))
        await bank.db.session.flush()
        try:
            await read_then_write(bank, overtaken=attempts == 1)
        except DBAPIError:
            assert attempts == 1

    await work()
    assert await bank.notes() == ["written"]
    assert attempts == 2
    assert [type(error) for error in retries.errors] == [UnexpectedRollbackError]
    assert re.search(CONFLICT, str(retries.errors[0].__cause__))


async def read_then_write(bank: Site, *, overtaken: bool) -> None:
    """Do as `deposit()` does in a transaction that has begun already, by SQL alone."""
    await bank.db.session.execute(select(Account.balance))
    if overtaken:
        await bank.judge.execute("UPDATE account SET balance = balance + 1 WHERE id = 1")
    statement = update(Account).where(Account.id == 1)
    await bank.db.session.execute(statement.values(balance=Account.balance + 10))


@pytest.mark.parametrize("inside", ["nothing", "savepoint", "nested"])
@pytest.mark.parametrize("swallows", [False, True])
async def test_deadlock_in_a_part(
    locking_bank: Site, retries: Retries, inside: str, *, swallows: bool
) -> None:
    """A deadlock in a part of the function has the whole called again; no write is lost, none is doubled."""
    bank = locking_bank
    swallowed = 0

    @bank.db.transactional(retries=MANY)
    async def work(source: int, target: int, call: Call) -> None:
        nonlocal swallowed
        hurry(bank)
        bank.db.session.add(Note(text=f"from {source}"))
        await bank.db.session.flush()
        try:
            await parts[inside](source, target, call)
        except DBAPIError:
            if not swallows:
                raise
            swallowed += 1

    async def nothing(source: int, target: int, call: Call) -> None:
        await transfer(bank, source, target, call)

    async def savepoint(source: int, target: int, call: Call) -> None:
        async with bank.db.unit.savepoint():
            await transfer(bank, source, target, call)

    parts = {"nothing": nothing, "savepoint": savepoint, "nested": nested_transactional(bank, nothing)}
    tally, barrier = Tally(), asyncio.Barrier(2)
    await tally.meet(work(1, 2, Call(tally, barrier)), work(2, 1, Call(tally, barrier)))
    assert tally.raised == 0
    assert await bank.notes() == ["from 1", "from 2"]
    if swallows and inside != "nothing" and bank.engine.dialect.name == "postgresql":
        # there a savepoint outlives a deadlock, so that whoever swallows it may go on
        assert (tally.attempts, swallowed, retries.errors) == (2, 1, [])
        return
    # PostgreSQL may let the loser overtake the one that it has freed, and both meet again
    assert tally.attempts == 2 + len(retries.errors) > 2
    expected = UnexpectedRollbackError if swallows else DBAPIError
    assert all(isinstance(error, expected) for error in retries.errors)
    assert await bank.judge.rows("SELECT balance FROM account") == [(100,), (100,)]


def nested_transactional(
    bank: Site, function: Callable[..., Coroutine[Any, Any, None]]
) -> Callable[..., Any]:
    """Return the function in a SAVEPOINT of its caller's unit."""
    return bank.db.transactional(propagation="nested")(function)


async def test_savepoint_does_not_hide_a_conflict(bank: Site) -> None:
    """A conflict that leaves a savepoint and then the function is retried like any other."""
    attempts = 0

    @bank.db.transactional(retries=1)
    async def work() -> None:
        nonlocal attempts
        attempts += 1
        bank.db.unit.on_begin(begin_by(SNAPSHOT[bank.engine.dialect.name]))
        async with bank.db.unit.savepoint():
            await read_then_write(bank, overtaken=attempts == 1)

    await work()
    assert attempts == 2
    assert await balance(bank) == 111


# What is not retried.


async def duplicate(session: AsyncSession) -> None:
    """Violate a constraint."""
    session.add_all([Note(text="same"), Note(text="same")])
    await session.flush()


async def bad_sql(session: AsyncSession) -> None:
    """Send what no database understands."""
    await session.execute(text("SELEKT 1"))


async def value_error(session: AsyncSession) -> None:
    """Fail without the database."""
    await session.execute(select(1))
    message = "of the caller's own"
    raise ValueError(message)


async def swallow(session: AsyncSession) -> None:
    """Swallow an error that is no conflict, so that COMMIT is refused."""
    with pytest.raises(IntegrityError, match=r"(?i)unique|duplicate"):
        await duplicate(session)


FAILURES: dict[Callable[[AsyncSession], Awaitable[None]], tuple[type[Exception], str]] = {
    duplicate: (IntegrityError, r"(?i)unique|duplicate"),
    bad_sql: (DBAPIError, r"(?i)syntax"),
    value_error: (ValueError, r"^of the caller's own$"),
    swallow: (UnexpectedRollbackError, r"cannot be committed|can only be rolled back"),
}


@pytest.mark.parametrize("fail", FAILURES, ids=lambda fail: fail.__name__)
async def test_other_errors_are_not_retried(
    bank: Site, retries: Retries, fail: Callable[[AsyncSession], Awaitable[None]]
) -> None:
    """An error that the next attempt would meet again is raised by the first one."""
    attempts = 0

    @bank.db.transactional(retries=3)
    async def work() -> None:
        nonlocal attempts
        attempts += 1
        await fail(bank.db.session)

    kind, match = FAILURES[fail]
    with pytest.raises(kind, match=match):
        await work()
    assert attempts == 1
    assert retries.errors == []
    assert await bank.notes() == []


async def test_callers_own_error_is_not_retried(bank: Site) -> None:
    """An error that the function raises from a conflict is its own word: it is not retried."""
    attempts = 0

    @bank.db.transactional(retries=3)
    async def work() -> None:
        nonlocal attempts
        attempts += 1
        try:
            await deposit(bank, overtaken=True)
        except DBAPIError as error:
            message = "somebody was faster"
            raise LookupError(message) from error

    with pytest.raises(LookupError, match=r"^somebody was faster$"):
        await work()
    assert attempts == 1


async def test_failing_commit_is_not_retried(
    deferring_url: str, make_site: MakeSite, retries: Retries
) -> None:
    """A constraint that is checked at COMMIT is no conflict."""
    site = await make_site(deferring_url)
    attempts = 0

    @site.db.transactional(retries=3)
    async def work() -> None:
        nonlocal attempts
        attempts += 1
        site.db.session.add(Reply(**ORPHAN))

    async with site.client():
        with pytest.raises(IntegrityError, match=r"(?i)foreign key"):
            await work()
    assert attempts == 1
    assert retries.errors == []


@pytest.mark.parametrize("during_commit", [True, False])
async def test_lost_connection_is_not_retried(
    postgresql_bank: Site, retries: Retries, caplog: pytest.LogCaptureFixture, *, during_commit: bool
) -> None:
    """A backend that is terminated, most of all during COMMIT, whose outcome is unknown then, ends it."""
    bank = postgresql_bank
    gate = gate_of(bank.engine, bank.judge)
    await bank.judge.execute(
        "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END $$"
    )
    deferred = "DEFERRABLE INITIALLY DEFERRED" if during_commit else ""
    await bank.judge.execute(
        f"CREATE CONSTRAINT TRIGGER wait AFTER UPDATE ON account {deferred} "
        "FOR EACH ROW EXECUTE FUNCTION wait()"
    )
    backends: list[object] = []
    ran: list[str] = []
    updated = False

    @bank.db.transactional(retries=3)
    async def work() -> None:
        nonlocal updated
        backends.append(await bank.db.session.scalar(text("SELECT pg_backend_pid()")))
        bank.db.unit.on_commit(lambda: ran.append("commit"))
        bank.db.unit.on_rollback(lambda: ran.append("rollback"))
        await bank.db.session.execute(update(Account).where(Account.id == 1).values(balance=0))
        updated = True

    async with closed(gate):
        task = asyncio.create_task(work())
        await gate.reached()
        await bank.judge.execute("SELECT pg_terminate_backend(:pid)", pid=backends[0])
        with pytest.raises(DBAPIError, match=r"(?i)connection|terminat|another operation"):
            await task
    assert updated == during_commit
    assert len(backends) == 1
    assert retries.errors == []
    assert ran == ([] if during_commit else ["rollback"])
    assert any("outcome is unknown" in line for line in complaints(caplog)) == during_commit
    assert await balance(bank) == 100


async def test_cancellation_is_not_retried(bank: Site, retries: Retries) -> None:
    """A cancelled call ends there and then, rolled back, even if it was cancelled in its second attempt."""
    ran: list[str] = []
    attempts = 0
    written = asyncio.Event()

    @bank.db.transactional(retries=3)
    async def work() -> None:
        nonlocal attempts
        attempts += 1
        bank.db.unit.on_rollback(lambda: ran.append("rollback"))
        await deposit(bank, overtaken=attempts == 1)
        written.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await written.wait()
    task.cancel("enough")
    with pytest.raises(asyncio.CancelledError, match=r"^enough$"):
        await task
    assert attempts == 2
    assert len(retries.errors) == 1
    assert ran == ["rollback"] * 2
    assert bank.checked_out() == 0
    assert await balance(bank) == 101


async def test_cancellation_in_the_pause(bank: Site, retries: Retries) -> None:
    """A call that is cancelled between two attempts holds nothing, and makes no further attempt."""
    attempts = 0

    @bank.db.transactional(retries=3)
    async def work() -> None:
        nonlocal attempts
        attempts += 1
        await deposit(bank, overtaken=True)

    task = asyncio.create_task(work())
    out: list[int] = []

    def cancel() -> None:
        out.append(bank.checked_out())
        task.cancel("enough")

    retries.then = cancel
    with pytest.raises(asyncio.CancelledError, match=r"^enough$"):
        await task
    assert attempts == 1
    assert out == [0]


# Inside another unit.


async def test_refused_inside_a_unit(bank: Site) -> None:
    """Inside a unit that it would join a function with retries is refused, by name, before it is called."""
    called = False

    @bank.db.transactional(retries=1)
    async def charge_card() -> None:
        nonlocal called
        called = True

    async with bank.db(commit_on_exit=True) as unit:
        unit.session.add(Note(text="kept"))
        with pytest.raises(
            PropagationError, match=r"charge_card: retries cannot .* propagation='requires_new'"
        ):
            await charge_card()
    assert not called
    assert await bank.notes() == ["kept"]


async def test_partial_is_refused_by_its_function_s_name(sqlite_worker: Site) -> None:
    """A `functools.partial` has no name: it is refused by that of its function, and without its arguments."""

    async def pay(account: str) -> str:
        return account

    db = sqlite_worker.db
    work = db.transactional(retries=1)(functools.partial(pay, "alice"))
    assert await work() == "alice"
    async with db():
        with pytest.raises(PropagationError, match=r"<locals>\.pay: retries cannot do a part of an open"):
            await work()


async def test_refused_inside_a_request(sqlite_url: str, make_site: MakeSite) -> None:
    """A request's own unit is one that would be joined."""
    site = await make_site(sqlite_url)

    @site.db.transactional(retries=1)
    async def charge_card() -> None: ...

    @site.app.get("/")
    async def route() -> str:
        with pytest.raises(PropagationError, match=r"charge_card: retries cannot do a part of an open unit"):
            await charge_card()
        return "refused"

    assert (await site.get()).json() == "refused"


async def test_requires_new_retries_inside_a_unit(bank: Site) -> None:
    """With `requires_new` a function retries on its own; the unit around it knows nothing of that."""
    attempts = 0

    @bank.db.transactional(propagation="requires_new", retries=2)
    async def work() -> None:
        nonlocal attempts
        attempts += 1
        assert bank.db.unit is not outer
        await deposit(bank, overtaken=attempts <= 2)

    async with bank.db() as outer:
        outer.session.add(Note(text="discarded"))
        outer.set_rollback_only()
        await work()
        assert bank.db.unit is outer
        assert not outer.closed
    assert attempts == 3
    assert await balance(bank) == 112
    assert await bank.notes() == []


async def test_never_with_retries(bank: Site) -> None:
    """With `never` a function retries where no unit is, and is refused where one is."""
    attempts = 0

    @bank.db.transactional(propagation="never", retries=2)
    async def work() -> None:
        nonlocal attempts
        attempts += 1
        await deposit(bank, overtaken=attempts <= 2)

    await work()
    assert attempts == 3
    async with bank.db():
        with pytest.raises(PropagationError, match=r"'never' must not run inside a unit of work"):
            await work()
    assert attempts == 3


@pytest.mark.parametrize("swallows", [False, True])
async def test_conflict_in_a_function_that_joined(bank: Site, retries: Retries, *, swallows: bool) -> None:
    """A conflict in a part has the whole done again, also if the whole had swallowed it."""
    calls: list[str] = []

    @bank.db.transactional
    async def part() -> None:
        calls.append("part")
        await deposit(bank, overtaken=calls == ["whole", "part"])

    @bank.db.transactional(retries=1)
    async def whole() -> None:
        calls.append("whole")
        try:
            await part()
        except DBAPIError:
            if not swallows:
                raise

    await whole()
    assert calls == ["whole", "part"] * 2
    assert isinstance(retries.errors[0], UnexpectedRollbackError if swallows else DBAPIError)
    assert await balance(bank) == 111


# Wrong arguments.


@pytest.fixture
def transactional() -> Callable[..., Any]:
    """The method of a pair that has no engine yet: decorators stand at the top of modules."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    return db.transactional


async def nothing() -> None:
    """Do nothing."""


@pytest.mark.parametrize("value", [-1, True, False, "3", 1.5, None], ids=repr)
def test_wrong_retries(transactional: Callable[..., Any], value: object) -> None:
    """`retries` is a whole number from 0 on; anything else is refused where the function is decorated."""
    with pytest.raises(ConfigurationError, match=rf"^retries must be .* not {re.escape(repr(value))}\.$"):
        transactional(retries=value)


@pytest.mark.parametrize("propagation", get_args(Propagation))
def test_propagation_with_retries(transactional: Callable[..., Any], propagation: str) -> None:
    """`mandatory` and `nested` always join, so that retries are refused where the function is decorated."""
    assert callable(transactional(propagation=propagation, retries=0)(nothing))
    if propagation not in {"mandatory", "nested"}:
        assert callable(transactional(propagation=propagation, retries=1)(nothing))
        return
    with pytest.raises(ConfigurationError, match=rf"^retries need .*propagation='{propagation}'"):
        transactional(propagation=propagation, retries=1)(nothing)


def plain() -> None:
    """Do nothing."""


async def generator() -> AsyncGenerator[int]:
    """Yield nothing much."""
    yield 1


@pytest.mark.parametrize("function", [plain, generator, 3], ids=["def", "generator", "int"])
@pytest.mark.parametrize("number", [0, 1])
def test_no_coroutine_function(transactional: Callable[..., Any], function: object, number: int) -> None:
    """What is no coroutine function is refused where it is decorated."""
    with pytest.raises(ConfigurationError, match=r"coroutine functions \(`async def`\), not"):
        transactional(retries=number)(function)


def test_wrapped_function_keeps_its_face(transactional: Callable[..., Any]) -> None:
    """A decorated function is still a coroutine function of its name, documentation and parameters."""
    for wrapped in (transactional(nothing), transactional(retries=1)(nothing)):
        assert (wrapped.__name__, wrapped.__doc__, wrapped.__wrapped__) == (
            "nothing",
            "Do nothing.",
            nothing,
        )
        assert inspect.iscoroutinefunction(wrapped)


WITHOUT_STAMINA = """
import asyncio, importlib.util
from fastapi_async_sqlalchemy import ConfigurationError, db
assert importlib.util.find_spec("stamina") is None

async def work(): return (await db.session.connection()).closed

once = db.transactional(work)
async def main():
    async with db.connect("sqlite+aiosqlite://"):
        return await once()
assert asyncio.run(main()) is False
try:
    db.transactional(retries=1)(work)
except ConfigurationError as error:
    print(error)
"""


def test_without_stamina(tmp_path: Path) -> None:
    """Where stamina is not installed retries are refused with the extra's name, and all else works."""
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith("stamina"):
            (tmp_path / entry.name).symlink_to(entry)
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{WITHOUT_STAMINA}"
    command = [sys.executable, "-I", "-S", "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # the program above
    assert (run.returncode, run.stderr) == (0, "")
    assert re.fullmatch(r"retries need .* fastapi-async-sqlalchemy\[retries\]\.\n", run.stdout)
