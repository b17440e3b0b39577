"""``async with`` blocks: a new unit of work, a joined one, or a savepoint in one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, cast

from attrs import Factory, define, field

from .._dialects.begin import require_deferrable
from .._session.hooks import JOINED
from .._session.outcome import BROKEN, OWN_UNIT
from .._session.plain import get_nested_transaction, get_transaction
from .._session.state import JoinedBlock, task_at_work
from ..exceptions import (
    PropagationError,
    SessionNotInitialisedError,
    UnexpectedRollbackError,
    UnitClosedError,
)
from .database import Database, S_co, UnitConfig
from .place import Place, leave, open_unit
from .settling import Decision, abandon, finish, finish_idle
from .unit import UnitOfWork

if TYPE_CHECKING:
    from contextvars import ContextVar
    from types import TracebackType

    from sqlalchemy.ext.asyncio import AsyncSessionTransaction
    from sqlalchemy.orm import SessionTransaction

    from .._arguments.checks import Propagation


@define(eq=False, repr=False)
class OneUse:
    """An async context manager for a single use."""

    _entered: bool = field(default=False, init=False)

    def _enter_once(self, database: str, opening: str | None = None) -> None:
        """Raise ``UnitClosedError`` on a second entry."""
        if self._entered:
            raise UnitClosedError(database, opening)
        self._entered = True


@define(eq=False, repr=False)
class UnitScope(OneUse, Generic[S_co]):
    """The result of ``db(...)``: it opens, binds and ends one unit of work."""

    config: UnitConfig[S_co]
    current: ContextVar[Place[S_co]]
    unit: UnitOfWork[S_co] | None = None

    @property
    def database(self) -> Database[S_co]:
        """The unit's database."""
        return self.config.database

    @property
    def opening(self) -> str | None:
        """The code that opens another such unit, unless it is the usual one."""
        return None if self.config.commit_on_exit else "`async with db():`"

    async def __aenter__(self) -> UnitOfWork[S_co]:
        database = self.config.database
        if not database.connected and not self._entered:
            raise SessionNotInitialisedError(database.name)
        self._enter_once(database.name, self.opening)
        self.unit = unit = UnitOfWork(self.current.get(), self.config, None)
        self.current.set(unit)
        return unit

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        unit = self.unit
        if unit is None:
            raise UnitClosedError(self.database.name)
        outer = unit._outer
        try:
            if error is not None:
                await abandon(unit)
            elif not finish_idle(unit):
                await finish(unit, Decision.of_exit(commit_on_exit=self.config.commit_on_exit))
        finally:
            # generators may be closed in any order: skip and drop outer units that have ended
            while isinstance(outer, UnitOfWork) and outer.closed and outer._scope is None:
                outer = outer._outer
            unit._outer = outer
            if outer is not None:
                leave(self.current, unit, outer)


@define(eq=False, repr=False)
class PropagatingScope(OneUse, Generic[S_co]):
    """The result of ``db(propagation=...)``: it joins the open unit, or opens a new one.

    A joined unit is committed and closed by the block that opened it.
    """

    new: UnitScope[S_co]
    propagation: Propagation
    has_session_args: bool
    joined: UnitOfWork[S_co] | None = None
    savepoint: AsyncSessionTransaction | None = None
    transaction: SessionTransaction | None = None
    """The transaction that the savepoint is in."""
    block: JoinedBlock = Factory(lambda: JoinedBlock(task_at_work()))

    def joins(self) -> UnitOfWork[S_co] | None:
        """Return the open unit that the block would join, if any; raise ``PropagationError`` on conflict."""
        if self.propagation == "requires_new":
            return None
        name, found = self.new.database.name, open_unit(self.new.current)
        if found is None:
            if self.propagation == "mandatory":
                raise PropagationError(
                    name,
                    "propagation='mandatory' joins a unit of work, and none is open here",
                    "open one around the call, or use 'required'",
                )
            return None
        if self.propagation == "never":
            raise PropagationError(
                name,
                "propagation='never' must not run inside a unit of work, and one is open here",
                "call it where none is, or use 'requires_new'",
            )
        self._agree(name, found)
        return found

    def _agree(self, name: str, found: UnitOfWork[S_co]) -> None:
        settings = self.new.database.effective(found._config.settings)
        conflict = self.new.config.settings.conflict(settings)
        if self.has_session_args:
            conflict = "session_args were given for a session that is another block's"
        if self.new.config.limits is not None:
            conflict = "pool_timeout was given for a connection that is another block's"
        if conflict is not None:
            remedy = "leave that out, or use propagation='requires_new'"
            raise PropagationError(name, conflict, remedy)

    async def __aenter__(self) -> UnitOfWork[S_co]:
        self._enter_once(self.new.database.name, self.new.opening)
        self.joined = self.joins()
        if self.joined is None:
            config = self.new.config
            if config.settings.deferrable:
                require_deferrable(config.database.engine, config.settings)
            return await self.new.__aenter__()
        self.block.task = task_at_work()
        self.joined._join(self.block)
        if self.propagation == "nested":
            self.savepoint = self.joined.savepoint()
            try:
                await self.savepoint.__aenter__()
            except BaseException:
                self.joined._leave(self.block)  # nobody leaves a block that was not entered
                raise
            self.transaction = get_transaction(self.joined.session.sync_session)
        return self.joined

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.joined is None:
            await self.new.__aexit__(kind, error, trace)
            return
        self.joined._leave(self.block)
        if self.block.broken and error is None:
            error = UnexpectedRollbackError(self.new.database.name, BROKEN, OWN_UNIT)
            await self._leave(error)
            raise error
        await self._leave(error)

    async def _leave(self, error: BaseException | None) -> None:
        joined = cast("UnitOfWork[S_co]", self.joined)
        undoes = self.savepoint is not None
        if self.savepoint is not None:
            undoes = not self._ended_by_another(joined)
            await self.savepoint.__aexit__(type(error) if error else None, error, None)
        if error is not None and not undoes and not joined.closed:
            joined._mark_rollback_only(JOINED, error)

    def _ended_by_another(self, joined: UnitOfWork[S_co]) -> bool:
        """Whether another task's savepoint around this one was released meanwhile, and this one with it."""
        session = joined._watched
        if self.savepoint is None or session is None or get_transaction(session) is not self.transaction:
            return False
        opened = get_nested_transaction(session)
        while opened is not None and opened is not self.savepoint.sync_transaction:
            opened = opened.parent
        return opened is None
