"""`@db.transactional(retries=N)`: many rounds of two at once, whose writes conflict."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
from sqlalchemy import func, select, update

from tests.support.bank import (
    MANY,
    Account,
    Call,
    Doctor,
    Retries,
    Tally,
    balance,
    hurry,
    open_bank,
    transfer,
)
from tests.support.databases import JudgeFor
from tests.support.site import Site

pytestmark = pytest.mark.usefixtures("retries")
ROUNDS = 200
RECORDED = pytest.mark.filterwarnings("ignore:record_property is incompatible:pytest.PytestWarning")
"""pytest writes properties of a test into every report, and warns of them if its schema is the strict one."""


@pytest.fixture
async def sqlite_bank(sqlite_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """A bank on SQLite."""
    async with open_bank(sqlite_url, judge_for) as bank:
        yield bank


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


@pytest.mark.slow
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


@pytest.mark.slow
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
