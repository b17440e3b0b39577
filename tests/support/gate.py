"""A statement that stays under way until the test lets it go."""

import asyncio
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, Protocol

from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.support.databases import Judge


class Gate(Protocol):
    """Keeps `statement` from ending, for a minute at most, as long as it is closed."""

    statement: str

    async def close(self) -> None:
        """From now on the statement waits."""

    async def reached(self) -> None:
        """Wait until the database works on the statement."""

    async def open(self) -> None:
        """Let the statement go, and all that come."""


class ServerGate:
    """A lock by name that the judge holds."""

    def __init__(self, judge: Judge, statement: str, *, lock: str, waiting: str, unlock: str) -> None:
        self._judge = judge
        self.statement = statement
        self._lock, self._waiting, self._unlock = lock, waiting, unlock

    async def close(self) -> None:
        """Take the lock."""
        await self._judge.execute(self._lock)

    async def reached(self) -> None:
        """Look until somebody waits for the lock; each look is a round trip to the server."""
        while not await self._judge.scalar(self._waiting):
            pass

    async def open(self) -> None:
        """Give the lock back."""
        await self._judge.execute(self._unlock)


class ThreadGate:
    """A function of SQLite's that a statement calls again and again, so that it can be interrupted."""

    statement = (
        "WITH RECURSIVE wait(going) AS (VALUES (1) UNION ALL SELECT at_gate() FROM wait WHERE going)"
        " SELECT going FROM wait"  # row by row: the garbage collector must not wait for all to free a cursor
    )

    def __init__(self, engine: AsyncEngine) -> None:
        self._loop = asyncio.get_running_loop()
        self._reached = asyncio.Event()
        self._opened = threading.Event()
        event.listen(engine.sync_engine, "connect", self._add_function)

    def _add_function(self, connection: Any, _: object) -> None:
        connection.create_function("at_gate", 0, self._wait)

    def _wait(self) -> bool:
        self._loop.call_soon_threadsafe(self._reached.set)
        return not self._opened.wait(0.01)

    async def close(self) -> None:
        """Keep the function from answering that it is open."""
        self._reached.clear()
        self._opened.clear()

    async def reached(self) -> None:
        """Wait for the thread."""
        await self._reached.wait()

    async def open(self) -> None:
        """Wake the thread."""
        self._opened.set()


def gate_of(engine: AsyncEngine, judge: Judge) -> Gate:
    """Make the gate of a database, open; on SQLite it is for connections made from now on."""
    if engine.dialect.name == "postgresql":
        return ServerGate(
            judge,
            "SELECT pg_advisory_xact_lock(1)",
            lock="SELECT pg_advisory_lock(1)",
            waiting="SELECT count(*) FROM pg_locks JOIN pg_database ON pg_database.oid = database"
            " WHERE NOT granted AND locktype = 'advisory' AND datname = current_database()",
            unlock="SELECT pg_advisory_unlock(1)",
        )
    if engine.dialect.name == "mysql":
        return ServerGate(
            judge,
            "SELECT GET_LOCK(database(), 60), RELEASE_LOCK(database())",
            lock="SELECT GET_LOCK(database(), 10)",
            waiting="SELECT count(*) FROM information_schema.processlist"
            " WHERE db = database() AND state = 'User lock'",
            unlock="SELECT RELEASE_LOCK(database())",
        )
    return ThreadGate(engine)


@asynccontextmanager
async def closed(gate: Gate) -> AsyncGenerator[None]:
    """Keep a gate closed; it is open afterwards, whatever happened."""
    await gate.close()
    try:
        yield
    finally:
        await gate.open()


def passing(gate: Gate) -> Any:
    """Return the statement that waits at the gate."""
    return text(gate.statement)
