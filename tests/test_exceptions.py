"""Every error has a base, a builtin kin, and a message that tells what to do; it survives a copy."""

import copy
import pickle
from collections.abc import Callable

import pytest
from attrs import frozen

from fastapi_async_sqlalchemy import (
    ConcurrentUseError,
    ConfigurationError,
    EngineAlreadyBoundError,
    FastAPIAsyncSQLAlchemyError,
    MissingSessionError,
    PartialCommitError,
    SessionNotInitialisedError,
    UnexpectedRollbackError,
    UnitClosedError,
    exceptions,
)


@frozen
class Case:
    """An error as the package raises it, and what it must say."""

    error: FastAPIAsyncSQLAlchemyError
    builtin: type[Exception]
    facts: tuple[str, ...]
    remedy: str


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
    Case(UnitClosedError("Primary"), RuntimeError, ("Primary",), "`async with db():`"),
    Case(
        ConcurrentUseError("task 'holder'", "execute", "task 'intruder'", "flush"),
        RuntimeError,
        ("task 'holder'", "execute()", "task 'intruder'", "flush()"),
        "`async with db():` inside the task",
    ),
    Case(
        UnexpectedRollbackError("a statement in it failed"),
        RuntimeError,
        ("a statement in it failed",),
        "`async with db.unit.savepoint():`",
    ),
    Case(
        PartialCommitError(["Primary", "Second"], "Third"),
        RuntimeError,
        ("Primary, Second", "Third"),
        "compensating transaction",
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
    """The message is one sentence, holds the facts, and ends with what to do."""
    message = str(case.error)
    for fact in (*case.facts, case.remedy):
        assert fact in message
    assert message.endswith(".")
    assert "\n" not in message


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
