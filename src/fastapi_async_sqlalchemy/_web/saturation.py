"""A WARNING when the connection pool fills up."""

from __future__ import annotations

import logging
from time import monotonic
from typing import TYPE_CHECKING

from attrs import define
from sqlalchemy import event

from .._arguments.checks import positive
from .._session.checkout import pool_status
from .._telemetry.logs import fields
from ..exceptions import ConfigurationError, _safe_repr

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

    from .._pool_status import PoolStatus

logger = logging.getLogger("fastapi_async_sqlalchemy")


@define(eq=False, repr=False)
class SaturationWarning:
    """A WARNING when a given share of a pool is checked out, repeated only after an interval."""

    threshold: float
    interval: float
    warned: float | None = None
    _database: str = ""
    _engine: Engine | None = None

    def check(self, engine: Engine) -> None:
        """Raise ``ConfigurationError`` for a pool without a limit."""
        if pool_status(engine.pool).capacity is None:
            kind = type(engine.pool).__name__
            message = (
                f"pool_warn_threshold needs a pool with a limit, and this {kind} has none: leave it out, or "
                "give the engine another pool_size, max_overflow or poolclass (engine_args, with db_url)."
            )
            raise ConfigurationError(message)

    def begin(self, database: str, engine: Engine) -> None:
        """Watch every checkout from the engine's pool, and from a pool that replaces it."""
        self._database = database
        if engine is not self._engine:
            self.end()
            event.listen(engine, "checkout", self._checkout)
            self._engine = engine

    def end(self) -> None:
        """Stop watching."""
        if self._engine is not None:
            event.remove(self._engine, "checkout", self._checkout)
            self._engine = None

    def _checkout(self, *_: object) -> None:
        if self._engine is not None:
            self.look(self._database, pool_status(self._engine.pool))

    def look(self, database: str, status: PoolStatus) -> None:
        """Warn if the pool has reached the threshold."""
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
                extra=fields(database),
            )


def saturation_warning(threshold: object, interval: object) -> SaturationWarning | None:
    """Validate a middleware's warning settings and return the warning, if any."""
    seconds = positive("pool_warn_interval", interval)
    if threshold is None:
        return None
    part = positive("pool_warn_threshold", threshold)
    if part > 1:
        message = f"pool_warn_threshold must be a part of the pool, at most 1, not {_safe_repr(threshold)}."
        raise ConfigurationError(message)
    return SaturationWarning(part, seconds)
