"""The life of units of work against a model: random blocks, writes, hooks, errors and cancellations.

The model knows nothing of the library: it is a stack of blocks, each with the rows, marks and hooks that its
unit holds. Units may use a second engine; `life_elsewhere.py` has what other tasks, loops and processes do.
"""

import asyncio
import contextvars
import gc
from collections.abc import Coroutine
from contextlib import AsyncExitStack, nullcontext, suppress
from typing import Any, Literal

import pytest
from attrs import Factory, define, frozen
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sqlalchemy import Executable, insert, select
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from fastapi_async_sqlalchemy import (
    MissingSessionError,
    Propagation,
    PropagationError,
    UnexpectedRollbackError,
    UnitClosedError,
    UnitOfWork,
)
from tests.support.databases import Judge
from tests.support.site import Site, checked_out, complaints
from tests.support.tables import Note

Unit = UnitOfWork[AsyncSession]
HookKind = Literal["on_commit", "on_rollback", "before_commit", "failing"]

PROPAGATIONS: tuple[Propagation, ...] = ("requires_new", "required", "nested", "mandatory", "never")
HOOKS: tuple[HookKind, ...] = ("on_commit", "on_rollback", "before_commit", "failing")
USES = ("enter", "session", "commit", "rollback", "hook", "give up", "kept")
"""What can be tried with a block, its unit and its session after their end."""
DEPTH = 6
"""Blocks that are open at a time: fewer units than the pool has connections."""
TAKEN = "0"
"""The text of a note that is there from the beginning, so that a second one fails."""


class BoomError(Exception):
    """The error of a test's own."""


@frozen
class Refusal:
    """An error that an operation must raise."""

    kind: type[BaseException] | tuple[type[BaseException], ...]
    match: str


BOOM = Refusal(BoomError, r"^boom$")
CANCELLED = Refusal(asyncio.CancelledError, r"^$")
DUPLICATE = Refusal(IntegrityError, r"(?i)unique")
ENDED = Refusal(UnitClosedError, r"has ended and can be used only once")
LEAVE_FIRST = Refusal(InvalidRequestError, r"Can't operate on closed transaction inside context manager")
ABORTED = Refusal(DBAPIError, r"current transaction is aborted")
AWAY = Refusal(DBAPIError, r"current transaction is aborted")
"""Likewise on the other engine: there alone a statement would fail."""
FLUSH_FAILED = Refusal(
    InvalidRequestError, r"rolled back due to (a previous exception during flush|an exception: .*(?i:unique))"
)
BEFORE = frozenset({"before_commit", "failing"})
"""Kinds of hooks that run before COMMIT."""
CANNOT_COMMIT = Refusal(UnexpectedRollbackError, r"^The transaction of .+ cannot be committed, because ")
NONE_OPEN = Refusal(PropagationError, r"'mandatory' joins a unit of work, and none is open here")
ONE_OPEN = Refusal(PropagationError, r"'never' must not run inside a unit of work, and one is open here")
NO_UNIT = Refusal(MissingSessionError, r"open `async with db\(\):` around the work")


# The model.


@define(eq=False)
class Level:
    """What belongs to a transaction, or to a savepoint of it, and is undone with it."""

    rows: list[str] = Factory(list[str])
    unflushed: bool = False
    attempts: int = 0
    """Writing statements that failed."""
    given_up: bool = False
    failed: bool = False
    """A joined block failed in it, or a hook before its commit."""
    broken: Refusal | None = None
    """What the next statement raises after the failure of one that was swallowed."""


@define(eq=False)
class ExpectedHook:
    """A hook that waits for its moment."""

    name: str
    kind: HookKind
    level: Level
    undone: bool = False


