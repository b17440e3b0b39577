"""The unit of work that users hold: its session, explicit outcomes, savepoints and hooks."""

from __future__ import annotations

import inspect
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final, Self, cast
from weakref import ref

from attrs import define, field
from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSessionTransaction
from sqlalchemy.orm import SessionTransaction

from .._session.checkout import Checkout, NestedRoute
from .._session.hooks import ROLLBACK_ONLY, Hooks, RegisteredHook, RollbackMark
from .._session.plain import (
    get_nested_transaction,
    get_transaction,
    in_nested_transaction,
    in_transaction,
)
from .._telemetry.observer import UnitStats
from ..exceptions import ConfigurationError, TransactionBegunError, UnitClosedError, _safe_repr
from .database import S_co
from .place import Place, around

if TYPE_CHECKING:
    from types import TracebackType

    from sqlalchemy.orm import Session
    from starlette.types import Scope

    from .._session.hooks import BeginHook, Hook
    from .._session.state import JoinedBlock, StatefulSession
    from .._telemetry.meter import UnitMeter
    from .._telemetry.observer import TransactionOutcome
    from .database import Database, UnitConfig


class Phase(Enum):
    """The stage that a unit has reached."""

    FRESH = auto()
    OPEN = auto()
    """The unit has a session."""
    CLOSED = auto()


FRESH: Final = Phase.FRESH
OPEN: Final = Phase.OPEN
CLOSED: Final = Phase.CLOSED
"""Looked up once, because access to an enumeration's members is slow."""


