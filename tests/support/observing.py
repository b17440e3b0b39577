"""An observer that keeps what it is told, and one that fails at every moment."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_async_sqlalchemy import (
    ObservedPool,
    ObservedTransaction,
    ObservedUnit,
    Observer,
    create_middleware_and_session_proxy,
)
from tests.support.databases import JudgeFor
from tests.support.site import Site
from tests.support.tables import engine_with_tables


class Recorder(Observer):
    """Keeps each moment, and the facts of it."""

    def __init__(self) -> None:
        self.moments: list[str] = []
        self.pools: list[ObservedPool] = []
        self.units: list[ObservedUnit] = []
        self.transactions: list[ObservedTransaction] = []
        self.errors: list[BaseException] = []

    def pool_bound(self, pool: ObservedPool) -> None:
        """Keep the pool; units are what most tests look at."""
        self.pools.append(pool)

    def pool_released(self, pool: ObservedPool) -> None:
        """Forget the pool."""
        self.pools.remove(pool)

    def unit_opened(self, unit: ObservedUnit) -> None:
        """Keep the unit."""
        self.moments.append("opened")
        self.units.append(unit)

    def wait_began(self, unit: ObservedUnit) -> None:
        """Keep the moment."""
        self.moments.append("wait")

    def wait_ended(self, unit: ObservedUnit, seconds: float, error: BaseException | None) -> None:
        """Keep the error."""
        assert seconds >= 0
        self.moments.append("connection" if error is None else type(error).__name__)
        if error is not None:
            self.errors.append(error)

    def transaction_ended(self, unit: ObservedUnit, transaction: ObservedTransaction) -> None:
        """Keep the transaction."""
        assert transaction.held >= transaction.committing >= 0
        self.moments.append(transaction.outcome)
        self.transactions.append(transaction)

    def hooks_ran(self, unit: ObservedUnit, count: int, seconds: float) -> None:
        """Keep the number."""
        assert seconds >= 0
        self.moments.append(f"{count} hooks")

    def unit_closed(self, unit: ObservedUnit) -> None:
        """Keep the moment."""
        assert unit in self.units
        self.moments.append("closed")


class Broken(Observer):
    """Fails at every moment."""

    def __getattribute__(self, name: str) -> Any:
        """Return a method that fails."""
        if name.startswith("_"):
            return super().__getattribute__(name)

        def fail(*_: object) -> None:
            message = f"{name} is broken"
            raise RuntimeError(message)

        return fail


@asynccontextmanager
async def open_observed(
    url: str, judge_for: JudgeFor, *observers: Observer, **engine_args: Any
) -> AsyncGenerator[Site]:
    """Connect a fresh pair to a database with tables, and observe it; on exit no connection may be out."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    async with engine_with_tables(url, **engine_args) as engine, db.connect(engine, observers=observers):
        site = Site(FastAPI(), db, engine, await judge_for(url))
        yield site
        assert site.checked_out() == 0
