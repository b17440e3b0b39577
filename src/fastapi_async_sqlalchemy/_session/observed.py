"""A session whose unit is observed: its wait for a connection, its statements and its COMMIT are measured.

Nothing of this is attached to another session, or to the engine itself: an observed session takes its
connections from an engine derived for such sessions.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakSet

from attrs import Factory, define, field
from sqlalchemy import event
from sqlalchemy.exc import TimeoutError as PoolTimeout

from .._dialects.statements import verb_of, writes
from .checkout import Checkout, Limits
from .plain import in_transaction
from .turns import pool_timeout

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Connection, Engine
    from sqlalchemy.engine.interfaces import DBAPICursor
    from sqlalchemy.orm import Session

    from .._telemetry.meter import UnitMeter
    from .state import SessionState


@define(eq=False, repr=False)
class ObservedEngines:
    """The derived engines of observed sessions, and the meters of their connections."""

    unlimited: Limits = Factory(lambda: Limits(timeout=None, places=None))
    """The limits of a session that has none; it derives the engine."""
    _meters: WeakKeyDictionary[Connection, UnitMeter] = Factory(WeakKeyDictionary["Connection", "UnitMeter"])
    _followed: WeakSet[Engine] = Factory(WeakSet["Engine"])

    def follow(self, engine: Engine, connection: Connection, meter: UnitMeter) -> None:
        """Count a connection's statements by a meter."""
        self._meters[connection] = meter
        if engine not in self._followed:
            self._followed.add(engine)
            event.listen(engine, "before_cursor_execute", self._before)
            event.listen(engine, "after_cursor_execute", self._after)
            for name in ("commit", "prepare_twophase"):
                event.listen(engine, name, self._commit)

    def holding(self) -> list[UnitMeter]:
        """Return the meters of the sessions that hold a connection, those that have held it longest first."""
        meters = {meter for meter in self._meters.values() if meter.held_since is not None}
        return sorted(meters, key=lambda meter: meter.held_since or 0.0)

    # user code may connect by the same engine, which `get_bind()` returns: such connections have no meter

    def _before(self, connection: Connection, _: object, statement: str, *_rest: object) -> None:
        if (meter := self._meters.get(connection)) is not None:
            meter.statement_sent(statement, writes=writes(statement, verb_of(statement)))

    def _after(self, connection: Connection, cursor: DBAPICursor, *_: object) -> None:
        if (meter := self._meters.get(connection)) is not None:
            meter.rows_counted(cursor.rowcount)

    def _commit(self, connection: Connection, *_: object) -> None:
        if (meter := self._meters.get(connection)) is not None:
            meter.commit_began()


@define(eq=False, repr=False)
class ObservedCheckout(Checkout):
    """The checkout of an observed session's connections."""

    state: SessionState = field(kw_only=True)
    meter: UnitMeter = field(kw_only=True)
    engines: ObservedEngines = field(kw_only=True)

    def connect(self, engine: Engine, outer_holds: Callable[[], bool] | None) -> Connection:
        """Check a connection out, measured."""
        self.meter.wait_began()
        try:
            if self.limits is self.engines.unlimited:
                connection = self._connect(engine)
            else:
                connection = super().connect(engine, outer_holds)
        except BaseException as error:
            self.meter.wait_ended(error)
            raise
        self.meter.wait_ended(None)
        self.engines.follow(engine, connection, self.meter)
        return connection

    def _connect(self, engine: Engine) -> Connection:
        """Check a connection out as a session without limits does."""
        try:
            return type(engine).connect(engine)
        except PoolTimeout as error:
            raise pool_timeout(self.state) from error

    def after_transaction(self, session: Session, *, committed: bool, unknown: bool) -> None:
        """Report the end of a transaction."""
        self.meter.transaction_ended(committed=committed, unknown=unknown)
        Checkout.after_operation(self, session)

    def after_operation(self, session: Session) -> None:
        """Report an error, and the end of the unit."""
        Checkout.after_operation(self, session)
        error = sys.exception()  # the operation's own: it has a greenlet to itself
        if error is not None:
            self.meter.operation_failed(error)
        state = self.state
        if state.closed and not in_transaction(session):
            if self.meter.held_since is not None:  # SQLAlchemy has not reached the transaction's end
                self.meter.transaction_ended(committed=state.committed, unknown=False)
            self.meter.unit_closed()
