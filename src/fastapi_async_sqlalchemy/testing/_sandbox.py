"""The opening and the end of a sandbox: engines that hand out logical connections meanwhile."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

from attrs import Factory, define
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, QueuePool
from sqlalchemy.util import greenlet_spawn

from .._arguments.checks import positive
from .._dialects.adapters import knows, looks_at_driver
from .._dialects.loops import renew_queue
from .._session.cancellation import to_completion
from .._unit.place import Handle
from ..exceptions import ConfigurationError, SandboxError
from ._connection import IN_MEMORY, RealConnection
from ._listeners import share_listeners
from ._record import Sandbox
from ._server import SandboxServer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Hashable
    from contextlib import AbstractAsyncContextManager

    from sqlalchemy.engine import Engine
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.pool import Pool

    from .._proxy import SessionProxy
    from .._session.watch import Watch

_EVENTS: Final = ("checkout", "checkin", "reset", "invalidate", "soft_invalidate", "detach", "close_detached")
"""The pool's events that concern a logical connection; `connect` and `close` concern the real one."""
_OPEN: Final = "another one is open on the same database: use that one, or leave it before"


def sandbox(
    *databases: SessionProxy[AsyncSession] | AsyncEngine, timeout: float = 5.0
) -> AbstractAsyncContextManager[Sandbox, None]:
    """Undo at the end of the block all that is done on the databases inside it.

    Inside ``async with sandbox(db) as box:`` the application begins, commits and rolls back as it does in
    production. All transactions share one connection, each as a savepoint, and take turns on it: one that
    waits longer than ``timeout`` seconds raises ``SandboxError``. Engines that a proxy is given meanwhile
    are taken in, too.

    Raises ``ConfigurationError`` for a wrong argument, and ``SandboxError`` on exit if the sandbox could not
    go on to the end, or a failure that the test asked for has not come about.
    """
    for one in databases:
        _require_database(one)
    if not databases:
        message = "sandbox() takes at least one database: give it `db`."
        raise ConfigurationError(message)
    return cast("AbstractAsyncContextManager[Sandbox, None]", _open(databases, positive("timeout", timeout)))


def _require_database(value: object) -> None:
    if not isinstance(value, Handle | AsyncEngine):
        msg = "databases"
        wanted = "proxies such as `db`, or engines"
        raise ConfigurationError(msg, wanted, value)


@asynccontextmanager
async def _open(
    databases: tuple[SessionProxy[AsyncSession] | AsyncEngine, ...], patience: float
) -> AsyncGenerator[Sandbox]:
    box = Sandbox()
    takeover = _Takeover(box, patience, asyncio.get_running_loop())
    try:
        for one in databases:
            if isinstance(one, AsyncEngine):
                takeover.take(None, one.sync_engine)
            else:
                takeover.follow(one._database.shared)
        yield box
    finally:
        await to_completion(takeover.end())
    takeover.require()


@define(eq=False, repr=False)
class _Taken:
    """An engine that hands out logical connections."""

    engine: Engine
    own: Pool
    logical: Pool

    def give_back(self) -> bool:
        """Give the engine its own pool again; return whether the application has disposed the engine."""
        current = self.engine.pool
        for name in _EVENTS:
            before = list(getattr(self.own.dispatch, name))
            for listener in getattr(current.dispatch, name):
                if listener not in before:
                    event.listen(self.own, name, listener)
        self.engine.pool = self.own
        return current is not self.logical


@define(eq=False, repr=False)
class _Takeover:
    """The databases of an open sandbox, and their engines."""

    box: Sandbox
    timeout: float
    loop: asyncio.AbstractEventLoop
    watches: list[Watch] = Factory(list["Watch"])
    connections: list[RealConnection] = Factory(list[RealConnection])
    servers: dict[Hashable, SandboxServer] = Factory(dict["Hashable", SandboxServer])
    taken: list[_Taken] = Factory(list[_Taken])

    def follow(self, watch: Watch) -> None:
        """Take in the engines of a database, those that it has and those that it will have."""
        if watch.taken_in is not None:
            raise SandboxError(_OPEN)
        watch.taken_in, watch.count_hook = partial(self.take, watch), self.box._count_hook
        self.watches.append(watch)
        for engine in watch.loops.engines:
            self.take(watch, engine)

    def take(self, watch: Watch | None, engine: Engine) -> None:
        """Have an engine hand out logical connections; one that does already has another database."""
        if not knows(engine):
            message = (
                f"sandbox() has never been tried with {engine.dialect.driver}: use asyncpg, psycopg, "
                "aiomysql, asyncmy or aiosqlite."
            )
            raise ConfigurationError(message)
        own = next((one.own for one in self.taken if one.engine.pool is engine.pool), None)
        server = self._server_of(engine, engine.pool if own is None else own)
        if watch is not None:
            server.watches.append(watch)
        if own is not None:
            for listener in list(engine.pool.dispatch.checkout):
                if looks_at_driver(listener) and event.contains(engine, "checkout", listener):
                    event.remove(engine, "checkout", listener)
        else:
            renew_queue(engine, self.loop)
            server.connection.know(engine.pool)
            logical = _logical_pool(engine, engine.pool, server)
            self.taken.append(_Taken(engine, engine.pool, logical))
            engine.pool = logical

    def _server_of(self, engine: Engine, pool: Pool) -> SandboxServer:
        """Return the server of an engine's database, which engines of the same URL share."""
        key: Hashable = pool if engine.url.database in IN_MEMORY else engine.url
        if key not in self.servers:
            connection = RealConnection(engine, self.loop, self.connections)
            self.connections.append(connection)
            self.servers[key] = SandboxServer(connection, self.box, self.timeout)
        return self.servers[key]

    async def end(self) -> None:
        """Undo everything, and give the engines their own pools again."""
        for watch in self.watches:
            watch.taken_in = watch.count_hook = None
        disposed = [one.own for one in self.taken if one.give_back()]
        for server in self.servers.values():
            await server.close()
        for pool in disposed:
            await greenlet_spawn(pool.dispose)
        for one in self.taken:
            renew_queue(one.engine, self.loop)

    def require(self) -> None:
        """Raise ``SandboxError`` if a server could not go on, or a failure has not come about."""
        for server in self.servers.values():
            if server.over:
                raise SandboxError(server.over)
        self.box._require_met()


def _logical_pool(engine: Engine, own: Pool, server: SandboxServer) -> Pool:
    """Return a pool of logical connections with the limits and the listeners of an engine's own pool."""
    creator: Any = partial(server.connect, engine, own)
    pool: Pool
    if isinstance(own, QueuePool):
        size, overflow = own.size(), own._max_overflow
        pool = AsyncAdaptedQueuePool(creator, size, overflow, own.timeout(), dialect=engine.dialect)
    else:
        pool = NullPool(creator, dialect=engine.dialect)
    for name in _EVENTS:
        for listener in getattr(own.dispatch, name):
            if not looks_at_driver(listener):
                event.listen(pool, name, listener)
    share_listeners(pool, own, server)
    return pool
