"""What the application's process says of itself: connections out, tasks, complaints, memory."""

import asyncio
import gc
import logging
import resource
import sys
import warnings
from collections import Counter
from typing import Any

from attrs import Factory, define
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import QueuePool

COMPLAINTS = ("garbage collector", "garbage-collected", "never awaited", "was destroyed but it is pending")


@define(eq=False, slots=False)
class Complaints(logging.Handler):
    """Counts log records and warnings that tell of something left behind."""

    errors: Counter[str] = Factory(Counter[str])
    """Records at ERROR, by logger."""
    leaks: list[str] = Factory(list[str])

    def __attrs_pre_init__(self) -> None:
        """Make the handler itself."""
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        """Count one record."""
        text = record.getMessage()
        if record.levelno >= logging.ERROR:
            self.errors[record.name] += 1
        if any(leak in text for leak in COMPLAINTS):
            self.leaks.append(text[:500])


@define(eq=False)
class Watch:
    """What the state of the application is read from."""

    engines: dict[str, AsyncEngine]
    complaints: Complaints = Factory(Complaints)
    requests: int = 0
    in_flight: int = 0
    own_tasks: set[asyncio.Task[Any]] = Factory(set["asyncio.Task[Any]"])
    """The server's."""

    def begin(self) -> None:
        """Listen to the logs and the warnings, and take the tasks that there are for the server's."""
        warnings.simplefilter("always", ResourceWarning)
        warnings.simplefilter("always", RuntimeWarning)
        logging.captureWarnings(capture=True)
        printed = logging.StreamHandler()
        printed.setLevel(logging.ERROR)
        printed.addFilter(lambda record: record.name != "uvicorn.error")  # every error of a handler again
        for handler in (self.complaints, printed):
            logging.getLogger().addHandler(handler)
        self.own_tasks = asyncio.all_tasks()

    def state(self) -> dict[str, Any]:
        """Collect garbage and return the state as JSON can show it."""
        gc.collect()
        current = asyncio.current_task()
        tasks = [task for task in asyncio.all_tasks() - self.own_tasks if task is not current]
        return {
            "requests": self.requests,
            "in_flight": self.in_flight,
            "checked_out": {name: _checked_out(engine) for name, engine in self.engines.items()},
            "tasks": [repr(task)[:300] for task in tasks],
            "leaks": self.complaints.leaks,
            "errors": dict(self.complaints.errors),
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "blocks": sys.getallocatedblocks(),
        }


def _checked_out(engine: AsyncEngine) -> int:
    pool = engine.pool
    return pool.checkedout() if isinstance(pool, QueuePool) else 0
