"""What happens to the connections and the server meanwhile: seeded, bounded, counted by kind."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from functools import partial

from attrs import Factory, define

from campaign.proxy import CommitFault, Link, Proxy
from campaign.server import Server

RARE = 0.04
"""The part of the faults that last long: a restart of the server, an exhausted pool."""
_PAUSE = (0.02, 0.15)
_COMMIT_FAULTS: tuple[CommitFault, ...] = ("cut before COMMIT", "cut after COMMIT", "stall after COMMIT")

Bring = Callable[[], Awaitable[bool]]
"""Brings a fault about; returns whether there was something to bring it upon."""


@define(eq=False)
class Faults:
    """Brings faults about until it is told to stop: first until each kind has come about, then any."""

    server: Server
    proxies: list[Proxy]
    exhaust: Callable[[], Awaitable[None]]
    """What takes every connection of a pool for a while."""
    rng: random.Random
    ended: list[tuple[float, str]] = Factory(list[tuple[float, str]])
    """When which fault had ended, on the clock of the event loop."""
    whole: asyncio.Event = Factory(asyncio.Event)
    """Set when each kind has come about."""
    _counts: Counter[str] = Factory(Counter[str])

    @property
    def counts(self) -> Counter[str]:
        """The faults that came about, by kind."""
        return sum((proxy.met for proxy in self.proxies), start=self._counts.copy())

    async def run(self, stop: asyncio.Event) -> None:
        """Bring faults about."""
        common, rare = self._common(), self._rare()
        kinds = {**common, **rare}
        while not stop.is_set():
            missing = [kind for kind in kinds if kind not in self.counts]
            if not missing:
                self.whole.set()
                missing = list(rare if self.rng.random() < RARE else common)
            kind = self.rng.choice(missing)
            if await kinds[kind]():
                self._counts[kind] += 1
            self.ended.append((asyncio.get_running_loop().time(), kind))
            await asyncio.sleep(self.rng.uniform(*_PAUSE))

    def calm(self) -> None:
        """End what is still under way."""
        for proxy in self.proxies:
            proxy.disarm()

    def _common(self) -> Mapping[str, Bring]:
        links: dict[str, Callable[[Link], None]] = {
            "connection cut": Link.cut,
            "connection stalled": Link.stall,
            "half closed to the client": lambda link: link.half_close("client"),
            "half closed to the server": lambda link: link.half_close("server"),
        }
        kinds: dict[str, Bring] = {kind: partial(self._upon_link, act) for kind, act in links.items()}
        kinds |= {fault: partial(self._arm, fault) for fault in _COMMIT_FAULTS}
        return {**kinds, "backend terminated": partial(self.server.terminate, self.rng)}

    def _rare(self) -> Mapping[str, Bring]:
        kinds: dict[str, Bring] = {"pool exhausted": self._exhaust}
        if self.server.restart is not None:
            kinds["server stopped and started"] = self._restart
        return kinds

    async def _upon_link(self, act: Callable[[Link], None]) -> bool:
        link = self.rng.choice(self.proxies).choose(self.rng)
        if link is not None:
            act(link)
        return link is not None

    async def _arm(self, fault: CommitFault) -> bool:
        self.rng.choice(self.proxies).arm(fault)
        return False  # the proxy counts those that a COMMIT has met

    async def _exhaust(self) -> bool:
        await self.exhaust()
        return True

    async def _restart(self) -> bool:
        if self.server.restart is not None:
            await asyncio.to_thread(self.server.restart)
        return True