@define(eq=False, repr=False, weakref_slot=False)
class UnitOfWork(Place[S_co]):
    """A unit of work: it owns at most one session and settles its transactions.

    The middleware opens one for each request, ``async with db() as unit:`` one for each block. It is
    closed for good when the request or the block ends; later use raises ``UnitClosedError``.
    ``opened`` is the session if one exists and the unit is open, otherwise None. It never creates one.
    """

    _config: UnitConfig[S_co]
    _scope: Scope | None
    """The ASGI scope of the request that the unit serves."""
    _watched: StatefulSession | None = field(default=None, init=False)
    """The synchronous side of the opened session, which carries its state."""
    _phase: Phase = field(default=FRESH, init=False)
    _hooks: Hooks | None = field(default=None, init=False)
    """Created after the session, so that a unit with hooks always has a session."""
    _joined: list[JoinedBlock] | None = field(default=None, init=False)
    """The open blocks that have joined the unit."""
    _info: dict[str, Any] | None = field(default=None, init=False)
    _meter: UnitMeter = field(init=False)
    """Set if the unit is observed; without a default, it costs an unobserved one nothing."""

    @property
    def closed(self) -> bool:
        """Whether the unit has ended."""
        return self._phase is CLOSED

    @property
    def session(self) -> S_co:
        """The unit's session, created on first use; its first statement checks a connection out."""
        return self._open() if self.opened is None else self.opened

    @property
    def info(self) -> dict[str, Any]:
        """A dictionary for the caller's own notes, kept as long as the unit."""
        if self._info is None:
            self._info = {}
        return self._info

    @property
    def stats(self) -> UnitStats:
        """What the unit has done so far, also after its end.

        Raises ``ConfigurationError`` if nothing observes the unit.
        """
        meter: UnitMeter | None = getattr(self, "_meter", None)
        if meter is not None:
            return meter.unit.stats
        opening = self._database.opening
        if opening is None or not opening.observers or self.opened is not None:
            message = (
                "unit.stats needs an observer, and a plain Observer() will do: give observers= to "
                "create_middleware_and_session_proxy(), to the middleware or to db.connect()."
            )
            raise ConfigurationError(message)
        return UnitStats()

    async def commit(self) -> None:
        """Commit, release the connection and run the ``on_commit`` hooks.

        Loaded objects stay readable; the next statement begins the next transaction.
        """
        session, hooks = self.session, self._hooks
        if hooks is not None and not in_transaction(session.sync_session):
            hooks.refuse_commit()
            await hooks.before_commit()
            hooks.refuse_commit()
        if in_transaction(session.sync_session):
            await session.commit()
        elif hooks is not None:
            await hooks.settled(committed=True)

    async def rollback(self) -> None:
        """Roll back, release the connection and run the ``on_rollback`` hooks.

        This also lifts any rollback-only mark.
        """
        session = self.session
        if in_transaction(session.sync_session):
            await session.rollback()
        elif self._hooks is not None:
            await self._hooks.settled(committed=False)

    def savepoint(self) -> AsyncSessionTransaction:
        """Return a SAVEPOINT for ``async with``; an error that leaves the block undoes only the block.

        A failed flush undoes the block, too. If its error was swallowed in the block, the end of the block
        raises SQLAlchemy's ``PendingRollbackError``.
        """
        return Savepoint(self.session, nested=True)

    def on_commit(self, hook: Hook) -> None:
        """Register a hook to run after the next COMMIT, with no connection held.

        Hooks run in order; an error in one is logged and does not stop the others. A hook registered
        inside a savepoint is dropped when the savepoint is rolled back. No hook runs when the outcome of
        COMMIT is unknown. A hook may use the unit's session or open a separate unit; only the latter works
        if ``async with session.begin():`` committed.
        """
        self._register(hook, on_commit=True)

    def on_rollback(self, hook: Hook) -> None:
        """Register a hook to run after the next ROLLBACK; otherwise as ``on_commit``."""
        self._register(hook, on_commit=False)

    def before_commit(self, hook: Hook) -> None:
        """Register a hook to run before the next COMMIT, inside its transaction; it may write.

        An error in it stops the COMMIT and reaches the code that requested it. Otherwise as ``on_commit``.
        """
        _require_function(hook)
        hooks, registered = self._own_hooks(), RegisteredHook(run=hook, on_commit=True)
        hooks.before.append(registered)
        hooks.share_fate(registered, self._savepoint())

    def on_begin(self, hook: BeginHook) -> None:
        """Register a hook to run at the beginning of each transaction, before its first statement.

        ``hook`` is a plain function. It gets SQLAlchemy's synchronous ``Connection``, whose ``execute()``
        is called without ``await``. An error in it stops the statement, and the connection is discarded.
        Raises ``TransactionBegunError`` inside a transaction. Objects that were added but not flushed have
        not begun one.
        """
        _require_function(hook)
        if inspect.iscoroutinefunction(hook):
            message = f"an on_begin hook must be a plain function of a Connection, not {_safe_repr(hook)}."
            raise TypeError(message)
        if _begun(self.session.sync_session):
            remedy = (
                "call on_begin() before the unit's first statement, or after `await db.unit.commit()` or "
                "`await db.unit.rollback()`"
            )
            raise TransactionBegunError(self._database.name, remedy)
        self._own_hooks().begin.append(hook)

    def set_rollback_only(self) -> None:
        """Mark the transaction as rollback-only, so that the unit rolls it back instead of committing.

        An explicit COMMIT raises ``UnexpectedRollbackError``. ``rollback()`` lifts the mark, as does the
        rollback of the savepoint in which it was set.
        """
        self._mark_rollback_only(ROLLBACK_ONLY, None)

    @property
    def _database(self) -> Database[S_co]:
        """The unit's database."""
        return self._config.database

    def _here(self) -> Self:
        return self

    def _units_inside(self) -> tuple[Self, ...]:
        return (self,)

    def _join(self, block: JoinedBlock) -> None:
        """Record a block that joins the unit."""
        if self._joined is None:
            self._joined = []
            if self._watched is not None:
                self._watched._fastapi_async_sqlalchemy.joined = self._joined
        self._joined.append(block)

    def _leave(self, block: JoinedBlock) -> None:
        """Record that a joined block has been left."""
        if self._joined is not None:
            self._joined.remove(block)
        block.ended.set()

    def _belongs_to(self, scope: Scope) -> bool:
        """Whether this is the unit of a request, even if a middleware has since copied the scope."""
        own = self._scope
        if own is None or own is scope:
            return own is not None
        version = own.get("asgi")  # one dictionary per request: copies share it and nobody changes it
        return version is not None and version is scope.get("asgi")

    def _open(self) -> S_co:
        """Create the session."""
        if self._phase is CLOSED:
            raise UnitClosedError(self._database.name)
        config = self._config
        make = config.make or config.database.new_session
        self.opened = opened = make()
        self._phase = OPEN
        self._watched = cast("StatefulSession", opened.sync_session)
        state = self._watched._fastapi_async_sqlalchemy
        if self._joined is not None:
            state.joined = self._joined
        if config.limits is not None:
            state.limit(Checkout(config.database.name, config.limits))
        if isinstance(self._outer, UnitOfWork):
            state.outer_holds = self._outer_holds
            state.route = NestedRoute(ref(self._watched), self._enclosing, state.route)
        if config.database.opening is not None:
            config.database.opening.begin(self, self._watched)
        return opened

    def _reset(self) -> None:
        """Drop a session that nothing may use."""
        self.opened, self._watched, self._hooks, self._phase = None, None, None, FRESH

    def _register(self, hook: Hook, *, on_commit: bool) -> None:
        _require_function(hook)
        hooks, registered = self._own_hooks(), RegisteredHook(run=hook, on_commit=on_commit)
        hooks.after.append(registered)
        hooks.share_fate(registered, self._savepoint())

    def _mark_rollback_only(self, reason: str, cause: BaseException | None) -> None:
        """Mark the transaction, or the current savepoint, as rollback-only."""
        hooks, mark = self._own_hooks(), RollbackMark(reason=reason, cause=cause)
        hooks.marks.append(mark)
        hooks.share_fate(mark, self._savepoint())

    def _fields(
        self, outcome: TransactionOutcome | None = None, statements: int | None = None
    ) -> dict[str, object]:
        """Return the fields of a log record about the unit."""
        number = None if self._watched is None else self._watched.hash_key
        return self._database.shared.fields(number, outcome, statements)

    def _own_hooks(self) -> Hooks:
        """Return the unit's hooks; create them, and the session, on first use."""
        if self.opened is None:
            self._open()
        watched = self._watched
        if self._hooks is None and watched is not None:
            meter = getattr(self, "_meter", None)
            hooks = Hooks(self._database.shared, watched.hash_key, meter)
            self._hooks = watched._fastapi_async_sqlalchemy.hooks = hooks
        return cast("Hooks", self._hooks)

    def _savepoint(self) -> SessionTransaction | None:
        """Return the current savepoint; a registration made now is undone with it."""
        return None if self._watched is None else get_nested_transaction(self._watched)

    def _outer_holds(self) -> bool:
        """Whether an enclosing unit holds a connection."""
        return any(in_transaction(session) for session in self._enclosing())

    def _enclosing(self) -> list[StatefulSession]:
        """Return the sessions of the enclosing units."""
        units = (unit for unit in around(self._outer) if isinstance(unit, UnitOfWork))
        return [unit._watched for unit in units if unit._watched is not None]

    def __repr__(self) -> str:
        if self.closed:
            state = "closed"
        elif self._watched is None:
            state = "no session yet"
        else:
            state = "in a transaction" if in_transaction(self._watched) else "no transaction"
        return f"<UnitOfWork of {self._database.name}: {state}>"


