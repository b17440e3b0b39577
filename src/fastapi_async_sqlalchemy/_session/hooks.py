"""Hooks around a unit's transactions, and marks that forbid COMMIT."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from time import perf_counter
from typing import TYPE_CHECKING, Final, TypeAlias

from anyio import CancelScope
from attrs import Factory, define
from sqlalchemy.engine import Connection

from ..exceptions import TransactionBegunError, UnexpectedRollbackError, _safe_repr

if TYPE_CHECKING:
    from sqlalchemy.orm import SessionTransaction

    from .._telemetry.meter import UnitMeter
    from .state import Shared

logger = logging.getLogger("fastapi_async_sqlalchemy")

Hook: TypeAlias = Callable[[], Awaitable[object] | object]
"""A hook for an outcome: a function or a coroutine function without arguments."""
BeginHook: TypeAlias = Callable[[Connection], object]
"""A hook for the beginning of a transaction: a plain function of SQLAlchemy's synchronous connection."""

ROLLBACK_ONLY: Final = "set_rollback_only() was called"
_LET_IT_END: Final = (
    "leave out commit(), because the end of the unit rolls back, or call rollback() before it"
)
JOINED: Final = "a block that had joined it failed"
_HOOK_FAILED: Final = "a before_commit hook failed"
_HOOK_RAISED: Final = "A hook of %s failed after its outcome: %r"
_HOOK_CANCELLED: Final = "A hook of %s awaited what was cancelled: %r"


@define(eq=False, repr=False, kw_only=True)
class Registered:
    """A registration that is undone with the savepoint in which it was made."""

    undone: bool = False
    """Its savepoint was rolled back."""


@define(eq=False, repr=False, kw_only=True)
class RegisteredHook(Registered):
    """A hook, and the outcome that it waits for."""

    run: Hook
    on_commit: bool


@define(eq=False, repr=False, kw_only=True)
class RollbackMark(Registered):
    """The reason why the transaction can only be rolled back."""

    reason: str
    cause: BaseException | None


