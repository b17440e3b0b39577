"""A question to the database that only asks whether it answers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy.orm import Session
from sqlalchemy.sql import text
from sqlalchemy.util import greenlet_spawn

from .._arguments.checks import positive
from .._session.checkout import Checkout, limits_of
from .._session.turns import exclusive
from .._session.watched import connection_of
from ..exceptions import _counted

if TYPE_CHECKING:
    from .._session.state import StatefulSession
    from .._unit.database import Database


async def ping(database: Database[Any], timeout: float) -> None:  # noqa: ASYNC109  # for each of its two parts
    """Check a connection out and send a statement in time; see ``SessionProxy.ping()``."""
    limits = limits_of("timeout", positive("timeout", timeout), None, database.shared)
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout
    async with database.new_session() as session:
        watched = cast("StatefulSession", session.sync_session)
        if limits is not None:
            watched._fastapi_async_sqlalchemy.limit(Checkout(database.name, limits))
        await greenlet_spawn(connection_of, watched)
        deadline = asyncio.timeout_at(end)
        try:
            async with deadline:
                await greenlet_spawn(exclusive(Session.scalar), watched, text("SELECT 1"))
        except TimeoutError as error:
            if not deadline.expired():
                raise  # the driver's own
            message = (
                f"{database.name} did not answer within {_counted(timeout, 'second')}, although it has let a "
                "connection in: look at its load, its disk and the network."
            )
            raise TimeoutError(message) from error
