"""What a test learns from its sandbox, and what it makes fail."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from attrs import Factory, define

from .._unit.place import Handle
from ..exceptions import ConfigurationError, SandboxError

if TYPE_CHECKING:
    from collections.abc import Container

    from sqlalchemy.ext.asyncio import AsyncSession

    from .._dialects.savepoints import CommitFailure
    from .._proxy import SessionProxy
    from .._session.watch import Watch

_FAILURES: Final = ("constraint", "conflict", "lost", "lost_after_commit")


@define(eq=False, repr=False)
class _Failure:
    """A failure that waits for its moment."""

    commit: CommitFailure | None
    """How a COMMIT fails; None for a statement whose connection is lost."""
    watch: Watch | None
    """The database; None for whichever comes first."""
    constraint: str | None = None
    """The name of the constraint that the COMMIT violates."""

    def __str__(self) -> str:
        where = "" if self.watch is None else f" on {self.watch.name}"
        if self.commit is None:
            return f"lose_connection(){where} has met no statement: send one after that call"
        met = "no COMMIT of a transaction that has written: commit a write after that call"
        return f"fail_commit({self.commit!r}){where} has met {met}"


@define(eq=False, repr=False)
class Sandbox:
    """What happened on the databases of a sandbox, and what fails next.

    ``statements`` holds what the application has sent, in order, without savepoints and settings.
    ``commits`` and ``rollbacks`` count transactions that wrote something, or tried to.
    """

    statements: list[str] = Factory(list[str])
    _commits: int = 0
    _rollbacks: int = 0
    _hooks_run: int = 0
    _failures: list[_Failure] = Factory(list[_Failure])

    @property
    def commits(self) -> int:
        """How many transactions that wrote something were committed."""
        return self._commits

    @property
    def rollbacks(self) -> int:
        """How many transactions that wrote something, or tried to, were rolled back."""
        return self._rollbacks

    @property
    def hooks_run(self) -> int:
        """How many hooks of units have run, those that failed among them; ``on_begin`` hooks do not count."""
        return self._hooks_run

    def assert_statements(self, *, at_most: int) -> None:
        """Raise ``AssertionError`` if the application has sent more; ``statements.clear()`` starts again."""
        if len(self.statements) > at_most:
            listed = "\n".join(f"{number}. {one}" for number, one in enumerate(self.statements, 1))
            sent = f"{len(self.statements)} statements were sent"
            message = f"{sent}, and at most {at_most} expected:\n{listed}"
            raise AssertionError(message)

    def reset(self) -> None:
        """Set all counters to 0, and forget the statements; failures that wait for their moment stay."""
        self._commits = self._rollbacks = self._hooks_run = 0
        self.statements.clear()

    def fail_commit(
        self,
        failure: CommitFailure = "constraint",
        *,
        constraint: str | None = None,
        on: SessionProxy[AsyncSession] | None = None,
    ) -> None:
        """Make the next COMMIT of a transaction that has written fail, with the driver's own error.

        The database refuses it because of a ``constraint`` or a ``conflict``; or the connection is ``lost``
        on the way, or ``lost_after_commit``. ``constraint`` is the name that the error carries, on SQLite
        only that of a CHECK. ``on`` is one database's proxy, if the sandbox has several.

        The sandbox raises ``SandboxError`` at its end if there was no such COMMIT.
        """
        if failure not in _FAILURES:
            msg = "failure"
            raise ConfigurationError(msg, f"one of {', '.join(_FAILURES)}", failure)
        if constraint is not None and failure != "constraint":
            message = f"A COMMIT that fails by {failure!r} violates no constraint: leave constraint out."
            raise ConfigurationError(message)
        self._failures.append(_Failure(failure, _watch(on), _name(constraint)))

    def lose_connection(self, *, on: SessionProxy[AsyncSession] | None = None) -> None:
        """Make the next statement find its connection lost; its transaction is rolled back."""
        self._failures.append(_Failure(None, _watch(on)))

    def _count_hook(self) -> None:
        """Count a hook that is about to run."""
        self._hooks_run += 1

    def _ended(self, *, committed: bool) -> None:
        """Record the end of a transaction that has written."""
        if committed:
            self._commits += 1
        else:
            self._rollbacks += 1

    def _commit_failure(self, watches: Container[Watch]) -> tuple[CommitFailure | None, str | None]:
        """Return how the COMMIT that is under way fails, if it does, and the constraint that it violates."""
        failure = self._next(watches, commit=True)
        return (failure.commit, failure.constraint) if failure is not None else (None, None)

    def _loses_connection(self, watches: Container[Watch]) -> bool:
        """Whether the statement that is about to be sent finds its connection lost."""
        return self._next(watches, commit=False) is not None

    def _next(self, watches: Container[Watch], *, commit: bool) -> _Failure | None:
        for failure in self._failures:
            here = failure.watch is None or failure.watch in watches
            if here and (failure.commit is not None) == commit:
                self._failures.remove(failure)
                return failure
        return None

    def _require_met(self) -> None:
        """Raise ``SandboxError`` if a failure still waits for its moment."""
        if self._failures:
            reason = f"{self._failures[0]}, or leave it out"
            raise SandboxError(reason)


def _name(constraint: object) -> str | None:
    if constraint is None or (isinstance(constraint, str) and constraint):
        return constraint
    msg = "constraint"
    raise ConfigurationError(msg, "the name of a constraint", constraint)


def _watch(proxy: object) -> Watch | None:
    if proxy is None:
        return None
    if not isinstance(proxy, Handle):
        msg = "on"
        wanted = "a proxy such as `db`"
        raise ConfigurationError(msg, wanted, proxy)
    watch: Watch = proxy._database.shared  # pyright: ignore[reportUnknownMemberType]  # for mypy a cast is redundant
    return watch
