"""Workers of task queues as processes, which a test stops at the one moment that it is about."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Self

from attrs import frozen
from sqlalchemy import NullPool, text
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from tests.support.databases import Judge

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 60
"""Seconds that a worker has to do what it must do."""
PAUSED = 60_000
"""Milliseconds for which a test lets Redis accept no writes, at most."""


@frozen
class Worker:
    """A worker with all its processes, a group; its output is in a file."""

    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        """Kill all its processes, as a crash of the machine does."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)

    async def says(self, what: str) -> bool:
        """Whether its output has something that matches the expression."""
        return re.search(what, self.log.read_text()) is not None

    def stop(self) -> str:
        """Ask it to end, wait until it has, and return its output."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(PATIENCE)
        return self.log.read_text()


@frozen
class Workers:
    """Starts workers of one database and one Redis."""

    environment: dict[str, str]
    folder: Path

    @contextmanager
    def run(self, *command: str, **environment: str) -> Generator[Worker]:
        """Start `python -m COMMAND`; on exit nothing of it is left."""
        log = self.folder / f"{len(list(self.folder.iterdir()))}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(  # noqa: S603  # the test's own worker
                [sys.executable, "-m", *command],
                cwd=ROOT,
                env={**os.environ, **self.environment, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        worker = Worker(process, log)
        try:
            yield worker
        finally:
            worker.kill()


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    """Wait until another process has made the condition true."""
    async with asyncio.timeout(PATIENCE):
        while not await condition():  # noqa: ASYNC110  # another process makes it true
            await asyncio.sleep(0.02)


@frozen
class Shop:
    """The example's database, seen from outside."""

    url: str
    judge: Judge

    @classmethod
    async def open(cls, url: str, judge: Judge) -> Self:
        """Make the tables, with a thousand pens in stock."""
        from examples.task_queues.shop import Base  # noqa: PLC0415  # it reads the environment

        engine = create_async_engine(url, poolclass=NullPool)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        await judge.execute("INSERT INTO product VALUES ('pen', 1000)")
        return cls(url, judge)

    async def order(self, quantity: int = 1) -> int:
        """Store an order of pens; return its number."""
        insert = (
            "INSERT INTO \"order\" (product, quantity, state) VALUES ('pen', :quantity, 'new') RETURNING id"
        )
        number = await self.judge.scalar(insert, quantity=quantity)
        assert isinstance(number, int)
        return number

    async def stock(self) -> object:
        """Return how many pens are left."""
        return await self.judge.scalar("SELECT stock FROM product")

    async def reserved(self) -> object:
        """Return how many orders are reserved."""
        return await self.judge.scalar("SELECT count(*) FROM \"order\" WHERE state = 'reserved'")

    async def reserved_are(self, count: int) -> bool:
        """Whether so many orders are reserved."""
        return await self.reserved() == count

    async def waiting(self) -> object:
        """Return how many statements wait for a lock."""
        return await self.judge.scalar(
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )

    async def waiting_are(self, count: int) -> bool:
        """Whether so many statements wait for a lock."""
        return await self.waiting() == count

    @asynccontextmanager
    async def locked(self, lock: str = "SELECT FROM product FOR UPDATE") -> AsyncGenerator[AsyncConnection]:
        """Lock the product, so that a task waits before it changes it; a ROLLBACK unlocks it early."""
        engine = create_async_engine(self.url, poolclass=NullPool)
        async with engine.connect() as connection:
            await connection.execute(text(lock))
            yield connection
