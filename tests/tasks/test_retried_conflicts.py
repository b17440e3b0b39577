"""`@db.transactional(retries=N)`: which conflicts are retried, and which errors are not."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import pytest
from sqlalchemy import func, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_async_sqlalchemy import UnexpectedRollbackError
from tests.support.bank import (
    CONFLICT,
    MANY,
    SNAPSHOT,
    Account,
    Call,
    Doctor,
    Retries,
    Tally,
    balance,
    begin_by,
    deposit,
    hurry,
    open_bank,
    transfer,
)
from tests.support.databases import JudgeFor
from tests.support.gate import closed, gate_of
from tests.support.site import MakeSite, Site, complaints
from tests.support.tables import ORPHAN, Note, Reply

pytestmark = pytest.mark.usefixtures("retries")


@pytest.fixture
async def mariadb_bank(mariadb_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """A bank on MariaDB."""
    async with open_bank(mariadb_url, judge_for) as bank:
        yield bank


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
