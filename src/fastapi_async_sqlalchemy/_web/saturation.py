"""A WARNING when the connection pool fills up."""

from __future__ import annotations

import logging
from time import monotonic
from typing import TYPE_CHECKING

from attrs import define
from sqlalchemy import event

from .._arguments.checks import positive
from .._session.checkout import pool_status
from ..exceptions import ConfigurationError

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

    from .._pool_status import PoolStatus

logger = logging.getLogger("fastapi_async_sqlalchemy")


@define(eq=False, repr=False)
class SaturationWarning:
    """Logs a WARNING when so large a part of a pool is checked out, and not again for some seconds."""

    threshold: float
    interval: float
    warned: float | None = None

    def watch(self, database: str, engine: Engine) -> None:
        """Look at every checkout from the engine's pool, also from one that takes its place."""

        def checkout(*_: object) -> None:
            self.look(database, pool_status(engine.pool))

        event.listen(engine, "checkout", checkout)

    def look(self, database: str, status: PoolStatus) -> None:
        """Warn of what was just checked out."""
        now = monotonic()
        full = status.saturation is not None and status.saturation >= self.threshold
        if full and (self.warned is None or now - self.warned >= self.interval):
            self.warned = now
            logger.warning(
                "%s: %s of %s connections are checked out: hold them for a shorter time, admit fewer "
                "requests by max_concurrent_requests=, or give engine_args a larger pool_size.",
                database,
                status.checked_out,
                status.capacity,
            )


def saturation_warning(engine: Engine, threshold: object, interval: object) -> SaturationWarning | None:
    """Return the warning that a middleware asks for, checked."""
    seconds = positive("pool_warn_interval", interval)
    if threshold is None:
        return None
    part = positive("pool_warn_threshold", threshold)
    if part > 1:
        wanted = "a part of the pool, at most 1"
        msg = "pool_warn_threshold"
        raise ConfigurationError(msg, wanted, threshold)
    if pool_status(engine.pool).capacity is None:
        message = (
            f"pool_warn_threshold needs a pool with a limit, and this {type(engine.pool).__name__} has none: "
            "leave it out, or give engine_args another pool_size, max_overflow or poolclass."
        )
        raise ConfigurationError(message)
    return SaturationWarning(part, seconds)
