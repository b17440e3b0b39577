"""Listeners to ``connect`` of an engine in a sandbox: they run once, on the one real connection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attrs import define

if TYPE_CHECKING:
    from sqlalchemy.pool import ConnectionPoolEntry, Pool

    from .._dialects.logical import LogicalConnection
    from ._server import SandboxServer


def share_listeners(pool: Pool, own: Pool, server: SandboxServer) -> None:
    """Add ``connect`` listeners to an engine's own pool, even after ``Engine.dispose()``."""
    recreate = pool.recreate

    def recreate_and_share() -> Pool:
        new = recreate()
        share_listeners(new, own, server)
        return new

    for name in ("first_connect", "connect"):
        setattr(pool.dispatch, name, _Listeners(name, own, server))  # one of its slots
    vars(pool)["recreate"] = recreate_and_share


@define(eq=False, repr=False)
class _Listeners:
    """The listeners that an engine's own pool has; a logical connection does not call them itself."""

    name: str
    own: Pool
    server: SandboxServer

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(self.own.dispatch, self.name).for_modify(self.own.dispatch), name)

    def for_modify(self, _: object) -> _Listeners:
        """Return the collection to which SQLAlchemy adds a listener, and which it calls."""
        return self

    def exec_once_unless_exception(self, *_: object) -> None:
        """Do nothing: this is ``first_connect``, and ``connect`` follows immediately."""

    def _exec_w_sync_on_first_run(self, connection: LogicalConnection, record: ConnectionPoolEntry) -> None:
        """Run what is new; SQLAlchemy's pool calls ``connect`` by this name, in 2.0.58 and 2.1.9."""
        self.server.introduce(self.own, connection, record)