@define(eq=False, repr=False)
class Hooks:
    """The hooks of one unit; created when the first one is registered."""

    shared: Shared
    unit: int
    """The unit's number in log records."""
    meter: UnitMeter | None = None
    """The meter of an observed unit."""
    after: list[RegisteredHook] = Factory(list[RegisteredHook])
    before: deque[RegisteredHook] = Factory(deque[RegisteredHook])
    begin: list[BeginHook] = Factory(list[BeginHook])
    marks: list[RollbackMark] = Factory(list[RollbackMark])
    due: list[RegisteredHook] = Factory(list[RegisteredHook])
    """The hooks still to run for a known outcome: a cancellation may arrive together with a COMMIT."""
    inside: dict[SessionTransaction, list[Registered]] = Factory(
        dict["SessionTransaction", "list[Registered]"]
    )
    """The registrations made inside each open savepoint."""
    atomic: bool = False
    """The transaction is committed together with those of other databases."""

    @property
    def mark(self) -> RollbackMark | None:
        """The mark that forbids COMMIT, if any; ``set_rollback_only()`` takes precedence over a failure."""
        marks = [mark for mark in self.marks if not mark.undone]
        return next((mark for mark in marks if mark.reason is ROLLBACK_ONLY), marks[0] if marks else None)

    @property
    def rollback_only(self) -> bool:
        """Whether the owner has set rollback-only, so that a rollback is expected."""
        return self.mark is not None and self.mark.reason is ROLLBACK_ONLY

    def refuse_commit(self) -> None:
        """Raise ``UnexpectedRollbackError`` if the transaction can only be rolled back."""
        if self.atomic:
            remedy = "atomic() commits it with those of the other databases when its block ends"
            raise TransactionBegunError(self.shared.name, remedy)
        if self.mark is not None:
            advice = _LET_IT_END if self.mark.reason is ROLLBACK_ONLY else None
            raise UnexpectedRollbackError(self.shared.name, self.mark.reason, advice) from self.mark.cause

    def begun(self, connection: Connection) -> None:
        """Run the hooks before a transaction's first statement; discard the connection if one fails."""
        try:
            for hook in self.begin:
                _begin_by(hook, connection)
        except BaseException:
            connection.invalidate()  # no statement that relies on the hook may follow
            raise

    async def before_commit(self) -> None:
        """Run the hooks inside the transaction that is about to be committed; an error stops COMMIT."""
        while self.before:
            hook = self.before.popleft()
            if hook.undone:
                continue
            try:
                await self._call(hook)
            except BaseException as error:
                self.marks.append(RollbackMark(reason=_HOOK_FAILED, cause=error))
                raise

    def decide(self, *, committed: bool) -> None:
        """Separate an outcome's hooks from those registered from now on; lift the marks."""
        # for the hook of a savepoint that was rolled back the outcome is a rollback, whatever the rest is
        self.due += [hook for hook in self.after if hook.on_commit == (committed and not hook.undone)]
        self.drop()

    async def settled(self, *, committed: bool) -> None:
        """Run the hooks of an outcome, each isolated from the others.

        A cancellation ends the hook that it arrives in, and is raised again after the others have run.
        """
        self.decide(committed=committed)
        hooks, self.due = self.due, []
        if self.meter is None or not hooks:
            await self._run(iter(hooks))
            return
        began = perf_counter()
        try:
            await self._run(iter(hooks))
        finally:
            self.meter.hooks_ran(len(hooks), perf_counter() - began)

    async def _call(self, hook: RegisteredHook) -> None:
        """Run a hook; tasks that it starts know it by their context."""
        if self.shared.count_hook is not None:
            self.shared.count_hook()
        call = RunningHook(self)
        token = self.shared.running.set((*self.shared.running.get(), call))
        try:
            result = hook.run()
            if inspect.isawaitable(result):
                await result
        finally:
            call.hooks = None
            self.shared.running.reset(token)

    async def _run(self, hooks: Iterator[RegisteredHook]) -> None:
        for hook in hooks:
            try:
                await self._call(hook)
            except Exception:
                logger.exception(
                    _HOOK_RAISED, self.shared.name, hook.run, extra=self.shared.fields(self.unit)
                )
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or not task.cancelling():
                    extra = self.shared.fields(self.unit)
                    logger.exception(_HOOK_CANCELLED, self.shared.name, hook.run, extra=extra)
                    continue
                with CancelScope(shield=True):  # AnyIO's own scopes would cancel again at every await
                    await self._run(hooks)
                raise

    def drop(self) -> None:
        """Forget the hooks whose outcome is unknown."""
        self.after, self.before, self.marks, self.inside = [], deque(), [], {}

    def follow_savepoint(self, transaction: SessionTransaction, *, kept: bool) -> None:
        """Pass a savepoint's registrations to the enclosing savepoint, or mark them as undone."""
        registered = self.inside.pop(transaction, None)
        if registered is None:
            return
        if not kept:
            for one in registered:
                one.undone = True
        elif transaction.parent is not None and transaction.parent.nested:
            self.inside.setdefault(transaction.parent, []).extend(registered)

    def share_fate(self, registered: Registered, savepoint: SessionTransaction | None) -> None:
        """Undo a registration together with the current savepoint, if there is one."""
        if savepoint is not None:
            self.inside.setdefault(savepoint, []).append(registered)


@define(eq=False, repr=False)
class RunningHook:
    """A hook that is running."""

    hooks: Hooks | None
    """None once it has ended."""


def in_hook_of(hooks: Hooks | None) -> bool:
    """Whether the current task was started by one of these hooks, which may be waiting for it."""
    return hooks is not None and any(call.hooks is hooks for call in hooks.shared.running.get())


def _begin_by(hook: BeginHook, connection: Connection) -> None:
    result = hook(connection)
    if inspect.iscoroutine(result):
        result.close()
        message = f"an on_begin hook must be a plain function, and {_safe_repr(hook)} returned a coroutine."
        raise TypeError(message)
