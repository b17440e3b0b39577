"""Concurrent clients: each remembers what it saw of its requests; some leave before they have seen it."""

import asyncio
import random
from collections import Counter
from contextlib import suppress
from itertools import count
from typing import Literal

from attrs import Factory, define, frozen

from campaign.line import Head, Line
from campaign.promise import ROUTES, Answer, Promise

Manner = Literal[
    "patient", "client left", "client sent half", "client left at the status", "client timed out"
]
_MANNERS: dict[Manner, int] = {
    "patient": 80,
    "client left": 6,
    "client sent half": 2,
    "client left at the status": 6,
    "client timed out": 6,
}
DEADLINE = 20.0
"""Seconds after which an answer counts as one that never comes."""
GIVE_UP = 3
"""So many requests without an answer tell enough."""
_BROKEN = (OSError, EOFError, ValueError, asyncio.LimitOverrunError)


@frozen
class Errand:
    """What one request is to be."""

    number: int
    route: str
    manner: Manner = "patient"
    seconds: float = 0.0
    """How long a client stays that leaves or times out."""
    fail_at: int = 0
    hold: float = 0.0
    """How long a route that holds a connection does so, in seconds."""

    @property
    def promise(self) -> Promise:
        """What the route owes."""
        return ROUTES[self.route]

    @property
    def path(self) -> str:
        """The target of the request."""
        return f"/{self.route}/{self.number}?fail_at={self.fail_at}&hold={self.hold}"


@define(eq=False)
class Clients:
    """All clients of a campaign."""

    port: int
    routes: tuple[str, ...]
    deadline: float = DEADLINE
    answers: list[Answer] = Factory(list[Answer])
    kinds: Counter[str] = Factory(Counter[str])
    """The faults that clients brought about, by kind."""
    hung: list[int] = Factory(list[int])
    """Requests without an answer after a long time."""
    _numbers: "count[int]" = Factory(lambda: count(1))

    def draw(self, rng: random.Random) -> Errand:
        """Draw a request for the storm."""
        manner = rng.choices(list(_MANNERS), list(_MANNERS.values()))[0]
        fail_at = rng.randint(1, 8) if rng.random() < 0.12 else 0
        route = rng.choice(self.routes)
        if manner != "patient":
            self.kinds[manner] += 1
        elif fail_at:
            self.kinds["handler raised at an await point"] += 1
        return Errand(next(self._numbers), route, manner, rng.uniform(0, 0.05), fail_at)

    async def storm(self, rng: random.Random, concurrency: int, stop: asyncio.Event) -> None:
        """Send requests until it is enough, so many at a time."""

        async def client(own: random.Random) -> None:
            async with Line(self.port) as line:
                while not stop.is_set():
                    answer = await self.send(line, self.draw(own))
                    if answer.seen == "unknown" or answer.status >= 500:
                        await asyncio.sleep(own.uniform(0, 0.03))  # a server that is down answers at once

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(client(random.Random(rng.random())))  # noqa: S311  # to be had again

    async def calm(self, requests: int, concurrency: int = 1) -> list[Answer]:
        """Send so many requests, of each route in turn, while no fault is about."""
        first = len(self.answers)
        left = iter(range(requests))

        async def client() -> None:
            async with Line(self.port) as line:
                for at in left:
                    if len(self.hung) >= GIVE_UP:
                        return
                    route = self.routes[at % len(self.routes)]
                    await self.send(line, Errand(next(self._numbers), route), calm=True)

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(client())
        return self.answers[first:]

    async def ask(self, route: str) -> Answer:
        """Send one request to a route and wait for the whole answer."""
        async with Line(self.port) as line:
            return await self.send(line, Errand(next(self._numbers), route))

    async def burst(self, requests: int, seconds: float) -> None:
        """Send so many requests at once that hold a connection each."""

        async def client() -> None:
            async with Line(self.port) as line:
                await self.send(line, Errand(next(self._numbers), "hold", hold=seconds))

        async with asyncio.TaskGroup() as group:
            for _ in range(requests):
                group.create_task(client())

    async def send(self, line: Line, errand: Errand, *, calm: bool = False) -> Answer:
        """Send a request and remember what was seen of it."""
        head, at, body = None, 0.0, None
        try:
            seconds = errand.seconds if errand.manner == "client timed out" else self.deadline
            async with asyncio.timeout(seconds):
                await line.send(errand.path, half=errand.manner == "client sent half")
                if errand.manner in {"client left", "client sent half"}:
                    await asyncio.sleep(errand.seconds)
                    line.cut()
                else:
                    head = await line.head()
                    at = asyncio.get_running_loop().time()
                    body = await self._rest(line, errand, head)
        except TimeoutError:
            line.cut()
            if errand.manner != "client timed out":
                self.hung.append(errand.number)
        except _BROKEN:
            line.cut()
        answer = _answer(
            errand, head, at, body, calm=calm and (body is not None or errand.promise.client_leaves)
        )
        self.answers.append(answer)
        return answer

    @staticmethod
    async def _rest(line: Line, errand: Errand, head: Head) -> bytes | None:
        """Read the body, or leave; returns the whole body."""
        if errand.manner == "client left at the status":
            line.cut()
            return None
        if errand.promise.client_leaves and head.status < 400:
            with suppress(*_BROKEN):
                await line.chunk()
            line.cut()
            return None
        body = await line.body(head)
        if head.status >= 400 or errand.promise.fails_late or errand.fail_at:
            line.cut()  # the server ends a connection whose application has raised
        return body


def _answer(errand: Errand, head: Head | None, at: float, body: bytes | None, *, calm: bool) -> Answer:
    if head is None:
        return Answer(errand.number, errand.route, "unknown")
    return Answer(
        errand.number,
        errand.route,
        "acknowledged" if head.status < 400 else "refused",
        head.status,
        head.names("x-done"),
        head.names("x-doubt"),
        calm=calm,
        at=at,
        error=(body or b"").decode(errors="replace") if head.status >= 400 else "",
    )


def routes_for(*, postgresql: bool) -> tuple[str, ...]:
    """Return the routes that a kind of database can serve."""
    return tuple(name for name, promise in ROUTES.items() if postgresql or not promise.postgresql)
