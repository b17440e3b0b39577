"""The decision that a response makes: commit, roll back, or neither."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Final, TypeAlias

from attrs import frozen

from .._arguments.checks import boolean
from .._unit.settling import Decision
from ..exceptions import ConfigurationError

CommitWhen: TypeAlias = Callable[[int, BaseException | None], bool]
"""A caller's own rule: takes the status and the exception being handled, returns whether to commit."""


@frozen(kw_only=True)
class CommitPolicy:
    """The rule by which a response decides about its transaction."""

    success: Decision
    """The decision for a response that is a success."""
    commit_when: CommitWhen | None

    @property
    def commit_on_exit(self) -> bool:
        """Whether a success is committed."""
        return self.success is Decision.COMMIT

    @property
    def may_commit(self) -> bool:
        """Whether any response is committed; explicit commits of user code need no decision."""
        return self.commit_on_exit or self.commit_when is not None

    def response(self, status: int, exception: BaseException | None) -> Decision:
        """Return the decision at the start of the response."""
        if self.commit_when is not None:
            commits = boolean("what commit_when returns", self.commit_when(status, exception))
            return Decision.COMMIT if commits else Decision.ROLLBACK
        if status >= _ERROR_STATUS or exception is not None:
            return Decision.ROLLBACK
        return self.success

    def tail(self, standing: Decision | None, *, complete: bool) -> Decision:
        """Return the decision after the application has returned; one made at the response's start stands.

        An incomplete response is no success: the client has left, or the application gave up.
        """
        decision = standing or self.success
        return decision if complete or decision is not Decision.COMMIT else Decision.ROLLBACK


_ERROR_STATUS: Final = 400


def commit_policy(commit_on_exit: object, commit_when: CommitWhen | None) -> CommitPolicy:
    """Return a validated policy. A coroutine function is refused, because its result is always true."""
    rule: object = commit_when
    if rule is not None and (not callable(rule) or inspect.iscoroutinefunction(rule)):
        wanted = "a plain function of a status and an exception"
        msg = "commit_when"
        raise ConfigurationError(msg, wanted, commit_when)
    success = Decision.of_exit(commit_on_exit=boolean("commit_on_exit", commit_on_exit))
    return CommitPolicy(success=success, commit_when=commit_when)