@define(eq=False)
class ExpectedUnit:
    """One unit as the model sees it: its levels, the transaction first, and its hooks."""

    commit_on_exit: bool
    log: list[str]
    """The hooks that must have run, of all units."""
    committed: set[str]
    """The rows that must be there, of all units."""
    levels: list[Level] = Factory(lambda: [Level()])
    hooks: list[ExpectedHook] = Factory(list[ExpectedHook])
    connected: bool = False
    away: bool = False
    """A connection of the other engine is held, too."""

    @property
    def level(self) -> Level:
        """The innermost level."""
        return self.levels[-1]

    @property
    def given_up(self) -> bool:
        """Whether anybody called set_rollback_only()."""
        return any(level.given_up for level in self.levels)

    @property
    def refused(self) -> bool:
        """Whether a commit by name must raise."""
        return self.given_up or any(level.failed or level.broken is not None for level in self.levels)

    @property
    def rows(self) -> set[str]:
        """The rows that wait for a commit."""
        return {row for level in self.levels for row in level.rows}

    def end_savepoint(self, *, kept: bool) -> None:
        """Release the innermost savepoint, or roll back to it."""
        level = self.levels.pop()
        for hook in self.hooks:
            if hook.level is level:
                hook.level = self.level if kept else self.levels[0]
                hook.undone = not kept
        if kept:
            self.level.rows += level.rows
            self.level.attempts += level.attempts
            self.level.given_up = self.level.given_up or level.given_up
            self.level.failed = self.level.failed or level.failed

    def flushed(self) -> None:
        """Note that everything was sent, and a connection is held."""
        self.connected = True
        for level in self.levels:
            level.unflushed = False

    def due(self, *, committed: bool) -> list[str]:
        """Return the names of the hooks that run after an outcome."""
        after = [hook for hook in self.hooks if hook.kind in {"on_commit", "on_rollback"}]
        return [h.name for h in after if (h.kind == "on_commit") is (committed and not h.undone)]

    def settle(self, *, committed: bool) -> None:
        """End the transaction: the hooks of the outcome run, and everything begins anew."""
        self.log += self.due(committed=committed)
        if committed:
            self.committed |= self.rows
        self.levels, self.hooks, self.connected, self.away = [Level()], [], False, False

    def commit(self) -> Refusal | None:
        """Commit by name."""
        if self.refused:
            return CANNOT_COMMIT
        while self.before():
            hook = self.before()[0]
            self.hooks.remove(hook)
            if hook.kind == "failing":
                self.levels[0].failed = True
                return BOOM
            self.log.append(hook.name)
            self.level.rows.append(hook.name)
            self.flushed()
        self.settle(committed=True)
        return None

    def before(self) -> list[ExpectedHook]:
        """Return the hooks that the next commit runs first."""
        return [h for h in self.hooks if h.kind in {"before_commit", "failing"} and not h.undone]

    def end(self) -> Refusal | None:
        """End the unit well."""
        refusal = None
        if self.commit_on_exit and not self.given_up:
            refusal = self.commit()
            if refusal is not None:
                self.settle(committed=False)
        else:
            self.settle(committed=not (self.commit_on_exit or self.discards or self.refused))
        return refusal

    @property
    def discards(self) -> bool:
        """Whether there are writes that nobody has committed."""
        return bool(self.rows) or any(level.attempts for level in self.levels)


@define(eq=False)
class Block:
    """An `async with` that is open, or was: what the library gave for it, and what the model knows of it."""

    scope: Any
    kind: Literal["unit", "joined", "savepoint"]
    unit: Unit
    expected: ExpectedUnit
    spent: bool = False
    """A savepoint that a commit or rollback by name has ended before its block."""
    session: AsyncSession | None = None


# The machine.


@define(eq=False)
class Turn:
    """An event loop, and a judge of each database in it."""

    runner: asyncio.Runner
    judges: list[Judge]


@define(eq=False)
class Stage:
    """What all examples of one test share: a worker's database, and the loops in which they run in turn."""

    worker: Site
    other: AsyncEngine
    """The engine to which a statement may be sent by name."""
    turns: list[Turn]
    caplog: pytest.LogCaptureFixture
    is_postgresql: bool
    examples: int = 0

    @property
    def runner(self) -> asyncio.Runner:
        """What runs the loop whose turn it is."""
        return self.turns[0].runner

    async def execute(self, sql: str) -> None:
        """Run a statement on each database, at once."""
        for judge in self.turns[0].judges:
            await judge.execute(sql)

    async def notes(self) -> set[str]:
        """Return the texts that are committed."""
        found = [await judge.rows("SELECT text FROM note") for judge in self.turns[0].judges]
        return {str(text) for rows in found for (text,) in rows}


