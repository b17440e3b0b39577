"""The one real connection of a database in a sandbox, and the transactions that take turns on it."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final
from weakref import ref

from attrs import Factory, define
from sqlalchemy.util import await_only, greenlet_spawn

from .._dialects.adapters import logical_connection
from .._dialects.begin import commits_by_itself
from .._dialects.logical import Logical, LogicalConnection
from .._dialects.meaning import commits_implicitly
from .._dialects.pragmas import is_already, writes_header
from .._dialects.reads import asks_for_facts
from .._dialects.savepoints import connection_lost, has_given_up
from .._dialects.statements import verb_of, writes
from .._session.cancellation import to_completion
from .._session.state import task_at_work, task_name
from ..exceptions import SandboxError, _counted
from ._around import sessions_around

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from sqlalchemy.engine import Engine
    from sqlalchemy.pool import ConnectionPoolEntry, Pool

    from .._session.state import StatefulSession
    from .._session.watch import Watch
    from ._connection import RealConnection
    from ._record import Sandbox

_INNER: Final = (
    "a transaction of the same task, begun later, is still open, and in the sandbox both share one "
    "connection: end the inner one first"
)
_OUTLIVES: Final = (
    "a transaction rolled back its writes, and another one had been committed inside it meanwhile: in "
    "production that COMMIT stays, and here the one connection cannot keep it; test this without the sandbox"
)
_DISCARDED: Final = "a connection with its transaction open was discarded, and it could not be rolled back"
_BY_DATABASE: Final = (
    "its transaction has been ended from outside, for example by a deadlock or a broken connection"
)
_DDL: Final = (
    "MariaDB would commit the whole sandbox by {}: change the schema before the sandbox is opened, in a "
    "fixture of the session"
)
_LATE: Final = (
    "a listener to 'connect' was added too late, and cannot send its statements outside of the sandbox's "
    "transaction: add it before the first write and outside of units, or before the sandbox is opened"
)
_PRAGMA: Final = (
    "`{}` takes effect only outside of a transaction, and the sandbox cannot leave its own: something was "
    "written, or another unit is open. Add a listener to 'connect' that sends it before the first write"
)
_SAVEPOINTS: Final = frozenset({"SAVEPOINT", "RELEASE", "ROLLBACK"})
_NOT_COUNTED: Final = _SAVEPOINTS | {"SET", "PRAGMA", "SHOW"}


@define(eq=False, repr=False)
class SandboxServer:
    """A database in a sandbox: one connection, and a savepoint for each transaction that is open on it."""

    connection: RealConnection
    box: Sandbox
    timeout: float
    watches: list[Watch] = Factory(list["Watch"])
    """The databases of pairs that use the server."""
    over: str = ""
    """Why the sandbox cannot go on."""
    _open: list[Logical] = Factory(list[Logical])
    """The open transactions; each one's savepoint lies inside the one before."""
    _waiting: list[asyncio.Future[None]] = Factory(list["asyncio.Future[None]"])

    @property
    def dialect(self) -> str:
        """The name of the database's dialect."""
        return self.connection.engine.dialect.name

    @property
    def real(self) -> Any:
        """The driver's adapter."""
        return self.connection.adapter

    def connect(self, engine: Engine, own: Pool) -> LogicalConnection:
        """Return a new logical connection for an engine with its own pool; called inside a greenlet."""
        self._require()
        self.connection.open(engine, own)
        return logical_connection(engine, Logical(self, commits_by_itself(engine)))

    def introduce(self, own: Pool, connection: LogicalConnection, record: ConnectionPoolEntry) -> None:
        """Run the ``connect`` listeners added to an engine inside the sandbox; others have run."""
        session = self._session_at_work()
        while self.connection.not_run(own) and self._open and not self._lies_inside(self._open[-1], session):
            self._wait()
        new = self.connection.not_run(own)
        if new and not (self._open or self.connection.has_written()):
            with self._outside_transaction(Logical(self, autocommits=False)):
                for listener in new:
                    self.connection.run(listener, self.real, record)
        else:
            connection._logical.refuses = _LATE
            for listener in new:
                self.connection.run(listener, connection, record)
            connection._logical.refuses = ""
        self.connection.share_info(record.info)

    @contextmanager
    def _outside_transaction(self, holder: Logical) -> Generator[None]:
        """Leave the outer transaction; other tasks wait for ``holder`` until it begins again."""
        holder.begun(task_at_work(), None)
        self._open.append(holder)
        try:
            with self.connection.outside_transaction():
                yield
        except BaseException as error:
            if not self.connection.in_transaction:
                self._lose(_BY_DATABASE, error)
            raise
        finally:
            self._open.remove(holder)
            self._wake()

    def set_up(self, transaction: Logical, send: Callable[..., Any], statement: str) -> Any:
        """Send a PRAGMA that SQLite refuses or ignores inside a transaction."""
        if is_already(statement, self.connection.send):
            return None
        if len(self._open) > 1 or self.connection.has_written():
            raise SandboxError(_PRAGMA.format(statement.strip()))
        self._open.remove(transaction)
        try:
            with self._outside_transaction(Logical(self, autocommits=False)):
                return send(statement)
        finally:
            self._open.append(transaction)
            self._begin_savepoint(transaction)

    def _require(self) -> None:
        if self.over:
            raise SandboxError(self.over)
        self.connection.require()

    def before(self, transaction: Logical, statement: str) -> None:
        """Record a statement that is about to be sent, or refuse it."""
        verb = verb_of(statement)
        if commits_implicitly(self.dialect, statement):
            raise SandboxError(_DDL.format(verb))
        if verb in _SAVEPOINTS and transaction.follow_savepoint(statement, verb):
            self._lose(_OUTLIVES)
        if transaction.read_only and writes(statement, verb):
            self.connection.savepoints.refuse_write()
        self.connection.written |= writes(statement, verb) or writes_header(statement)
        if verb not in _NOT_COUNTED and not asks_for_facts(statement):
            self.box.statements.append(statement)
            if self.box._loses_connection(self.watches):
                self.end(transaction, commit=False)
                transaction.lost = True
                raise connection_lost(self.connection.engine)

    def is_open(self, transaction: Logical) -> bool:
        """Whether a transaction has begun."""
        return transaction in self._open

    def enter(self, transaction: Logical) -> None:
        """Begin a transaction, or go on with it once those inside it have ended."""
        self._require()
        if transaction in self._open:
            self._wait_for_inner(transaction)
            return
        session = self._session_at_work()
        while self._open and not self._lies_inside(self._open[-1], session):
            self._wait()
        transaction.begun(task_at_work(), None if session is None else ref(session))
        self._open.append(transaction)
        self._begin_savepoint(transaction)

    def _begin_savepoint(self, transaction: Logical) -> None:
        at = self._open.index(transaction)
        inside = any(outer.settings for outer in self._open[:at])
        self.connection.savepoints.open(f"sandbox_{at}", read_only=transaction.read_only, inside=inside)
        for statement, parameters in transaction.settings:
            self.connection.send(statement, *parameters)

    def _session_at_work(self) -> StatefulSession | None:
        """Return the session in the middle of an operation of the current task."""
        task = task_at_work()
        return next((one for watch in self.watches if (one := watch.operating.get(task))), None)

    def _lies_inside(self, top: Logical, session: StatefulSession | None) -> bool:
        """Whether a transaction that begins here lies inside the last one, which therefore waits for it."""
        task = task_at_work()
        if top.task is task:
            return True
        outer = None if top.session is None else top.session()
        return outer is not None and outer is not session and outer in sessions_around()

    def _wait_for_inner(self, transaction: Logical) -> None:
        while self._open[-1] is not transaction:
            if self._open[-1].task is task_at_work():
                raise SandboxError(_INNER)
            self._wait()

    def _wait(self) -> None:
        """Wait until a transaction has ended."""
        holder = self._open[-1]
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(ended)
        try:
            await_only(asyncio.wait_for(ended, self.timeout))
        except TimeoutError:
            message = (
                f"{task_name(task_at_work())} has waited {_counted(self.timeout, 'second')} for "
                f"{task_name(holder.task)} to end its transaction, because both share one connection: end "
                "that one sooner, or give sandbox() a longer timeout"
            )
            raise SandboxError(message) from None
        finally:
            if ended in self._waiting:
                self._waiting.remove(ended)
        self._require()

    def check(self) -> None:
        """Raise the error that COMMIT would raise."""
        self.connection.savepoints.check()

    def end(self, transaction: Logical, *, commit: bool) -> None:
        """End a transaction, if one has begun."""
        if transaction not in self._open or self.connection.ended:
            return
        self._require()
        self._wait_for_inner(transaction)
        if commit:
            self._commit(transaction)
            return
        self._roll_back(transaction)

    def _commit(self, transaction: Logical) -> None:
        failure, constraint = self.box._commit_failure(self.watches) if transaction.wrote else (None, None)
        try:
            if failure in {"constraint", "conflict"}:
                self.connection.savepoints.fail(failure, constraint)
            self.connection.savepoints.check()
        except Exception as error:
            if has_given_up(error):  # PostgreSQL answers such a COMMIT by ROLLBACK, without an error
                self._roll_back(transaction)
                return
            if not self.connection.savepoints.stays_open:
                self._roll_back(transaction)
            raise
        if failure == "lost":
            self._roll_back(transaction)
        else:
            self._release(transaction)
        if failure is not None:
            transaction.lost = True
            raise connection_lost(self.connection.engine)

    def _release(self, transaction: Logical) -> None:
        self._finish(f"RELEASE SAVEPOINT sandbox_{self._open.index(transaction)}")
        self._leave(transaction, committed=True)
        if transaction.wrote:
            self._keep()
        elif self._open:
            for statement, parameters in self._open[-1].settings:  # check() has reset them
                self.connection.send(statement, *parameters)
        self._resume()

    def _keep(self) -> None:
        """Let a COMMIT outlive the transactions around it that have not written: they begin after it."""
        moved = len(self._open)
        while moved and not (self._open[moved - 1].wrote or self._open[moved - 1].savepoints):
            moved -= 1
        for outer in self._open[:moved]:
            outer.hold()
        if moved < len(self._open):
            self._finish(f"RELEASE SAVEPOINT sandbox_{moved}")
            for outer in self._open[moved:]:
                self._begin_savepoint(outer)
        elif self._open:
            for statement, parameters in self._open[-1].settings:
                self.connection.send(statement, *parameters)

    def _roll_back(self, transaction: Logical) -> None:
        if transaction.holds:
            self._lose(_OUTLIVES)
        name = f"sandbox_{self._open.index(transaction)}"
        self._finish(f"ROLLBACK TO SAVEPOINT {name}")
        self._finish(f"RELEASE SAVEPOINT {name}")
        self._leave(transaction, committed=False)
        self._resume()

    def _resume(self) -> None:
        if self._open:
            self.connection.savepoints.resume(read_only=self._open[-1].read_only)

    def _finish(self, statement: str) -> None:
        try:
            self.connection.send(statement)
        except Exception as error:  # noqa: BLE001  # any error: the savepoint no longer exists
            self._lose(_BY_DATABASE, error)

    def _leave(self, transaction: Logical, *, committed: bool) -> None:
        self._open.remove(transaction)
        if transaction.wrote:
            self.box._ended(committed=committed)
        self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for ended in waiting:
            if not ended.done():
                ended.set_result(None)

    def _lose(self, reason: str, cause: BaseException | None = None) -> None:
        """End the sandbox before its time."""
        self.over = self.over or reason
        self._wake()
        raise SandboxError(self.over) from cause

    def lose(self, transaction: Logical) -> None:
        """End a transaction whose connection is discarded; the sandbox goes on if it can be rolled back."""
        if transaction not in self._open or self.connection.ended or self.over:
            return
        try:
            if self._open[-1] is transaction:
                await_only(self._undo(transaction))
        except Exception:  # noqa: BLE001, S110  # any error: the connection does not answer
            pass
        finally:
            if transaction in self._open:
                self._open.remove(transaction)
                with suppress(SandboxError):
                    self._lose(_DISCARDED)

    async def _undo(self, transaction: Logical) -> None:
        async def in_time() -> None:
            async with asyncio.timeout(self.timeout):
                await greenlet_spawn(self._roll_back, transaction)

        await to_completion(in_time())

    async def close(self) -> None:
        """Roll everything back."""
        await self.connection.close(discard=bool(self.over))
        self._wake()
