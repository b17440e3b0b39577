"""`@db.transactional(retries=N)`: a unit that lost to another one is done again, COMMIT included."""

import functools
import inspect
import re
import subprocess
import sys
import sysconfig
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_async_sqlalchemy import (
    ConfigurationError,
    MissingSessionError,
    Propagation,
    PropagationError,
    UnexpectedRollbackError,
    UnitOfWork,
    create_middleware_and_session_proxy,
)
from tests.support.bank import CONFLICT, SNAPSHOT, Account, Retries, balance, begin_by, deposit, nothing
from tests.support.site import MakeSite, Site
from tests.support.tables import Note

pytestmark = pytest.mark.usefixtures("retries")

# One that is overtaken by another, on each database by its own means.


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
        with pytest.raises(PropagationError, match=r"<locals>\.pay: retries cannot repeat part of an open"):
            await work()


async def test_refused_inside_a_request(sqlite_url: str, make_site: MakeSite) -> None:
    """A request's own unit is one that would be joined."""
    site = await make_site(sqlite_url)

    @site.db.transactional(retries=1)
    async def charge_card() -> None: ...

    @site.app.get("/")
    async def route() -> str:
        with pytest.raises(
            PropagationError, match=r"charge_card: retries cannot repeat part of an open unit"
        ):
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


@pytest.mark.parametrize("value", [-1, True, False, "3", 1.5, None], ids=repr)
def test_wrong_retries(transactional: Callable[..., Any], value: object) -> None:
    """`retries` is a whole number from 0 on; anything else is refused where the function is decorated."""
    with pytest.raises(ConfigurationError, match=rf"^retries must be .* not {re.escape(repr(value))}\.\n"):
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
    refusal = r"retries need .* fastapi-async-sqlalchemy\[retries\]\.\n\(Background on .*\)\n"
    assert re.fullmatch(refusal, run.stdout)
