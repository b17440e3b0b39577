"""How a session is ended when something is in its way: cancellations, tasks in the middle of a statement."""

from __future__ import annotations

import asyncio
import traceback
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy.exc import IllegalStateChangeError, SQLAlchemyError
from sqlalchemy.orm import Session

from ._session_state import ENDINGS

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from sqlalchemy.ext.asyncio import AsyncSession

    from ._session import ObservedSession


async def to_completion(cleanup: Coroutine[Any, Any, None]) -> None:
    """Run a clean-up in a task of its own and wait for its end, through any cancellation.

    A cancellation that arrives meanwhile is raised at the end.
    """
    task = asyncio.ensure_future(cleanup)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError as error:
            cancelled = error
    task.result()
    if cancelled is not None:
        try:
            raise cancelled
        finally:
            cancelled = None  # else this frame and the error would hold each other, and a cursor of SQLite's


def let_go(error: BaseException | None) -> None:
    """Have the frames that a cancellation has left drop what they hold.

    SQLAlchemy's refer to each other until they are collected, and to a cursor, by which SQLite keeps a lock
    on its file so long.
    """
    if isinstance(error, asyncio.CancelledError):
        traceback.clear_frames(error.__traceback__)


async def take_away(opened: AsyncSession, session: ObservedSession) -> None:
    """End a session under a task that is in the middle of an operation on it.

    The connection is discarded, so that the task's statement fails and no other request inherits it; where
    the driver can interrupt a statement, that is enough. In the middle of COMMIT or of a checkout
    SQLAlchemy refuses: then the operation closes the session when it ends. COMMIT is waited for, a
    checkout holds no connection yet.
    """
    session.uow_closed = True
    if await interrupt(opened):
        await session.idle()
        return
    try:
        await opened.invalidate()
    except IllegalStateChangeError:
        if session.uow_operation in ENDINGS:
            await session.idle()


async def interrupt(opened: AsyncSession) -> bool:
    """Interrupt the statement under way, where the driver can; returns whether it can.

    SQLite's do not go on before their statement ends, and one closed under it keeps the file locked.
    """
    driver = await opened.run_sync(_driver_connection)
    if not hasattr(driver, "interrupt"):
        return False
    await driver.interrupt()
    return True


def _driver_connection(session: Session) -> Any:
    """Return the driver's connection of a session that is in the middle of a statement, else None."""
    if not session.in_transaction():
        return None
    try:
        return Session.connection(session).connection.driver_connection
    except SQLAlchemyError:  # in the middle of COMMIT or of a checkout
        return None


def close_streams(session: Session) -> None:
    """Close the results that nobody has read; for ``run_sync()``."""
    cast("ObservedSession", session).close_streams()


def release(session: Session) -> None:
    """Give the connection of a transaction that only read back; for ``run_sync()``."""
    cast("ObservedSession", session).release()