class Savepoint(AsyncSessionTransaction):
    """A savepoint whose block raises at its end if a flush in it has failed.

    SQLAlchemy rolls back to the savepoint in that case, and its own block then closes it silently.
    """

    async def __aexit__(
        self, type_: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        own = self.sync_transaction
        current = own is not None and own is get_nested_transaction(self.session.sync_session)
        if type_ is None and own is not None and current and not own.is_active:
            try:
                SessionTransaction.commit(own)  # raises the error of the flush, and sends nothing
            except PendingRollbackError as error:
                await super().__aexit__(type(error), error, error.__traceback__)
                raise
        await super().__aexit__(type_, value, traceback)


def _require_function(hook: object) -> None:
    if not callable(hook):
        message = f"a hook must be a function, not {_safe_repr(hook)}."
        raise TypeError(message)


def has_connection(unit: UnitOfWork[Any]) -> bool:
    """Whether a unit holds a connection now."""
    transaction = None if unit._watched is None else get_transaction(unit._watched)
    return transaction is not None and bool(transaction._connections)


def _begun(session: Session) -> bool:
    """Whether the transaction has begun on a connection, or has a savepoint that may be undone."""
    transaction = get_transaction(session)
    if transaction is None:
        return False
    begun = transaction._connections  # `connections` is new in 2.1.7
    return bool(begun) or in_nested_transaction(session)
