"""What the model knows of other tasks, event loops and processes, and of a user's listeners that fail."""

import asyncio
import os
import signal
import warnings
from collections.abc import Coroutine
from typing import Any, Final, Literal

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from sqlalchemy import insert, select, text
from sqlalchemy.orm import Session

from fastapi_async_sqlalchemy import ConcurrentUseError, UnexpectedRollbackError, UnitClosedError
from tests.support.hooks import listening
from tests.support.tables import Note
from tests.unit.life import BOOM, CANNOT_COMMIT, BoomError, Life, Refusal, leave

Then = Literal["end", "commit", "rollback", "leave", "error"]
"""What comes in the middle of a block that another task has joined."""
THEN: Final[tuple[Then, ...]] = ("end", "commit", "rollback", "leave", "error")
BEFORE_COMMIT: Final = "before_commit"
OF_COMMIT: Final = (BEFORE_COMMIT, "after_commit", "after_transaction_end")
OF_ROLLBACK: Final = ("after_rollback", "after_soft_rollback", "after_transaction_end")
ANOTHER_LOOP: Final = Refusal(ConcurrentUseError, r"another running event loop uses the engine")
CHILD_SECONDS: Final = 20
SHARED: Final = 2
"""How a child ends that has a connection of its parent's."""


class LifeElsewhere(Life):
    """Does so by other tasks, in other event loops and processes, and under listeners that fail."""

    def plain(self) -> bool:
        """Whether the current unit can write, and has no savepoint."""
        return self.writable() and len(self.unit.levels) == 1

    def commits(self) -> bool:
        """Whether the end of the innermost block commits."""
        unit = self.unit
        fails = any(hook.kind == "failing" for hook in unit.hooks)
        return self.top.kind == "unit" and unit.commit_on_exit and not (unit.refused or fails)

    def wrote(self, *texts: str) -> None:
        """Note rows that were written at once."""
        self.unit.level.rows += texts
        self.unit.flushed()

    # Tasks.

    @precondition(plain)
    @rule(then=st.sampled_from(THEN), by=st.sampled_from(["unit", "session"]))
    def join_by_task(self, then: Then, by: str) -> None:
        """Have a task join the unit, and do something in the middle of its block."""
        if (then == "leave" and not self.commits()) or (then == "error" and self.top.kind != "unit"):
            return
        halves, resume = (self.next(), self.next()), asyncio.Event()

        async def act() -> BaseException | None:
            task = await self.join(halves, resume)
            if then == "leave":  # this waits for the block
                asyncio.get_running_loop().call_soon(resume.set)
            try:
                await self.in_the_middle(then, by)
            finally:
                resume.set()
                await asyncio.wait([task])
            return task.exception()

        error = self.run(act())
        if then in {"rollback", "error"}:
            assert isinstance(error, UnexpectedRollbackError | UnitClosedError)
            self.unit.settle(committed=False)
        else:
            assert error is None
            self.wrote(*halves)
        if then == "rollback":  # the second half can only be rolled back, too
            self.wrote(halves[1])
            self.unit.level.failed = True
        if then == "leave":
            assert self.unit.end() is None
        if then in {"leave", "error"}:
            self.pop()

    async def in_the_middle(self, then: Then, by: str) -> None:
        """Do something while the block is open."""
        unit = self.top.unit
        one = unit if by == "unit" else unit.session
        match then:
            case "commit":
                with pytest.raises(CANNOT_COMMIT.kind, match=CANNOT_COMMIT.match):
                    await one.commit()
            case "rollback":
                await one.rollback()
            case "leave":
                await leave(self.top, None)
            case "error":
                await leave(self.top, BoomError("boom"))
            case "end":
                pass

    async def join(self, halves: tuple[str, str], resume: asyncio.Event) -> "asyncio.Task[None]":
        """Begin a task that joins the unit, and return it when it has written its first half."""
        started = asyncio.Event()

        async def work() -> None:
            async with self.db(propagation="required") as joined:
                await joined.session.execute(insert(Note).values(text=halves[0]))
                started.set()
                await resume.wait()
                await joined.session.execute(insert(Note).values(text=halves[1]))

        task, waits = asyncio.create_task(work()), asyncio.create_task(started.wait())
        await asyncio.wait({task, waits}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
        return task

    # Listeners.

    @precondition(plain)
    @rule(name=st.sampled_from(OF_COMMIT), by=st.sampled_from(["unit", "session", "leave"]))
    def commit_under_listener(self, name: str, by: str) -> None:
        """Commit where a listener of the user's fails: what the database has committed is committed."""
        fails = any(hook.kind == "failing" for hook in self.unit.hooks)
        if self.unit.refused or fails or (by == "leave" and not self.commits()):
            return
        block, unit, note = self.top, self.top.unit, self.next()

        async def act() -> None:
            match by:
                case "leave":
                    await leave(block, None)
                case "unit":
                    await unit.commit()
                case _:
                    await unit.session.commit()

        self.run(self.under_listener(name, note, act()), BOOM)
        self.wrote(note)
        if name != BEFORE_COMMIT:
            assert self.unit.commit() is None
        if by == "leave":
            self.unit.settle(committed=name != BEFORE_COMMIT)
            self.pop()

    @precondition(plain)
    @rule(name=st.sampled_from(OF_ROLLBACK), by=st.sampled_from(["unit", "session"]))
    def rollback_under_listener(self, name: str, by: str) -> None:
        """Roll back where a listener of the user's fails."""
        unit, note = self.top.unit, self.next()

        async def act() -> None:
            await (unit if by == "unit" else unit.session).rollback()

        self.run(self.under_listener(name, note, act()), BOOM)
        self.unit.settle(committed=False)

    async def under_listener(self, name: str, note: str, act: Coroutine[Any, Any, None]) -> None:
        """Write, then act where the unit's session has a listener that fails once, before any other."""
        session = self.top.unit.session
        waiting = [session.sync_session]

        def fail(listened: Session, *_: object) -> None:
            ends = name != "after_transaction_end" or not listened.in_transaction()
            if listened in waiting and ends:
                waiting.clear()
                message = "boom"
                raise BoomError(message)

        await session.execute(insert(Note).values(text=note))
        with listening(Session, name, fail, first=True):
            await act

    # Event loops and processes.

    @rule()
    def use_other_loop(self) -> None:
        """Use the engine in a second loop beside the one that runs: it is refused, and nothing changes."""

        async def use() -> None:
            async with self.db() as unit:
                await unit.session.execute(select(1))

        async def act() -> None:
            await use()
            await asyncio.to_thread(lambda: asyncio.run(use()))

        self.run(act(), ANOTHER_LOOP)

    @precondition(lambda self: not self.blocks)
    @rule()
    def change_loop(self) -> None:
        """Go on in another loop, while the old one stands still."""
        self.stage.turns.reverse()

    @precondition(lambda self: not self.blocks and self.stage.is_postgresql)
    @rule(away=st.booleans())
    def fork(self, *, away: bool) -> None:
        """Write in a child process, by a connection of its own."""
        note = self.next()
        known = self.run(self.stage.turns[0].judges[0].rows("SELECT pid FROM pg_stat_activity"))
        arguments: dict[str, Any] = {"bind_arguments": {"bind": self.stage.other.sync_engine}} if away else {}

        async def write() -> int:
            async with self.db(commit_on_exit=True) as unit:
                pid = await unit.session.scalar(text("SELECT pg_backend_pid()"), **arguments)
                await unit.session.execute(insert(Note).values(text=note), **arguments)
            return SHARED if (pid,) in known else 0

        with warnings.catch_warnings(action="ignore"):  # 3.12 warns of threads
            pid = os.fork()
        if not pid:
            code = 1
            try:
                signal.alarm(CHILD_SECONDS)
                code = asyncio.run(write())
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        self.committed.add(note)
        if away:
            self.sent_away.add(note)
