"""Every error has a base, a builtin kin, and a message that tells what to do; it survives a copy."""

import copy
import pickle
import re
import tomllib
from collections.abc import Callable

import pytest
from attrs import frozen

from fastapi_async_sqlalchemy import (
    ConcurrentUseError,
    ConfigurationError,
    EngineAlreadyBoundError,
    FastAPIAsyncSQLAlchemyError,
    InDoubtError,
    MissingSessionError,
    PartialCommitError,
    PoolStatus,
    PoolTimeoutError,
    PropagationError,
    ReadOnlyError,
    ReplicaLagError,
    SandboxError,
    SessionNotInitialisedError,
    TransactionBegunError,
    UnexpectedRollbackError,
    UnitClosedError,
    WrongDatabaseError,
    exceptions,
)
from tests.support.pages import ROOT

PAGE = "https://github.com/h0rn3t/fastapi-async-sqlalchemy/blob/main/docs/errors.md"
URLS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]


@frozen
class Case:
    """An error as the package raises it, and what it must say."""

    error: FastAPIAsyncSQLAlchemyError
    builtin: type[Exception]
    facts: tuple[str, ...]
    remedy: str


SATURATED = PoolStatus(pool_class="AsyncAdaptedQueuePool", capacity=15, checked_out=15)
"""What a pool says of itself when nothing is left, as far as the message tells it."""

CASES = (
    Case(
        ConfigurationError("db_url must be a string or a sqlalchemy URL, not int."),
        ValueError,
        ("db_url", "int"),
        "must be a string",
    ),
    Case(EngineAlreadyBoundError("Primary"), ValueError, ("Primary",), "`db.unbind()`"),
    Case(SessionNotInitialisedError("Primary"), RuntimeError, ("Primary",), "`async with db.connect(url):`"),
    Case(
        MissingSessionError("Primary", "in a WebSocket", "open `async with db():` for each message"),
        LookupError,
        ("Primary", "in a WebSocket"),
        "`async with db():`",
    ),
    Case(UnitClosedError("Primary"), RuntimeError, ("Primary",), "`async with db.begin():`"),
    Case(
        ConcurrentUseError("Primary", "task 'intruder' called flush()", "task 'holder' is at work"),
        RuntimeError,
        ("Primary", "task 'holder' is at work", "task 'intruder' called flush()"),
        "`async with db():` inside the task",
    ),
    Case(
        WrongDatabaseError("Primary", "Entry is a model of AuditBase", ["ShopBase"], "Second"),
        TypeError,
        ("Primary", "Entry is a model of AuditBase", "only models of ShopBase"),
        "use a session of Second",
    ),
    Case(
        UnexpectedRollbackError("Primary", "a statement in it failed"),
        RuntimeError,
        ("Primary", "a statement in it failed"),
        "`async with db.unit.savepoint():`",
    ),
    Case(
        PropagationError("Primary", "no unit of work is open here", "open one around the call"),
        RuntimeError,
        ("Primary", "no unit of work is open here"),
        "open one around the call",
    ),
    Case(
        ReadOnlyError("Primary", 3), RuntimeError, ("Primary", "3 changed objects"), "without read_only=True"
    ),
    Case(TransactionBegunError("Primary", "do this"), RuntimeError, ("Primary",), "do this"),
    Case(
        PoolTimeoutError("Primary", 2.5, SATURATED, "give engine_args a larger pool_size"),
        TimeoutError,
        ("Primary", "within 2.5 seconds", "15 of 15 are checked out"),
        "a larger pool_size",
    ),
    Case(
        ReplicaLagError("Replica", "0/3000060", "0/3000028", 1.5),
        TimeoutError,
        ("Replica", "0/3000028", "not 0/3000060", "within 1.5 seconds"),
        "fallback=",
    ),
    Case(
        PartialCommitError(["Primary", "Second"], "Third"),
        RuntimeError,
        ("Primary, Second", "Third"),
        "compensating transaction",
    ),
    Case(
        InDoubtError("0123abcd", ["Primary"], ["Second", "Third"]),
        RuntimeError,
        ("0123abcd is committed on Primary", "left prepared on Second, Third"),
        "`python -m fastapi_async_sqlalchemy.recovery`",
    ),
    Case(
        SandboxError("two transactions are open: end the inner one first"),
        RuntimeError,
        ("sandbox", "two transactions are open"),
        "end the inner one first",
    ),
)
each_case = pytest.mark.parametrize("case", CASES, ids=[type(case.error).__name__ for case in CASES])


