"""The one attribute added to a session: the task that uses it, and the state of its transaction."""

from __future__ import annotations

import asyncio
import logging
from asyncio import current_task
from contextlib import suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

from attrs import Factory, define
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from .._dialects.interruption import end_statement, may_be_in_use, statement_end
from .._dialects.statements import READS, verb_of
from .._telemetry.logs import fields
from .ledger import BLANK, Ledger
from .loops import Loops
from .plain import deleted_of, dirty_of, in_nested_transaction, is_modified, new_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy.engine import Connection, Engine, ExceptionContext

    from .._telemetry.observer import TransactionOutcome
    from .checkout import Checkout, Route
    from .hooks import Hooks, RunningHook
    from .streams import ConnectionStream, Stream
    from .waiting import Turn

logger = logging.getLogger("fastapi_async_sqlalchemy")


def _no_request() -> None:
    return None


@define(eq=False, repr=False)
class Shared:
    """The state that the sessions of one database have in common."""

    name: str
    """The database's name in messages."""
    connections: WeakKeyDictionary[Connection, ref[StatefulSession]] = Factory(
        WeakKeyDictionary["Connection", "ref[StatefulSession]"]
    )
    """Connections that may be used without calling their session."""
    operating: dict[asyncio.Task[Any] | None, StatefulSession] = Factory(
        dict["asyncio.Task[Any] | None", "StatefulSession"]
    )
    """The session in the middle of an operation, by task: a dialect's event names only a connection."""
    loops: Loops = Factory(Loops)
    running: ContextVar[tuple[RunningHook, ...]] = Factory(
        lambda: ContextVar["tuple[RunningHook, ...]"]("fastapi_async_sqlalchemy.running_hooks", default=())
    )
    """The hooks that run in a context, or that have started its task."""
    engine: Engine | None = None
    """The bound engine, to which most connections belong."""
    unbuffered: bool = False
    """There are streams that another statement would cut short."""
    count_hook: Callable[[], None] | None = None
    """The function by which an open test sandbox counts the hooks that run."""
    awaited: WeakKeyDictionary[asyncio.Task[Any], asyncio.Task[Any]] = Factory(
        WeakKeyDictionary["asyncio.Task[Any]", "asyncio.Task[Any]"]
    )
    """For each task, the task that waits for its end, such as the caller of ``db.gather()``."""
    waits: bool = False
    """A task waits for its turn of a session, in place of ``ConcurrentUseError``."""
    waiting: WeakKeyDictionary[asyncio.Task[Any], SessionState] = Factory(
        WeakKeyDictionary["asyncio.Task[Any]", "SessionState"]
    )
    """For each task that waits for its turn, the state of that session."""

    request: Callable[[], str | None] = _no_request
    """Returns the request that the current task serves, for log records."""
    holders: Callable[[], tuple[str, ...]] = tuple
    """Describes the units that hold a connection."""

    def listen(self, engine: Engine) -> None:
        """Listen to an engine; a second call has no effect."""
        raise NotImplementedError

    def note_replaced(self, session: StatefulSession, error: BaseException, *, committing: bool) -> None:
        """Note an error of the driver's that a user's listener has replaced."""
        raise NotImplementedError

    def fields(
        self,
        unit: int | None = None,
        outcome: TransactionOutcome | None = None,
        statements: int | None = None,
    ) -> dict[str, object]:
        """Return the fields of a log record."""
        return fields(self.name, unit=unit, request=self.request(), outcome=outcome, statements=statements)

    def session_of(self, connection: Connection) -> StatefulSession | None:
        """Return the session that a connection belongs to, else the session at work.

        A session's event may use the connection of another one.
        """
        used = self.connections.get(connection)
        session = None if used is None else used()
        return self.operating.get(task_at_work()) if session is None else session


