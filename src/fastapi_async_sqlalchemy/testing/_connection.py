"""The one real connection of a database in a sandbox."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from attrs import Factory, define, field
from sqlalchemy import event
from sqlalchemy.util import await_only, greenlet_spawn

from .._dialects.adapters import prepares_statements
from .._dialects.begin import commits_by_itself
from .._dialects.savepoints import Savepoints, savepoints_of
from ..exceptions import SandboxError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

    from sqlalchemy.engine import Engine
    from sqlalchemy.pool import ConnectionPoolEntry, Pool, PoolProxiedConnection

_OTHER_LOOP: Final = (
    "it was opened in another event loop: wrap the application in SandboxedApp(app, db), which opens the "
    "sandbox in the loop of TestClient"
)
_TWO_URLS: Final = (
    "two engines come to one database by different URLs, and so neither would see what the other commits: "
    "give both the same URL"
)
_PACKAGE: Final = "fastapi_async_sqlalchemy."
IN_MEMORY: Final = frozenset({None, "", ":memory:"})
"""What the URL of an SQLite database in memory names, which ends with its connection."""
_ENDED: Final = "its block has ended: use the database inside of it"


@define(eq=False, repr=False)
class RealConnection:
    """A connection in a transaction that is rolled back at the end; opened when it is first needed."""

    engine: Engine
    loop: asyncio.AbstractEventLoop
    _all: Iterable[RealConnection]
    """The connections of the sandbox, one for each database."""
    savepoints: Savepoints = field(init=False)
    ended: bool = False
    _opened: PoolProxiedConnection | None = None
    _used: set[Pool] = Factory(set["Pool"])
    """The engines' own pools that have connected; the first one's connection is this one."""
    _opening: asyncio.Lock = Factory(asyncio.Lock)
    written: bool = False
    """A statement that may have written was sent since the beginning."""
    in_transaction: bool = True
    changed: bool = False
    """Its settings differ from those that a later user of the connection expects."""
    _ran: list[Callable[..., Any]] = Factory(list["Callable[..., Any]"])
    """The listeners to ``connect`` that have run, or that the engines had before."""

    def __attrs_post_init__(self) -> None:
        self.savepoints = savepoints_of(self.engine, self.send)

    @property
    def adapter(self) -> Any:
        """The driver's adapter."""
        if self._opened is None:
            raise SandboxError(_ENDED)
        return self._opened.dbapi_connection

    def require(self) -> None:
        """Raise ``SandboxError`` after the end, and in another event loop."""
        if self.ended:
            raise SandboxError(_ENDED)
        if asyncio.get_running_loop() is not self.loop:
            raise SandboxError(_OTHER_LOOP)

    def open(self, engine: Engine, own: Pool) -> None:
        """Open the connection by an engine's own pool, unless it is open; called inside a greenlet."""
        if own not in self._used:
            await_only(self._open(engine, own))

    async def _open(self, engine: Engine, own: Pool) -> None:
        async with self._opening:
            if not self._used:
                await greenlet_spawn(self._begin, engine, own)
            elif own not in self._used:  # SQLAlchemy looks at the database once for each engine
                await greenlet_spawn(lambda: own.connect().close())
            self._used.add(own)

    def know(self, own: Pool) -> None:
        """Record the ``connect`` listeners that an engine has before the sandbox."""
        self._ran.extend(listeners_of(own))

    def not_run(self, own: Pool) -> list[Callable[..., Any]]:
        """Return the listeners added to an engine since then that have not run."""
        return [one for one in listeners_of(own) if one not in self._ran]

    def run(self, listener: Callable[..., Any], connection: object, record: ConnectionPoolEntry) -> None:
        """Call a listener to ``connect``; one that fails is called again for the next connection."""
        listener(connection, record)
        self._ran.append(listener)

    def share_info(self, info: dict[Any, Any]) -> None:
        """Share what listeners have put in a connection's ``info``, without this package's entries."""
        if self._opened is not None:
            own = self._opened.info
            info.update({key: value for key, value in own.items() if not str(key).startswith(_PACKAGE)})
            own.update(info)

    def has_written(self) -> bool:
        """Whether something may be lost with the transaction."""
        return self.written or self.savepoints.has_written()

    @contextmanager
    def outside_transaction(self) -> Generator[None]:
        """End the transaction, in which nothing was written, and begin another one afterwards."""
        self.changed, self.in_transaction = True, False
        self.adapter.rollback()
        self.savepoints.restore_settings()
        self.adapter.commit()
        try:
            yield
        finally:
            self.savepoints.begin()
            self.in_transaction = True

    def _begin(self, engine: Engine, own: Pool) -> None:
        if any(other._opened is not None and self._goes_to_the_place_of(other) for other in self._all):
            raise SandboxError(_TWO_URLS)
        fresh: list[object] = []
        event.listen(own, "connect", mark := lambda *_: fresh.append(_))
        try:
            self._opened = opened = own.connect()
        finally:
            event.remove(own, "connect", mark)
        if fresh:
            self.changed = bool(self.not_run(own))
            self.know(own)
        dialect = engine.dialect
        try:
            if commits_by_itself(engine) and dialect.default_isolation_level is not None:
                dialect.set_isolation_level(self.adapter, dialect.default_isolation_level)
            self.changed |= prepares_statements(self.adapter)
            self.savepoints.begin()
        except BaseException:
            self._opened = None
            opened.invalidate()
            raise

    def _goes_to_the_place_of(self, other: RealConnection) -> bool:
        here, there = (
            (one.engine.dialect.name, url.host, url.port, url.database, url.query.get("host"))
            for one in (self, other)
            for url in (one.engine.url,)
        )
        return here == there and self.engine.url != other.engine.url

    def send(self, statement: str, *parameters: Any, rows: bool = False) -> Any:
        """Send a statement, and return its rows."""
        cursor = self.adapter.cursor()
        try:
            cursor.execute(statement, *parameters)
            return cursor.fetchall() if rows else None
        finally:
            cursor.close()

    async def close(self, *, discard: bool) -> None:
        """Roll everything back; discard a connection that does not answer any more."""
        self.ended = True
        opened, self._opened = self._opened, None
        if opened is not None:
            leaves = self.changed and self.engine.url.database not in IN_MEMORY
            if leaves and not discard:
                await greenlet_spawn(opened.rollback)  # 2.0.58 closes SQLite's connection only later
            await greenlet_spawn(opened.invalidate if discard or leaves else opened.close)


def listeners_of(own: Pool) -> list[Callable[..., Any]]:
    """Return all listeners to the opening of a connection, in their order."""
    return [*own.dispatch.first_connect, *own.dispatch.connect]
