"""Clean-ups that survive any cancellation."""

from __future__ import annotations

import asyncio
import traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Coroutine


async def to_completion(cleanup: Coroutine[Any, Any, None]) -> None:
    """Run a clean-up in a separate task and wait for its end, through any cancellation.

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
            cancelled = None  # else this frame and the error would keep each other and a SQLite cursor alive


def clear_frames(error: BaseException | None) -> None:
    """Make the frames of a cancellation drop their local variables.

    SQLAlchemy's frames refer to each other until they are collected. They also refer to a cursor, through
    which SQLite keeps a lock on its file for as long.
    """
    if isinstance(error, asyncio.CancelledError):
        traceback.clear_frames(error.__traceback__)
