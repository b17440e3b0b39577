"""One outcome for units of several databases, by two-phase commit.

One of the prepared transactions is the witness: it is prepared last and committed last, and its name says
so. If it is found after a crash, all were prepared, and the rest can be committed. If not, either nothing
was committed, or everything.
"""

from __future__ import annotations

import logging
import time
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast
from uuid import uuid4

from attrs import Factory, define, evolve
from sqlalchemy.engine import TwoPhaseTransaction
from sqlalchemy.exc import DBAPIError, IllegalStateChangeError
from sqlalchemy.orm import Session
from sqlalchemy.sql import text
from sqlalchemy.util import greenlet_spawn

from .._dialects.begin import commits_by_itself
from .._dialects.twophase import XID
from .._session.cancellation import to_completion
from .._session.hooks import Hooks, RegisteredHook
from .._session.plain import get_nested_transaction, in_transaction
from .._session.state import StatefulSession, has_written
from .._session.turns import cleaning, exclusive
from .._session.watched import connection_of, invalidate
from .._telemetry.logs import fields
from .._unit.database import UnitConfig
from .._unit.place import Handle
from .._unit.scope import OneUse, UnitScope
from .._unit.settling import Decision, before_commit, roll_back, settle
from ..exceptions import ConfigurationError, InDoubtError, UnexpectedRollbackError
from .branch import Branch, address_of, group_of

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType

    from sqlalchemy.engine import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

    from .._session.state import SessionState
    from .._unit.unit import UnitOfWork

logger = logging.getLogger("fastapi_async_sqlalchemy")
_FEWEST: Final = 2
_NO_WITNESS: Final = (
    "nothing was written to the last database of atomic(), and MariaDB would forget that all were prepared"
)
_REORDER: Final = "give atomic() last the database that is always written to"
_REOPEN: Final = "`async with atomic(...):`"


def atomic(*databases: Handle[AsyncSession]) -> AbstractAsyncContextManager[None, None]:
    """Open a unit of work on each database; all of them commit, or none.

    Inside ``async with atomic(a, b):`` the sessions of ``a`` and ``b`` belong to these units. Leaving the
    block prepares all, then commits all; an error rolls all back. Committing one explicitly raises
    ``TransactionBegunError``. PostgreSQL (``max_prepared_transactions`` above 0) and MariaDB can take part.

    Raises ``ConfigurationError`` for a wrong argument, ``SessionNotInitialisedError`` before an engine is
    bound. Leaving the block raises ``InDoubtError`` if a connection broke so late that a prepared transaction
    is left behind: ``python -m fastapi_async_sqlalchemy.recovery`` finishes it.
    """
    for one in databases:
        _require_proxy(one)
    least, taken = max(_FEWEST, len(databases)), {proxy._database for proxy in databases}
    if len(taken) < least or len({address_of(one.engine.url) for one in taken}) < least:
        message = "atomic() takes two databases or more, each with a different URL: use `db()` for one."
        raise ConfigurationError(message)
    for proxy in databases:
        if commits_by_itself(proxy._database.engine):
            message = (
                f"{proxy._database.name} is in AUTOCOMMIT, and atomic() could not roll it back: "
                "give it an engine without isolation_level='AUTOCOMMIT'."
            )
            raise ConfigurationError(message)
    return AtomicScope([_scope(proxy) for proxy in databases])


def _require_proxy(value: object) -> None:
    if not isinstance(value, Handle):
        wanted = "proxies such as `db`"
        msg = "databases"
        raise ConfigurationError(msg, wanted, value)


def _scope(proxy: Handle[AsyncSession]) -> UnitScope[Any]:
    settings = evolve(proxy._database.settings, twophase=True)
    make = proxy._database.maker(None, settings)
    return UnitScope(UnitConfig(proxy._database, settings, make), proxy._current)