def test_every_error_is_tried_here() -> None:
    """A new error gets a case of its own."""
    tried = {type(case.error).__name__ for case in CASES}
    assert tried | {"FastAPIAsyncSQLAlchemyError"} == set(exceptions.__all__)


@each_case
def test_error_is_caught_by_base_and_by_builtin(case: Case) -> None:
    """One `except` catches all errors of the package, another the nearest builtin's."""
    for kind in (FastAPIAsyncSQLAlchemyError, case.builtin):
        with pytest.raises(kind, match=r"\w"):
            raise case.error


@each_case
def test_message_tells_facts_and_remedy(case: Case) -> None:
    """The message is one sentence, holds the facts, and ends with what to do; a second line has the link."""
    message, _, link = str(case.error).partition("\n")
    for fact in (*case.facts, case.remedy):
        assert fact in message
    assert message.endswith(".")
    assert link == f"(Background on this error at: {PAGE}#{type(case.error).__name__.lower()})"


def test_every_error_has_its_place_on_the_page() -> None:
    """The page that messages link to has an anchor for each class, with its causes, and for nothing else."""
    page = (ROOT / "docs/errors.md").read_text("utf-8")
    parts = re.split(r"^## `(\w+)`$", page, flags=re.MULTILINE)[1:]
    assert parts[::2] == [name for name in exceptions.__all__ if name != "FastAPIAsyncSQLAlchemyError"]
    for text in parts[1::2]:
        assert re.search(r"^1\. ", text, re.MULTILINE)
        assert re.search(r"^   \S", text, re.MULTILINE), "each cause has its remedy"
    assert PAGE.startswith(URLS["Source"])
    assert PAGE.endswith("/docs/errors.md")


class RefusedError(PoolTimeoutError):
    """A user's own subclass."""


def test_subclass_links_to_its_base() -> None:
    """An error of a user's own class is explained where the class is that it comes from."""
    error = RefusedError("Primary", 1, SATURATED, "wait")
    assert str(error).endswith("#pooltimeouterror)")
    assert "(Background" not in error.args[0]


def through_pickle(error: BaseException) -> BaseException:
    """Send an error to another process and back."""
    received: BaseException = pickle.loads(pickle.dumps(error))  # noqa: S301  # written here
    return received


@each_case
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, through_pickle])
def test_error_survives_a_copy(case: Case, duplicate: Callable[[BaseException], BaseException]) -> None:
    """An error that crosses a process, as from a worker, arrives with its message and its facts."""
    double = duplicate(case.error)
    assert type(double) is type(case.error)
    assert str(double) == str(case.error)
    assert vars(double) == vars(case.error)


def test_partial_commit_error_keeps_both_sides() -> None:
    """A handler reads which databases have committed and which one failed."""
    error = PartialCommitError(["Primary", "Second"], "Third")
    assert error.committed == ("Primary", "Second")
    assert error.failed == "Third"


def test_in_doubt_error_keeps_both_sides() -> None:
    """A handler reads whose outcome is known and whose is not; with none committed the message says less."""
    error = InDoubtError("0123abcd", ["Primary"], ["Second", "Third"])
    assert error.transaction == "0123abcd"
    assert error.committed == ("Primary",)
    assert error.in_doubt == ("Second", "Third")
    assert "committed on" not in str(InDoubtError("0123abcd", [], ["Primary", "Second"]))


@pytest.mark.parametrize("replayed", ["0/3000028", None])
def test_replica_lag_error_says_how_far_it_is(replayed: str | None) -> None:
    """A handler reads the position that was waited for, the one reached, and the seconds."""
    error = ReplicaLagError("Replica", "0/3000060", replayed, 1.5)
    assert (error.position, error.replayed, error.timeout) == ("0/3000060", replayed, 1.5)


@pytest.mark.parametrize(("timeout", "retry_after"), [(0.0, 1), (0.2, 1), (1.0, 1), (2.5, 3), (30, 30)])
def test_pool_timeout_error_says_when_to_try_again(timeout: float, retry_after: int) -> None:
    """A handler reads whole seconds for a Retry-After header, never none, and the pool's state."""
    error = PoolTimeoutError("Primary", timeout, SATURATED, "give engine_args a larger pool_size")
    assert (error.timeout, error.retry_after) == (timeout, retry_after)
    assert isinstance(error.retry_after, int)
    assert error.pool_status["checked_out"] == 15