class Life(RuleBasedStateMachine):
    """Does to units what applications do, and compares what comes of it with the model."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage, self.db = stage, stage.worker.db
        stage.examples += 1
        self.context = contextvars.copy_context()
        self.blocks: list[Block] = []
        self.ended: list[Block] = []
        self.number = 0
        self.log: list[str] = []
        self.expected_log: list[str] = []
        self.committed = {TAKEN}
        self.sent_away = set[str]()
        """The rows that were written by the other engine."""
        self.agrees = False
        self.run(stage.execute(f"DELETE FROM note WHERE text <> '{TAKEN}'"))

    # What the rules are made of.

    def run(self, operation: Coroutine[Any, Any, Any], refusal: Refusal | None = None) -> Any:
        """Run an operation in a task that shares the example's context, and judge its error."""
        self.stage.caplog.clear()
        self.agrees = False
        raises = nullcontext() if refusal is None else pytest.raises(refusal.kind, match=refusal.match)
        with raises:
            return self.stage.runner.run(operation, context=self.context)
        return None

    def next(self) -> str:
        """Return a text that no other note has."""
        self.number += 1
        return f"{self.number}"

    @property
    def top(self) -> Block:
        """The innermost block."""
        return self.blocks[-1]

    @property
    def unit(self) -> ExpectedUnit:
        """The current unit."""
        return self.top.expected

    def within(self) -> bool:
        """Whether a unit is open."""
        return bool(self.blocks)

    def spent(self) -> bool:
        """Whether a savepoint of the current unit was ended by name, and must be left first."""
        return any(block.spent for block in self.blocks if block.expected is self.unit)

    def sound(self) -> bool:
        """Whether the current unit takes statements."""
        return self.within() and not self.spent() and self.unit.level.broken is None

    def writable(self) -> bool:
        """Whether the current unit can write: SQLite has one writer, and no other reader at its COMMIT."""
        return self.sound() and (
            self.stage.is_postgresql or not any(one.connected or one.away for one in self.others())
        )

    def others(self) -> list[ExpectedUnit]:
        """Return the units around the current one."""
        return [block.expected for block in self.blocks if block.expected is not self.unit]

    def visible(self) -> set[str]:
        """Return the rows that the unit sees by the own engine: on SQLite the other one has its own file."""
        if self.stage.is_postgresql:
            return self.committed | (self.unit.rows - self.sent_away)
        return (self.committed | self.unit.rows) - self.sent_away

    def use_refusal(self) -> Refusal | None:
        """Return what a statement in the current unit raises."""
        return LEAVE_FIRST if self.spent() else self.unit.level.broken

    def spend(self) -> None:
        """Note that the savepoints of the current unit have ended before their blocks."""
        for block in self.blocks:
            if block.expected is self.unit and block.kind == "savepoint":
                block.spent = True

    def enter(self, block: Block) -> None:
        """Push a block."""
        self.blocks.append(block)

    def leave_top(self, error: BaseException | None) -> None:
        """Leave the innermost block, well or by an error."""
        block = self.top
        unit = block.expected
        refusal, discards = None, False
        if block.kind == "unit":
            discards = error is None and not unit.commit_on_exit and unit.discards and not unit.given_up
            if error is None:
                refusal = unit.end()
            else:
                unit.settle(committed=False)
        elif block.kind == "joined":
            unit.level.failed = unit.level.failed or error is not None
        elif not block.spent:
            broken = unit.level.broken
            refusal = broken if error is None else None
            if error is None and broken is None and any(level.unflushed for level in unit.levels):
                unit.flushed()
            unit.end_savepoint(kept=error is None and broken is None)
            if refusal is not None and refusal is not FLUSH_FAILED:
                unit.level.attempts += 1
                unit.level.broken = (
                    refusal  # PostgreSQL refused RELEASE, and nobody rolls back to what failed
                )
        swallowed = self.run(leave(block, error), refusal)
        assert not swallowed
        told = [text for text in complaints(self.stage.caplog) if "are rolled back at the end" in text]
        assert len(told) == discards
        self.pop()

    def pop(self) -> None:
        """Drop the innermost block, which was left."""
        self.ended.append(self.blocks.pop())

    # Blocks.

    @precondition(lambda self: len(self.blocks) < DEPTH)
    @rule(propagation=st.sampled_from(PROPAGATIONS), commit_on_exit=st.booleans())
    def enter_block(self, propagation: Propagation, *, commit_on_exit: bool) -> None:
        """Enter a block of any propagation."""
        scope = self.db(propagation=propagation, commit_on_exit=commit_on_exit)
        if self.blocks and propagation == "never":
            self.run(scope.__aenter__(), ONE_OPEN)
        elif not self.blocks and propagation == "mandatory":
            self.run(scope.__aenter__(), NONE_OPEN)
        elif not self.blocks or propagation == "requires_new":
            unit = self.run(scope.__aenter__())
            assert unit not in [block.unit for block in self.blocks]
            expected = ExpectedUnit(commit_on_exit, self.expected_log, self.committed)
            self.enter(Block(scope, "unit", unit, expected))
        elif propagation == "nested":
            self.enter_savepoint(scope)
        else:
            assert self.run(scope.__aenter__()) is self.top.unit
            self.enter(Block(scope, "joined", self.top.unit, self.unit))

    @precondition(lambda self: self.within() and len(self.blocks) < DEPTH)
    @rule()
    def enter_unit_savepoint(self) -> None:
        """Enter a savepoint of the current unit."""
        self.enter_savepoint(None)

    def enter_savepoint(self, scope: Any) -> None:
        """Enter a savepoint, a nested block's or the unit's own."""
        if self.unit.level.broken is not None:
            return  # SQLAlchemy leaves a savepoint that failed to begin in a state of its own
        unit, refusal = self.top.unit, self.use_refusal()

        async def begin() -> Any:
            savepoint = unit.savepoint() if scope is None else scope
            await savepoint.__aenter__()
            return savepoint

        scope = self.run(begin(), refusal)
        if refusal is None:
            if any(level.unflushed for level in self.unit.levels):
                self.unit.flushed()
            self.unit.levels.append(Level())
            self.enter(Block(scope, "savepoint", unit, self.unit))

    @precondition(within)
    @rule()
    def leave_well(self) -> None:
        """Leave the innermost block without an error."""
        self.leave_top(None)

    @precondition(within)
    @rule(depth=st.integers(1, 3))
    def leave_by_error(self, depth: int) -> None:
        """Let an error leave some blocks, and swallow it there."""
        error = BoomError("boom")
        for _ in range(min(depth, len(self.blocks))):
            self.leave_top(error)

    # Work.

    @precondition(writable)
    @rule(by=st.sampled_from(["statement", "object"]))
    def write(self, by: str) -> None:
        """Write a row, at once or with the next flush."""
        text, unit = self.next(), self.top.unit

        async def act() -> None:
            self.top.session = unit.session
            if by == "object":
                unit.session.add(Note(text=text))
            else:
                await unit.session.execute(insert(Note).values(text=text))

        self.run(act())
        self.unit.level.rows.append(text)
        if by == "object":
            self.unit.level.unflushed = True
        else:
            self.unit.flushed()

    @precondition(writable)
    @rule()
    def write_away(self) -> None:
        """Write a row by the other engine, whose first use begins a transaction there."""
        text, unit = self.next(), self.top.unit
        self.send_away(insert(Note).values(text=text))
        self.top.session = unit.session
        self.unit.level.rows.append(text)
        self.sent_away.add(text)

    @precondition(lambda self: self.writable() and len(self.unit.levels) == 1)
    @rule()
    def fail_away(self) -> None:
        """Swallow the error of a statement on the other engine."""
        self.send_away(insert(Note).values(text=TAKEN), DUPLICATE)
        self.unit.level.attempts += 1
        if self.stage.is_postgresql:
            self.unit.level.broken = AWAY

    def send_away(self, statement: Executable, refusal: Refusal | None = None) -> None:
        """Send a statement to the other engine; unflushed objects go to the own one before."""
        if any(level.unflushed for level in self.unit.levels):
            self.unit.flushed()
        self.unit.away = True
        session, other = self.top.unit.session, self.stage.other.sync_engine

        async def act() -> None:
            await session.execute(statement, bind_arguments={"bind": other})

        self.run(act(), refusal)

    @precondition(within)
    @rule()
    def read(self) -> None:
        """Read what the unit can see: what is committed, and its own."""
        refusal = self.use_refusal()
        if refusal is AWAY:
            return

        async def act() -> set[str]:
            return set(await self.top.unit.session.scalars(select(Note.text)))

        seen = self.run(act(), refusal)
        if refusal is None:
            assert seen == self.visible()
            self.unit.flushed()

    @precondition(sound)
    @rule()
    def flush(self) -> None:
        """Flush."""
        if any(level.unflushed for level in self.unit.levels):
            self.unit.flushed()

        async def act() -> None:
            await self.top.unit.session.flush()

        self.run(act())

    @precondition(writable)
    @rule()
    def fail_by_statement(self) -> None:
        """Swallow the error of a statement; only PostgreSQL gives the transaction up for it."""

        async def act() -> None:
            await self.top.unit.session.flush()
            await self.top.unit.session.execute(insert(Note).values(text=TAKEN))

        self.run(act(), DUPLICATE)
        self.unit.flushed()
        self.unit.level.attempts += 1
        if self.stage.is_postgresql:
            self.unit.level.broken = ABORTED

    @precondition(writable)
    @rule()
    def fail_by_flush(self) -> None:
        """Swallow the error of a flush, which rolls the innermost level back."""

        async def act() -> None:
            await self.top.unit.session.flush()
            self.top.unit.session.add(Note(text=TAKEN))
            await self.top.unit.session.flush()

        self.run(act(), DUPLICATE)
        self.unit.flushed()
        self.unit.level.attempts += 1
        self.unit.level.broken = FLUSH_FAILED

    # Outcomes by name.

    @precondition(within)
    @rule(by=st.sampled_from(["unit", "session"]))
    def commit(self, by: str) -> None:
        """Commit by the unit, or by its session."""
        if len(self.unit.levels) > 1 and any(hook.kind in BEFORE for hook in self.unit.hooks):
            return  # SQLAlchemy has released the savepoints when the hook runs, and their blocks are open
        unit, by = self.top.unit, "unit" if self.spent() else by
        refusal = self.unit.commit()
        if refusal is None:
            self.spend()
        if self.unit.level.broken is FLUSH_FAILED:
            refusal = Refusal(
                (UnexpectedRollbackError, InvalidRequestError), f"{CANNOT_COMMIT.match}|{FLUSH_FAILED.match}"
            )

        async def act() -> None:
            await (unit if by == "unit" else unit.session).commit()

        self.run(act(), refusal)

    @precondition(within)
    @rule(by=st.sampled_from(["unit", "session"]))
    def rollback(self, by: str) -> None:
        """Roll back by the unit, or by its session where a transaction is open."""
        unit, by = self.top.unit, by if self.unit.connected else "unit"
        self.unit.settle(committed=False)
        self.spend()

        async def act() -> None:
            await (unit if by == "unit" else unit.session).rollback()

        self.run(act())

    @precondition(within)
    @rule()
    def give_up(self) -> None:
        """Call set_rollback_only()."""
        self.context.run(self.top.unit.set_rollback_only)
        self.unit.level.given_up = True

    # Hooks.

    @precondition(writable)
    @rule(kind=st.sampled_from(HOOKS))
    def register(self, kind: HookKind) -> None:
        """Register a hook, which notes that it runs; one before COMMIT writes a row too, or fails."""
        name, unit = self.next(), self.top.unit

        async def write() -> None:
            self.log.append(name)
            await unit.session.execute(insert(Note).values(text=name))

        def fail() -> None:
            message = "boom"
            raise BoomError(message)

        if kind == "before_commit":
            unit.before_commit(write)
        elif kind == "failing":
            unit.before_commit(fail)
        else:
            getattr(unit, kind)(lambda: self.log.append(name))
        self.unit.hooks.append(ExpectedHook(name, kind, self.unit.level))

    # Cancellation.

    @precondition(within)
    @rule(turns=st.integers(1, 12), again=st.none() | st.integers(0, 6), in_statement=st.booleans())
    def cancel(self, turns: int, again: int | None, *, in_statement: bool) -> None:
        """Cancel the task at an await inside the innermost block, and perhaps once more while it leaves."""
        unit, text = self.unit, self.next()
        statement = insert(Note).values(text=text) if self.writable() else select(Note.text)
        blocks = [block for block in reversed(self.blocks) if block.expected is unit]

        async def act() -> None:
            async with AsyncExitStack() as stack:
                for block in reversed(blocks):
                    stack.push_async_exit(block.scope)
                if in_statement and self.use_refusal() is None:
                    await blocks[0].unit.session.execute(statement)
                await asyncio.Event().wait()

        self.run(cancelled(act(), self.context, turns, again), CANCELLED)
        if again is not None and not self.stage.is_postgresql:
            gc.collect()  # a second one may hit SQLAlchemy's close, and its frames keep a lock until then
        unit.settle(committed=False)
        for _ in blocks:
            self.pop()

    @precondition(lambda self: self.sound() and self.top.kind == "unit" and self.unit.commit_on_exit)
    @rule(turns=st.integers(1, 12))
    def cancel_commit(self, turns: int) -> None:
        """Cancel the task while it leaves a block that commits: all of it is there, or nothing."""
        block, unit = self.top, self.unit
        if unit.refused or unit.away or any(hook.kind == "failing" for hook in unit.hooks):
            return  # of two engines one may have committed
        before = [hook.name for hook in unit.before()]
        rows = unit.rows | set(before)

        async def act() -> bool:
            try:
                await cancelled(leave(block, None), self.context, turns, None)
            except asyncio.CancelledError:
                return True
            return False

        start = len(self.log)
        was_cancelled = self.run(act())
        found = self.rows()
        ran = self.log[start:]
        committed = found == self.committed | rows
        assert found in (self.committed, self.committed | rows)
        due = unit.due(committed=committed)
        if not was_cancelled:
            assert committed
        known = (
            [before + due]
            if committed
            else [before[:ran_before] + due for ran_before in range(len(before) + 1)]
        )
        assert ran in ([*known, before] if was_cancelled else known)  # no hook runs after an unknown outcome
        self.committed |= found
        self.expected_log += ran
        self.pop()

    # Misuse.

    @precondition(within)
    @rule()
    def enter_again(self) -> None:
        """Enter a block a second time, inside itself."""
        if self.top.scope is not None and not hasattr(self.top.scope, "is_active"):
            self.run(self.top.scope.__aenter__(), ENDED)

    @precondition(lambda self: bool(self.ended))
    @rule(
        which=st.integers(0, 20),
        use=st.sampled_from(USES),
    )
    def use_ended(self, which: int, use: str) -> None:
        """Use a block or its unit after their end."""
        block = self.ended[which % len(self.ended)]

        async def act() -> None:
            unit = block.unit
            match use:
                case "enter":
                    await block.scope.__aenter__()
                case "commit":
                    await unit.commit()
                case "rollback":
                    await unit.rollback()
                case "hook":
                    unit.on_commit(print)
                case "give up":
                    unit.set_rollback_only()
                case "kept" if block.session is not None:
                    await block.session.execute(select(1))
                case _:
                    _ = unit.session

        if hasattr(block.scope, "is_active") and use == "enter":
            return  # SQLAlchemy's own
        if use == "enter" or block.unit.closed:
            self.run(act(), ENDED)

    # What must hold at any time.

    def rows(self) -> set[str]:
        """Return the texts that are committed, as another connection sees them."""
        found: set[str] = self.run(self.stage.notes())
        return found

    @invariant()
    def library_agrees_with_model(self) -> None:
        """Compare the rows, the hooks that ran, the current unit, and who holds a connection."""
        assert self.rows() == self.committed
        assert self.log == self.expected_log
        if self.blocks:
            assert self.context.run(lambda: self.db.unit) is self.top.unit
        else:
            with pytest.raises(NO_UNIT.kind, match=NO_UNIT.match):
                self.context.run(lambda: self.db.unit)
        assert not any(block.unit.closed for block in self.blocks)
        assert all(block.unit.closed for block in self.ended if block.kind == "unit")
        units = {id(block.expected): block.expected for block in self.blocks}.values()
        assert self.stage.worker.checked_out() == sum(unit.connected for unit in units)
        assert checked_out(self.stage.other.pool) == sum(unit.away for unit in units)
        self.agrees = True

    def teardown(self) -> None:
        """Leave what is open; after a failure by force, so that the next example finds nothing of it."""
        try:
            while self.agrees and self.blocks:
                self.leave_top(None)
                self.library_agrees_with_model()
        finally:
            if self.blocks:
                self.run(self.tidy_up())

    async def tidy_up(self) -> None:
        """End all units without a judgement."""
        for block in reversed(self.blocks):
            with suppress(Exception):
                await leave(block, BoomError("boom"))
        await self.stage.worker.engine.dispose()
        await self.stage.other.dispose()


async def leave(block: Block, error: BaseException | None) -> bool | None:
    """Leave a block as `async with` does."""
    kind = None if error is None else type(error)
    swallowed: bool | None = await block.scope.__aexit__(kind, error, None)
    return swallowed


async def cancelled(
    operation: Coroutine[Any, Any, Any], context: contextvars.Context, turns: int, again: int | None
) -> None:
    """Cancel an operation after some turns of the loop, and perhaps once more after others."""
    task = asyncio.create_task(operation, context=context)
    for wait in (turns, again):
        if wait is not None:
            for _ in range(wait):
                await asyncio.sleep(0)
            task.cancel()
    await task
