"""The example's application under load: what its clients are told, how long they wait, and what is stored."""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from time import monotonic
from uuid import uuid4

from attrs import Factory, define
from httpx2 import AsyncClient

from examples.cluster.app import ENGINE_ARGS, create_app, primary, replica
from fastapi_async_sqlalchemy import EngineArgs
from tests.support.databases import Judge
from tests.support.patroni import Cluster
from tests.support.serving import asgi_client
from tests.support.site import checked_out

CLIENTS = 8
ROUND = 50
"""How many writes are waited for before something is broken, and again when it is mended."""
BETWEEN_TRIES = 0.02
"""Seconds that a client waits after an error; one that did not would take the machine from the servers."""
BOUND = 30.0
"""Seconds in which each request must be answered: far more than all timeouts of the engine together."""


@define(eq=False)
class Load:
    """Clients that put one note after another, whatever the answer."""

    client: AsyncClient
    answers: Counter[str] = Factory(Counter[str])
    """How often each error was answered."""
    told: set[str] = Factory(set[str])
    sent: set[str] = Factory(set[str])
    longest: float = 0.0
    _run: str = Factory(lambda: uuid4().hex[:8])
    _times: asyncio.Queue[float] = Factory(asyncio.Queue[float])
    """When each write was told."""
    _refused: asyncio.Event = Factory(asyncio.Event)
    _ended: bool = False

    async def _write(self, name: int) -> None:
        for number in itertools.count():
            if self._ended:
                return
            await self.put(f"{self._run}-{name}-{number}")

    async def put(self, key: str) -> int:
        """Put a note and return the status, 201 or 503."""
        self.sent.add(key)
        begun = monotonic()
        response = await self.client.put(f"/notes/{key}", json={"text": "hello"})
        self.longest = max(self.longest, monotonic() - begun)
        if response.status_code == 201:
            self.told.add(key)
            self._times.put_nowait(monotonic())
        else:
            assert response.status_code == 503, response.text
            self.answers[f"{response.status_code} {response.text}"] += 1
            self._refused.set()
            await asyncio.sleep(BETWEEN_TRIES)
        return response.status_code

    async def more(self, count: int) -> float:
        """Wait until so many more writes are told than are now; return when the first of them was."""
        while not self._times.empty():
            self._times.get_nowait()
        return min([await self._times.get() for _ in range(count)])

    async def failed(self) -> None:
        """Wait until a request is answered by an error."""
        self._refused.clear()
        await self._refused.wait()

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Run the clients; on exit each hears the answer to its last request."""
        async with asyncio.TaskGroup() as clients:
            for name in range(CLIENTS):
                clients.create_task(self._write(name))
            try:
                yield
            finally:
                self._ended = True

    async def check(self, cluster: Cluster, *, what: str, seconds: float) -> None:
        """Check that all that was told is there, that nothing waits any more, and print a line to quote."""
        rows = await stored(cluster)
        lost, untold = self.told - rows, (self.sent & rows) - self.told
        print(  # noqa: T201  # pytest -rP shows it
            f"{what}: told {len(self.told)}, refused {self.answers.total()}, lost {len(lost)}, "
            f"stored but not told {len(untold)}, first success after {seconds:.1f} s, "
            f"longest answer {self.longest:.1f} s; {dict(self.answers)}"
        )
        assert lost == set()
        assert self.longest < BOUND
        assert [checked_out(db.engine.pool) for db in (primary, replica)] == [0, 0]


@asynccontextmanager
async def application(
    primary_url: str, replica_url: str, engine_args: EngineArgs = ENGINE_ARGS
) -> AsyncGenerator[AsyncClient]:
    """Call the example's application in process; an error that it has no answer for is a 500."""
    async with asgi_client(
        create_app(primary_url, replica_url, engine_args), raise_app_exceptions=False
    ) as client:
        yield client


async def stored(cluster: Cluster) -> set[object]:
    """Return the keys of the notes that the leader has."""
    leader = await asyncio.to_thread(cluster.leader)
    async with Judge(leader.url) as judge:
        return {key for (key,) in await judge.rows("SELECT key FROM note")}
