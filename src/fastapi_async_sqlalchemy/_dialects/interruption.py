"""Statements in progress: how each driver waits for one, or ends it."""

from __future__ import annotations

import asyncio
import socket
from typing import Any, Final

_PATIENCE: Final = 2.0
"""Seconds for PostgreSQL to cancel a statement, as SQLAlchemy allows it with asyncpg."""


async def statement_end(connection: Any) -> None:
    """Wait until no task is in the middle of a statement."""
    lock = _lock_of(connection)
    if lock is not None:
        async with lock:
            pass


def may_be_in_use(connection: Any) -> bool:
    """Whether a task may be in the middle of a statement."""
    lock = _lock_of(connection)
    return lock is None or lock.locked()


async def end_statement(connection: Any) -> bool:
    """End the statement in progress; return True if the connection goes on, False if it must be closed.

    SQLite's drivers do not go on before their statement ends, and a connection closed during a statement
    keeps the file locked. psycopg crashes the process when it is closed during a statement, so the statement
    must have ended before.
    """
    driver = connection.driver_connection
    if hasattr(driver, "interrupt"):
        await driver.interrupt()
        return True
    if hasattr(driver, "cancel_safe") and driver.lock.locked():
        await _cancel(driver)
    return False


async def _cancel(driver: Any) -> None:
    """Make the server cancel psycopg's statement, or cut the connection; wait for the statement's end."""
    try:
        async with asyncio.timeout(_PATIENCE):
            await driver.cancel_safe(timeout=_PATIENCE)
            async with driver.lock:
                return
    except Exception:  # noqa: BLE001  # any error: the server does not answer
        with socket.fromfd(driver.fileno(), socket.AF_INET, socket.SOCK_STREAM) as connected:
            connected.shutdown(socket.SHUT_RDWR)
    async with driver.lock:
        pass


def _lock_of(connection: Any) -> asyncio.Lock | None:
    """Return the lock that a statement holds: psycopg's own, or that of SQLAlchemy's adapter.

    aiosqlite's adapter had none before SQLAlchemy 2.0.38: there all calls wait in the driver's thread.
    """
    driver = connection.driver_connection
    lock: asyncio.Lock | None = getattr(driver, "lock", None) or getattr(connection, "_execute_mutex", None)
    return lock
