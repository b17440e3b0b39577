"""The transaction settings of a unit: read-only, isolation level, deferrable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

from attrs import Factory, define
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from .._arguments.checks import ISOLATION_LEVELS, begin_of, boolean
from .._dialects.begin import TransactionSettings, engine_for
from .._dialects.reads import require_read_committed
from .._session.state import pending
from ..exceptions import ConfigurationError, ReadOnlyError

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
    from sqlalchemy.orm import Session, UOWTransaction

    from .._session.state import StatefulSession
    from .._session.watch import Watch


def transaction_settings(
    read_only: object,
    isolation_level: object,
    deferrable: object,
    default: TransactionSettings,
    begin: object = None,
) -> TransactionSettings:
    """Validate settings; return the pair's own if none is given."""
    if read_only is None and isolation_level is None and deferrable is None and begin is None:
        return default
    if default.read_only and read_only is None:
        read_only = True
    elif default.read_only and read_only is False:
        message = "read_only=False was asked of a read-only pair: open the unit by the primary's proxy."
        raise ConfigurationError(message)
    if isolation_level is not None and isolation_level not in ISOLATION_LEVELS:
        wanted = f"one of {', '.join(ISOLATION_LEVELS)}"
        msg = "isolation_level"
        raise ConfigurationError(msg, wanted, isolation_level)
    if begin_of(begin) == "on_first_write" and isolation_level not in {None, "READ COMMITTED"}:
        message = f"begin='on_first_write' is for READ COMMITTED: leave it or {isolation_level!r} out."
        raise ConfigurationError(message)
    level: Any = isolation_level
    return TransactionSettings(
        read_only=None if read_only is None else boolean("read_only", read_only),
        isolation_level=level,
        deferrable=None if deferrable is None else boolean("deferrable", deferrable),
        begin=begin_of(begin) or default.begin,
    )


def refuse_flush(name: str, session: Session) -> None:
    """Refuse to flush changed objects in a session of a read-only unit."""

    def before_flush(session: Session, _context: UOWTransaction, _objects: object) -> None:
        if count := pending(session):
            raise ReadOnlyError(name, count)

    event.listen(session, "before_flush", before_flush)


_CONNECTION: Final = (
    "{} holds a connection, whose transactions are its owner's: give an engine, or leave read_only, "
    "isolation_level, deferrable and begin out."
)


@define(eq=False, repr=False)
class SettingsRoute:
    """A route from a session's chosen engine to one over the same pool that applies the settings."""

    settings: TransactionSettings
    watch: Watch
    own: Engine
    """The engine of the pair."""
    _engines: dict[Engine, Engine] = Factory(dict["Engine", "Engine"])

    def __call__(self, bind: Engine | Connection) -> Engine:
        """Return the engine; raise ``ConfigurationError`` if the settings cannot apply."""
        if not isinstance(bind, Engine):
            raise ConfigurationError(_CONNECTION.format("get_bind()"))
        if self.settings.twophase and bind is not self.own:
            message = (
                "A session of atomic() may use the engine of its pair alone: give each engine its own pair."
            )
            raise ConfigurationError(message)
        if bind not in self._engines:
            self.watch.listen(bind)
            if self.settings.reads_alone:
                require_read_committed(bind, asked=self.settings.isolation_level is not None)
                self.watch.read_alone(bind)
            self._engines[bind] = derived = engine_for(bind, self.settings, self.watch.xid)
            self.watch.loops.engines.add(derived)
        return self._engines[bind]

    def require(self, bind: AsyncEngine | AsyncConnection) -> None:
        """Raise ``ConfigurationError`` if the settings cannot apply to an engine of the session."""
        if not isinstance(bind, AsyncEngine):
            raise ConfigurationError(_CONNECTION.format("session_args['binds']"))
        self(bind.sync_engine)

    def apply(self, session: AsyncSession) -> None:
        """Make a session begin its transactions with the settings."""
        watched = cast("StatefulSession", session.sync_session)
        watched._fastapi_async_sqlalchemy.route = self
        if self.settings.reads_alone:
            watched._fastapi_async_sqlalchemy.reads_alone = True
        if self.settings.read_only:
            refuse_flush(self.watch.name, watched)