@define(eq=False, repr=False)
class JoinedBlock:
    """A block that has joined a unit: all of it is committed with the unit, or nothing."""

    task: asyncio.Task[Any] | None
    broken: bool = False
    """The transaction was rolled back in the middle of the block."""
    own: bool = False
    """The block runs in the task that serves the unit's request."""
    ended: asyncio.Event = Factory(asyncio.Event)

    def elsewhere(self) -> bool:
        """Whether it runs in another task than the current one and the request's own.

        A task that has ended without leaving the block adds nothing to it, as with the fixtures of a test.
        """
        ended = self.task is not None and self.task.done()
        return not (self.own or ended or self.task is task_at_work())

    async def left(self) -> None:
        """Wait until the block is left, or its task has ended without leaving it."""
        if self.task is None:
            await self.ended.wait()
            return
        left = asyncio.ensure_future(self.ended.wait())
        try:
            await asyncio.wait({left, self.task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            left.cancel()


class SessionState:
    """The state of a session. Defaults are class attributes, which cost nothing when a session is created.

    Each database has a subclass, so that ``shared`` is one, too.
    """

    shared: Shared
    closed: bool = False
    """The unit has ended: nothing may begin again."""
    holder: asyncio.Task[Any] | None = None
    """The task that is in the middle of an operation."""
    operation: str = ""
    """The name of that operation."""
    ledger: Ledger = BLANK
    """The record of the current transaction."""
    committed_writes: bool = False
    """A commit of this session included statements other than reads."""
    committing: bool = False
    """COMMIT was requested and is about to be sent."""
    released: bool = False
    """A savepoint was just released and is about to end."""
    streams: tuple[Stream | ConnectionStream, ...] = ()
    hooks: Hooks | None = None
    checkout: Checkout | None = None
    """The checkout of the session's connections, if it is limited."""
    route: Route | None = None
    """From the engine that the session chose to the one that applies its unit's settings and limits."""
    outer_holds: Callable[[], bool] | None = None
    """Whether an enclosing unit holds a connection of the same pool."""
    streamed: bool = False
    """The last statement sent leaves rows on the server."""
    resets_on_close: bool = True
    """The value of ``close_resets_only`` while the unit is open."""
    joined: Sequence[JoinedBlock] = ()
    """The open blocks that have joined the unit."""
    beginner: asyncio.Task[Any] | None = None
    """The task whose operation has begun the transaction."""
    committed: bool = False
    """COMMIT is done, and the transaction is about to end."""
    exposed: frozenset[Connection] = frozenset()
    """The connections that user code has: a task may be in the middle of a statement on one."""
    waiter: asyncio.Future[None] | None = None
    turns: tuple[Turn, ...] = ()
    """The tasks that wait for their turn."""
    settling: bool = False
    """A response is about to start: other tasks wait until the transaction is settled."""
    reads_alone: bool = False
    """Plain reads are sent without a transaction until it has begun."""
    xid: str = ""
    """The name of the transaction, if it takes part in a two-phase commit."""

    def limit(self, checkout: Checkout) -> None:
        """Apply limits to the session's connections."""
        self.checkout = checkout
        self.route = checkout.limits.route_after(self.route, self.shared)

    def busy(self) -> bool:
        """Whether another task is in the middle of an operation."""
        return self.holder is not None and self.holder is not current_task()

    async def joined_ended(self, patience: float | None) -> None:
        """Wait until the joined blocks of other tasks have ended, or for ``patience`` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while blocks := [one for one in self.joined if one.elsewhere()]:
                    await blocks[0].left()

    async def idle(self) -> None:
        """Wait until no other task is in the middle of an operation."""
        while self.busy():
            if self.waiter is None:
                self.waiter = asyncio.get_running_loop().create_future()
            await asyncio.shield(self.waiter)

    def expose(self, connection: Connection) -> None:
        """Record that user code has a connection."""
        self.exposed = frozenset(one for one in self.exposed if not one.closed) | {connection}

    def wait_for_exposed(self) -> None:
        """Wait until no task is in the middle of a statement on a connection that user code has."""
        for connection in self._exposed_in_use():
            await_only(statement_end(connection.connection.dbapi_connection))

    def end_exposed(self) -> None:
        """End the statements on connections that user code has, because the transaction is rolled back."""
        for connection in self._exposed_in_use():
            if not await_only(end_statement(connection.connection.dbapi_connection)):
                connection.invalidate()

    def _exposed_in_use(self) -> list[Connection]:
        return [
            one
            for one in self.exposed
            if not (one.closed or one.invalidated) and may_be_in_use(one.connection.dbapi_connection)
        ]

    def streaming(self) -> bool:
        """Whether a result of ``stream()`` or ``stream_scalars()`` is unread and still referenced."""
        self.streams = tuple(stream for stream in self.streams if stream.unread)
        return bool(self.streams)

    def close_streams(self) -> None:
        """Close the unread results: some drivers will not commit over them."""
        streams, self.streams = self.streams, ()
        for stream in streams:
            stream.close()

    def may_read_alone(self) -> bool:
        """Whether nobody relies on a transaction that has not begun."""
        return (
            self.reads_alone
            and not self.ledger.begun
            and not (self.hooks is not None and self.hooks.begin)
            and not (self.exposed and not all(one.closed for one in self.exposed))
        )

    def writing(self) -> Ledger:
        """Return the current transaction's ledger for writing."""
        if self.ledger is BLANK:
            self.ledger = Ledger()
        return self.ledger

    def note_error(self, context: ExceptionContext, unit: int) -> None:
        """Record a statement's error, or an interrupted COMMIT."""
        committing, self.committing = self.committing, False
        statement = context.statement
        if statement is None and context.execution_context is not None:
            statement, self.streams = "", ()  # its rows were being fetched: no more will come
        if self.writing().note_error(context, statement, committing=committing, xid=self.xid):
            logger.error(
                "COMMIT on %s was interrupted (%s): its outcome is unknown, no hook runs and the connection "
                "is discarded; check the data before you repeat the work.",
                self.shared.name,
                type(context.original_exception).__name__,
                extra=self.shared.fields(unit, "unknown", self.ledger.written),
            )


class LateState:
    """A descriptor that creates a session's state on first access; the state then replaces it."""

    def __init__(self, shared: Shared) -> None:
        self._state_class: type[SessionState] = type("SessionState", (SessionState,), {"shared": shared})

    def __get__(self, session: StatefulSession, _: type[StatefulSession]) -> SessionState:
        session._fastapi_async_sqlalchemy = state = self._state_class()
        return state


class StatefulSession(Session):
    """A session with this package's one attribute."""

    _fastapi_async_sqlalchemy: SessionState


def pending(session: Session) -> int:
    """Count the objects that the next flush would write."""
    if session._is_clean():  # the public sets take thirty times as long
        return 0
    changed = sum(is_modified(session, one) for one in dirty_of(session))
    return len(new_of(session)) + changed + len(deleted_of(session))


def has_written(session: StatefulSession) -> bool:
    """Whether the current transaction has sent a statement that writes, or has objects to flush."""
    return bool(session._fastapi_async_sqlalchemy.ledger.written or pending(session))


def held_by_owner(session: StatefulSession) -> bool:
    """Whether user code holds the transaction: ``begin()``, a savepoint, a block, a stream, a busy task."""
    state = session._fastapi_async_sqlalchemy
    if state.ledger.begun or in_nested_transaction(session):
        return True
    if state.joined and not all(block.elsewhere() for block in state.joined):
        return True
    return (bool(state.streams) and state.streaming()) or (state.holder is not None and state.busy())


def note_statement(session: StatefulSession, statement: str, connection: Connection) -> None:
    """Record a statement that is about to be sent, unless it only reads."""
    verb = verb_of(statement)
    if verb not in READS:
        session._fastapi_async_sqlalchemy.writing().note_statement(statement, verb, connection)


def note_begun(session: StatefulSession, connection: Connection | None) -> None:
    """Record the connection on which SQLite was in the transaction before a statement that may write."""
    ledger = session._fastapi_async_sqlalchemy.ledger
    if ledger is not BLANK:
        ledger.begun_on = connection


def task_at_work() -> asyncio.Task[Any] | None:
    """Return the current task; None in a thread without an event loop, such as that of a ``def`` route."""
    try:
        return current_task()
    except RuntimeError:
        return None


def task_name(task: asyncio.Task[Any] | None) -> str:
    """Return a task's name for a message."""
    return "code outside any task" if task is None else f"task {task.get_name()!r}"