@define(eq=False, repr=False)
class AtomicScope(OneUse):
    """The result of ``atomic(...)``: an async context manager around one unit of each database."""

    scopes: list[UnitScope[Any]]
    transaction: str = Factory(lambda: uuid4().hex)
    units: dict[UnitOfWork[Any], Branch] = Factory(dict["UnitOfWork[Any]", Branch])
    stack: AsyncExitStack = Factory(AsyncExitStack)

    async def __aenter__(self) -> None:
        self._enter_once(self.scopes[0].database.name, _REOPEN)
        begun, group = int(time.time()), group_of(scope.database.engine for scope in self.scopes)
        named_late = any(_is_named_late(scope.database.engine) for scope in self.scopes)
        async with AsyncExitStack() as stack:
            for place, scope in enumerate(self.scopes, 1):
                unit = await stack.enter_async_context(scope)
                witness = not named_late and place == len(self.scopes)
                self.units[unit] = branch = Branch(witness, begun, self.transaction, group, place)
                hooks, state = unit._own_hooks(), _state(unit)
                hooks.atomic, state.xid = True, str(branch)
                hooks.begin.insert(0, partial(_take_name, state))
            self.stack = stack.pop_all()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        async with self.stack.pop_all() as stack:
            if error is None:
                await to_completion(self._end())
            else:
                await stack.__aexit__(kind, error, trace)

    async def _end(self) -> None:
        """Prepare and commit the units in use; if one is rollback-only, roll all of them back."""
        for unit in self.units:
            await _run_hooks(unit)
        if any(unit._own_hooks().rollback_only for unit in self.units):
            for unit in reversed(self.units):
                await roll_back(unit)
            return
        used = [unit for unit in self.units if in_transaction(_watched(unit))]
        failures = list[BaseException]()
        if len(used) > 1 and not _only_read(used):
            failures = await self._commit_all(await self._in_order(used))
        else:
            for unit in used:
                _watched(unit).twophase = False
                await settle(unit, Decision.COMMIT, last=True)
        for unit in self.units:
            await unit._own_hooks().settled(committed=True)
        for other in failures[1:]:
            extra = fields(", ".join(unit._database.name for unit in used), outcome="committed")
            logger.error("Another listener failed after the COMMIT of atomic().", exc_info=other, extra=extra)
        if failures:
            raise failures[0]

    async def _in_order(self, used: list[UnitOfWork[Any]]) -> list[UnitOfWork[Any]]:
        """Return the units in the order of both phases, with a witness that lasts at the end."""
        late = [unit for unit in self.units if _is_named_late(unit._database.engine)]
        witness = late[-1] if late else next(unit for unit, branch in self.units.items() if branch.witness)
        if not late and not has_written(_watched(witness)):  # MariaDB forgets an empty prepared transaction
            await self._roll_back(used)
            raise UnexpectedRollbackError(witness._database.name, _NO_WITNESS, _REORDER)
        if late:
            _state(witness).xid = str(evolve(self.units[witness], witness=True))
        await greenlet_spawn(connection_of, _watched(witness))
        return [*(unit for unit in used if unit is not witness), witness]

    async def _roll_back(self, units: Iterable[UnitOfWork[Any]]) -> None:
        for unit in units:
            await roll_back(unit)

    async def _commit_all(self, units: list[UnitOfWork[Any]]) -> list[BaseException]:
        """Prepare all, then commit all; return the errors of listeners that failed after their COMMIT."""
        names = [unit._database.name for unit in units]
        await greenlet_spawn(_ask, _watched(units[-1]))
        for at, unit in enumerate(units):
            try:
                await greenlet_spawn(_prepare, _watched(unit))
            except BaseException as error:  # noqa: BLE001  # raised again below, as it is or as a cause
                original = _original(error)
                if unit is units[-1] and _is_unknown(original, unit._database.engine):
                    await _leave_behind(units)
                    raise InDoubtError(self.transaction, [], names) from original
                if left := await _undo(reversed(units[:at])):
                    raise InDoubtError(self.transaction, [], left) from original
                raise original  # noqa: B904  # the error itself, or was hidden by it
        failures = list[BaseException]()
        for at, unit in enumerate(units):
            try:
                failures += await _commit_prepared(unit)
            except BaseException as error:  # the witness must outlast the others
                await _leave_behind(units[at:])
                for committed in units[:at]:
                    await committed._own_hooks().settled(committed=True)
                raise InDoubtError(self.transaction, names[:at], names[at:]) from error
        return failures


