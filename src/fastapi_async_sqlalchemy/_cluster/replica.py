"""Reading one's own writes from a replica: log positions of the primary, and units that wait for them."""

from __future__ import annotations

import asyncio
import logging
import re
from contextlib import nullcontext
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, Generic, NewType

from attrs import define
from sqlalchemy.orm import Session
from sqlalchemy.sql import text
from sqlalchemy.util import await_only, greenlet_spawn

from .._arguments.checks import positive
from .._dialects.alone import alone, is_idle, outside_transaction
from .._session.checkout import pool_status, remedy_for
from .._session.turns import exclusive
from .._session.watched import connection_of
from .._unit.database import S_co
from ..exceptions import ConfigurationError, PoolTimeoutError, ReplicaLagError, UnitClosedError

if TYPE_CHECKING:
    from types import TracebackType

    from sqlalchemy.engine import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

    from .._unit.scope import UnitScope
    from .._unit.unit import UnitOfWork

logger = logging.getLogger("fastapi_async_sqlalchemy")

WalPosition = NewType("WalPosition", str)
"""A position in PostgreSQL's write-ahead log, in the format of ``pg_lsn``; fits a header or a cookie."""

_POSITION: Final = re.compile(r"[0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8}")
# The position of the next record, since a COMMIT that waits for no disk may not be written yet. At the
# beginning of a block or segment it lies behind the header of 24 or 40 bytes, a position that no replay
# reaches before that record.
_POSITION_SQL: Final = """
SELECT CAST(next - CASE
    WHEN bytes % CAST(current_setting('wal_block_size') AS numeric) = 24 THEN 24
    WHEN bytes % pg_size_bytes(current_setting('wal_segment_size')) = 40 THEN 40
    ELSE 0 END AS text)
FROM (SELECT next, next - '0/0' AS bytes FROM pg_current_wal_insert_lsn() AS next) AS here
"""
# A promoted server replays no more: then its own writes count.
_REPLAYED_SQL: Final = """
SELECT CAST(reached AS text), reached >= CAST(CAST(:position AS text) AS pg_lsn)
FROM (SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END
    AS reached) AS here
"""
_FIRST_PAUSE: Final = 0.001
_LONGEST_PAUSE: Final = 0.05
"""Seconds between two queries; PostgreSQL does not report its replay position unasked."""
_GRACE: Final = 0.5
"""Extra seconds for a server that does not answer, so that one that answers can report its position."""


async def written_position(session: Session) -> WalPosition:
    """Return a primary's current log position; everything committed lies before it."""
    return await greenlet_spawn(_position, session)


def _position(session: Session) -> WalPosition:
    adapted: Any = connection_of(session).connection.dbapi_connection
    with alone(adapted) if is_idle(adapted) else nullcontext():
        return WalPosition(exclusive(Session.execute)(session, text(_POSITION_SQL)).scalar_one())


def require_postgresql(name: str, engine: AsyncEngine) -> None:
    """Raise ``ConfigurationError`` for a database whose log has no such positions."""
    if engine.dialect.name != "postgresql":
        message = f"{name} is PostgreSQL's alone: leave it out for {engine.dialect.name}."
        raise ConfigurationError(message)


@define(eq=False)
class Replay:
    """An on_begin hook that waits until the server has replayed a position."""

    database: str
    position: WalPosition
    timeout: float
    asked: bool = False
    """There is a connection, and the server was queried on it."""

    def __call__(self, connection: Connection) -> None:
        """Wait outside of the transaction: a snapshot taken before would be too old."""
        self.asked = True
        deadline = monotonic() + self.timeout
        pause = _FIRST_PAUSE
        while True:
            with outside_transaction(connection):
                found = connection.execute(text(_REPLAYED_SQL), {"position": self.position})
                replayed, is_there = found.one()
            if is_there:
                return
            if monotonic() + pause > deadline:
                raise ReplicaLagError(self.database, self.position, replayed, self.timeout)
            await_only(asyncio.sleep(pause))
            pause = min(2 * pause, _LONGEST_PAUSE)


def replay(database: str, position: object, timeout: object) -> Replay:
    """Validate the arguments of a unit that waits."""
    if not isinstance(position, str) or _POSITION.fullmatch(position) is None:
        wanted = "a position from `await primary.commit_position()`"
        msg = "position"
        raise ConfigurationError(msg, wanted, position)
    return Replay(database, WalPosition(position), positive("timeout", timeout))


@define(eq=False, repr=False)
class ReplicaScope(Generic[S_co]):
    """The result of ``db.after(...)``: a unit on the replica once it has caught up, or on the primary."""

    replica: UnitScope[S_co]
    wait: Replay
    primary: UnitScope[S_co] | None
    entered: UnitScope[S_co] | None = None

    async def __aenter__(self) -> UnitOfWork[S_co]:
        if self.entered is not None:
            raise UnitClosedError(self.replica.database.name)
        self.entered = self.replica
        unit = await self.replica.__aenter__()
        try:
            unit.on_begin(self.wait)
            await self._connect(unit)
        except BaseException as error:
            await self.replica.__aexit__(type(error), error, error.__traceback__)
            if self.primary is None or not isinstance(error, Exception):
                raise
            name, extra = unit._database.name, unit._fields()
            logger.warning("%s is not read from, its primary is instead: %s", name, error, extra=extra)
            self.entered = self.primary
            return await self.primary.__aenter__()
        return unit

    async def _connect(self, unit: UnitOfWork[S_co]) -> None:
        wait, session = self.wait, unit.session.sync_session
        limit = asyncio.timeout(wait.timeout + _GRACE)
        try:
            async with limit:
                await greenlet_spawn(connection_of, session)
        except TimeoutError as error:
            if not limit.expired():
                raise
            status = pool_status(session.get_bind().engine.pool)
            if not wait.asked and status.available == 0:
                remedy = remedy_for(unit._outer_holds)
                raise PoolTimeoutError(wait.database, wait.timeout, status, remedy) from error
            raise ReplicaLagError(wait.database, wait.position, None, wait.timeout) from error

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.entered is None:
            raise UnitClosedError(self.replica.database.name)
        await self.entered.__aexit__(kind, error, trace)
