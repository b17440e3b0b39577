"""The example's application under load: what its clients are told, how long they wait, and what is stored."""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from time import monotonic
from uuid import uuid4

import pytest
from attrs import Factory, define
from httpx2 import AsyncClient, Response

from examples.cluster.app import ENGINE_ARGS, create_app, primary, replica
from fastapi_async_sqlalchemy import EngineArgs
from tests.support.databases import Judge
from tests.support.patroni import Cluster
from tests.support.replication import caught_up
from tests.support.serving import asgi_client
from tests.support.site import checked_out

Harm = Callable[[Cluster], Coroutine[None, None, None]]
by_url_or_proxy = pytest.mark.parametrize("proxied", [False, True], ids=["url of all", "haproxy"])
CLIENTS = 8
READERS = 2
ROUND = 50
"""How many writes are waited for before something is broken, and again when it is mended."""
BETWEEN_TRIES = 0.02
"""Seconds that a client waits after an error; one that did not would take the machine from the servers."""
LOADED = 4.0
"""Seconds by which a loaded machine may delay a request, or a read."""
BOUND = 3.0 + 3.0 + LOADED
"""Seconds for each request: `pool_timeout` and `timeout`; one that waits for the new leader takes the TTL."""


@define(eq=False)
class Load:
    """Clients that put one note after another, and others that read one, whatever the answer."""

    client: AsyncClient
    answers: Counter[str] = Factory(Counter[str])
    """How often each error was answered to a write."""
    refused_reads: Counter[str] = Factory(Counter[str])
    told: set[str] = Factory(set[str])
    sent: set[str] = Factory(set[str])
    writes: list[float] = Factory(list[float])
    """When each write was told."""
    reads: list[float] = Factory(list[float])
    """When each read was served."""
    longest: float = 0.0
    _run: str = Factory(lambda: uuid4().hex[:8])
    _times: asyncio.Queue[float] = Factory(asyncio.Queue[float])
    _refused: asyncio.Queue[int] = Factory(asyncio.Queue[int])
    """The clients that were refused."""
    _ended: bool = False

    async def _write(self, name: int) -> None:
        for number in itertools.count():
            if self._ended:
                return
            if await self.put(f"{self._run}-{name}-{number}") == 503:
                self._refused.put_nowait(name)
                await asyncio.sleep(BETWEEN_TRIES)

    async def _read(self, key: str) -> None:
        while not self._ended:
            response = await self._timed(self.client.get(f"/notes/{key}"))
            if response.status_code == 200:
                self.reads.append(monotonic())
            else:
                assert response.status_code == 503, response.text
                self.refused_reads[response.text] += 1
            await asyncio.sleep(BETWEEN_TRIES)

    async def _timed(self, request: Awaitable[Response]) -> Response:
        begun = monotonic()
        response = await request
        self.longest = max(self.longest, monotonic() - begun)
        return response

    async def put(self, key: str) -> int:
        """Put a note and return the status, 201 or 503."""
        self.sent.add(key)
        response = await self._timed(self.client.put(f"/notes/{key}", json={"text": "hello"}))
        if response.status_code == 201:
            self.told.add(key)
            self.writes.append(monotonic())
            self._times.put_nowait(self.writes[-1])
        else:
            assert response.status_code == 503, response.text
            self.answers[response.text] += 1
        return response.status_code

    async def more(self, count: int) -> float:
        """Wait until so many more writes are told than are now; return when the first of them was."""
        self._times = asyncio.Queue()
        return min([await self._times.get() for _ in range(count)])

    async def failed(self, clients: int = 1) -> None:
        """Wait until so many clients have been answered by an error from now on."""
        self._refused, names = asyncio.Queue(), set[int]()
        while len(names) < clients:
            names.add(await self._refused.get())

    @asynccontextmanager
    async def running(self, cluster: Cluster) -> AsyncGenerator[None]:
        """Run the clients; on exit each hears the answer to its last request."""
        first = f"{self._run}-first"
        assert await self.put(first) == 201
        await replayed(cluster)
        async with asyncio.TaskGroup() as clients:
            for name in range(CLIENTS):
                clients.create_task(self._write(name))
            for _ in range(READERS):
                clients.create_task(self._read(first))
            try:
                await self.more(ROUND)
                yield
                await self.more(ROUND)
            finally:
                self._ended = True

    async def check(self, cluster: Cluster, *, what: str, bound: float = BOUND) -> None:
        """Check that all that was told is there, that nothing waits any more, and print a line to quote."""
        rows = await stored(cluster)
        lost, untold = self.told - rows, (self.sent & rows) - self.told
        print(  # noqa: T201  # pytest -rP shows it
            f"{what}: told {len(self.told)}, refused {self.answers.total()}, lost {len(lost)}, "
            f"stored but not told {len(untold)}, no write for {pause(self.writes):.1f} s, "
            f"longest answer {self.longest:.1f} s; {dict(self.answers)}; reads: served {len(self.reads)}, "
            f"refused {self.refused_reads.total()}, none for {pause(self.reads):.1f} s"
        )
        assert lost == set()
        assert self.longest < bound
        assert [checked_out(db.engine.pool) for db in (primary, replica)] == [0, 0]

    def check_reads(self) -> None:
        """Check that reads went on; one in progress may fail: HAProxy closes connections to a new leader."""
        assert pause(self.reads) < LOADED
        assert self.refused_reads.total() <= READERS


async def lose_leader(
    cluster: Cluster, harm: Harm, client: AsyncClient, *, what: str, bound: float = BOUND
) -> None:
    """Harm the leader under load, and check the answers to the clients, and what the new leader has."""
    before = await asyncio.to_thread(cluster.leader)
    load = Load(client)
    async with load.running(cluster):
        harmed = asyncio.create_task(harm(cluster))
        await load.failed()
        await harmed
    assert await asyncio.to_thread(cluster.leader) is not before
    await load.check(cluster, what=f"{harm.__name__} {what}", bound=bound)
    load.check_reads()


def pause(times: list[float]) -> float:
    """Return the longest time between two of these moments."""
    return max((after - before for before, after in itertools.pairwise(times)), default=0.0)


@asynccontextmanager
async def application(
    primary_url: str, replica_url: str, engine_args: EngineArgs = ENGINE_ARGS
) -> AsyncGenerator[AsyncClient]:
    """Call the example's application in process; an error that it has no answer for is raised."""
    async with asgi_client(create_app(primary_url, replica_url, engine_args)) as client:
        yield client


async def replayed(cluster: Cluster) -> None:
    """Wait until all standbys have applied what the leader has written so far."""
    leader = await asyncio.to_thread(cluster.leader)
    async with AsyncExitStack() as exits:
        judges = {one: await exits.enter_async_context(Judge(one.url)) for one in cluster.members}
        primary = judges.pop(leader)
        for standby in judges.values():
            await caught_up(primary, standby)


async def stored(cluster: Cluster) -> set[object]:
    """Return the keys of the notes that the leader has."""
    leader = await asyncio.to_thread(cluster.leader)
    async with Judge(leader.url) as judge:
        return {key for (key,) in await judge.rows("SELECT key FROM note")}