async def _commit_prepared(unit: UnitOfWork[Any]) -> list[BaseException]:
    """Commit, leaving the hooks for later; return the error of a listener that failed after the COMMIT."""
    state, committed = _state(unit), list[object]()
    probe = Hooks(unit._database.shared, 0)
    probe.after.append(RegisteredHook(run=partial(committed.append, unit), on_commit=True))
    hooks, state.hooks = state.hooks, probe  # they run after all have committed
    try:
        await unit.session.commit()
    except BaseException as error:
        if not committed:
            raise
        return [error]
    finally:
        state.hooks = hooks
    return []


async def _run_hooks(unit: UnitOfWork[Any]) -> None:
    """Run the hooks of a unit without a transaction, once no other task uses it."""
    await _state(unit).idle()
    hooks = unit._own_hooks()
    hooks.atomic = False
    await before_commit(hooks, _watched(unit))


def _watched(unit: UnitOfWork[Any]) -> StatefulSession:
    return cast("StatefulSession", unit.session.sync_session)


def _state(unit: UnitOfWork[Any]) -> SessionState:
    return _watched(unit)._fastapi_async_sqlalchemy


def _is_named_late(engine: AsyncEngine) -> bool:
    """Whether a transaction gets its name when it is prepared, not when it begins."""
    return engine.dialect.name == "postgresql"


def _take_name(state: SessionState, connection: Connection) -> None:
    """Adopt the name under which MariaDB has begun the transaction."""
    transaction = connection.get_transaction()
    if XID in connection.info and isinstance(transaction, TwoPhaseTransaction):
        state.xid = transaction.xid = connection.info[XID]


def _ask(session: StatefulSession) -> None:
    """Flush, and check the connection while nothing is prepared; called inside SQLAlchemy's greenlet."""
    session.flush()
    if session._fastapi_async_sqlalchemy.ledger.failure is None:  # else the answer to PREPARE leaves no doubt
        connection_of(session).execute(text("SELECT 1"))


def _only_read(units: Iterable[UnitOfWork[Any]]) -> bool:
    """Whether nothing was written or is about to be: MariaDB prepares no such transaction."""
    return all(
        not (_is_named_late(unit._database.engine) or has_written(_watched(unit)))
        and not unit._own_hooks().before
        for unit in units
    )


def _prepare(session: StatefulSession) -> None:
    """Prepare a session's transaction under its current name; called inside SQLAlchemy's greenlet."""
    while (savepoint := get_nested_transaction(session)) is not None:
        savepoint.commit()  # release open savepoints, as COMMIT does
    session.flush()
    transaction = connection_of(session).get_transaction()
    if isinstance(transaction, TwoPhaseTransaction):
        transaction.xid = session._fastapi_async_sqlalchemy.xid
    exclusive(Session.prepare)(session)


async def _undo(units: Iterable[UnitOfWork[Any]]) -> list[str]:
    """Roll back prepared transactions; return the databases where one is left behind."""
    left = list[str]()
    for unit in units:
        try:
            await unit.session.rollback()
        except Exception:
            name = unit._database.name
            extra = unit._fields()
            logger.warning("ROLLBACK of what is prepared on %s failed.", name, exc_info=True, extra=extra)
            left.append(name)
    return left


async def _leave_behind(units: Iterable[UnitOfWork[Any]]) -> None:
    """Discard connections with their prepared transactions, which must not be rolled back."""
    for unit in units:
        unit._own_hooks().drop()
        await greenlet_spawn(cleaning(invalidate), _watched(unit))


def _original(error: BaseException) -> BaseException:
    """Return the database's error, which early versions of SQLAlchemy 2.0 hide behind their own."""
    hidden = error.__context__
    return hidden if isinstance(error, IllegalStateChangeError) and hidden is not None else error


def _is_unknown(error: BaseException, engine: AsyncEngine) -> bool:
    """Whether a statement may have been executed despite its error."""
    if isinstance(error, DBAPIError):
        return error.connection_invalidated
    # SQLAlchemy 2.0 passes some errors of asyncpg on unchanged, when a connection has broken
    is_driver_s = type(error).__module__.partition(".")[0] == engine.dialect.driver
    return is_driver_s or isinstance(error, OSError) or not isinstance(error, Exception)
