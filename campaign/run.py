"""The campaign: a storm, a calm, a long walk for the memory, SIGTERM under load, the verdict."""

import asyncio
import random
from collections import Counter
from contextlib import AsyncExitStack, suppress
from typing import Any

from attrs import Factory, define, field, frozen
from attrs.validators import ge, gt
from sqlalchemy import URL

from campaign import verdict
from campaign.app import BROKEN_CONNECTION, CONFLICT, POOL_SIZE, Settings
from campaign.clients import Clients, routes_for
from campaign.faults import Faults
from campaign.process import DEADLINE, Process
from campaign.promise import ROUTES, Answer
from campaign.server import DATABASES, DRIVERS, Server
from campaign.verdict import Finding
from campaign.watch import COMPLAINTS

QUIET = 100
"""Requests that must succeed when the faults have stopped."""
FLUSH = ("two",) * 2 * POOL_SIZE + ("manual",) * 4 + ("routed_both", "second_plain") * 6
"""Requests that use every connection of every pool: a pool hands out the one that has waited longest."""
ABREAST = 2
"""Requests at a time without faults: so few that none ever waits for a connection."""
LAST_OF_LOG = 4000
"""Characters of the application's log that are shown."""
LAST_CONNECTIONS = 500
"""Attempts to end the application's connections before the verdict."""
FLAT = {"blocks": 1.05, "peak": 1.1}
"""What the second half of a long walk may add to what the first half has left, as a ratio."""


@frozen(kw_only=True)
class Plan:
    """How much of everything."""

    seed: int = 1
    requests: int = field(default=20_000, validator=ge(1))
    """After so many, or so many seconds, the storm ends as soon as each kind of fault has come about."""
    seconds: float = field(default=75.0, validator=gt(0))
    concurrency: int = field(default=16, validator=ge(1))
    memory_requests: int = field(default=0, validator=ge(0))
    pre_ping: bool = False
    driver: str = ""
    """The one that most routes use; the server's first where it is empty."""
    broken: str = ""
    routes: tuple[str, ...] = ()
    """Only these; all that the server can serve where it is empty."""
    faults: bool = True
    sigterm: bool = True
    patience: float = 10.0
    """Seconds that the application is given to become idle; what is left after that is lost."""
    deadline: float = DEADLINE
    """Seconds after which an answer counts as one that never comes."""


@define(eq=False)
class Result:
    """What a campaign has found."""

    plan: Plan
    server: str
    answers: list[Answer] = Factory(list[Answer])
    faults: Counter[str] = Factory(Counter[str])
    findings: list[Finding] = Factory(list[Finding])
    stale: int = 0
    """Requests that failed on a connection that had broken while it was idle."""
    recovery: tuple[float, str] = (0.0, "")
    """The longest time in seconds from the end of a fault to the next acknowledged write, and the fault."""
    calm: int = 0
    """Requests that were answered as they should be when the faults had stopped."""
    left: Counter[str] = Factory(Counter[str])
    """What was left behind where nothing should be, by kind: the most that was seen."""
    money: int = 0
    """The sum over the accounts."""
    transfers: int = 0
    memory: dict[str, list[int]] = Factory(dict[str, list[int]])
    """Before, in the middle and after the long walk."""
    errors: dict[str, int] = Factory(dict[str, int])
    """Log records at ERROR in the application's process, by logger."""
    exit_status: int | None = None
    log: str = ""

    def find(self, kind: str, text: str, number: int = 0) -> None:
        """Add something that must not be."""
        self.findings.append(Finding(kind, text, number))


@define(eq=False)
class Campaign:
    """One run against one server."""

    server: Server
    process: Process
    clients: Clients
    faults: Faults
    rng: random.Random
    result: Result

    async def go_through(self) -> None:
        """Go through all that is to happen, one after the other."""
        try:
            await self._all()
        except (OSError, EOFError) as error:  # a timeout is one, too
            self.result.find("gone", f"the application does not tell its state: {error!r}")

    async def _all(self) -> None:
        plan = self.result.plan
        await self.storm()
        await self.idle()
        await self.flush()
        await self.calm()
        await self.check_leaks()
        if plan.memory_requests:
            await self.walk(plan.memory_requests)
            await self.check_leaks()
        if plan.sigterm:
            await self.sigterm()

    async def judge(self) -> None:
        """Judge all answers by what is there now."""
        for _ in range(LAST_CONNECTIONS):  # what is not committed by now never will be
            if not await self.server.terminate(self.rng):
                break
        result, clients = self.result, self.clients
        rows = await verdict.read(self.server)
        result.findings += verdict.judge(clients.answers, rows)
        result.money, result.transfers = sum(rows.balances.values()), len(rows.transfers)
        result.answers = clients.answers
        result.recovery = self.recover()
        result.faults += self.faults.counts + clients.kinds
        for number in clients.hung:
            result.find("hung", f"{number} got no answer within {clients.deadline:g} seconds", number)
        log = self.process.log()
        result.log = log[-LAST_OF_LOG:]
        for complaint in COMPLAINTS:
            if complaint in log:
                result.find("leak", f"at the end the log says: {complaint}")

    async def storm(self) -> None:
        """Let clients and faults loose, until it is enough and each kind of fault has come about."""
        plan, stop, loop = self.result.plan, asyncio.Event(), asyncio.get_running_loop()
        over = loop.time() + plan.seconds
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.clients.storm(self.rng, plan.concurrency, stop))
            if plan.faults:
                tasks.create_task(self.faults.run(stop))
            while len(self.clients.answers) < plan.requests and loop.time() < over:  # noqa: ASYNC110  # either
                await asyncio.sleep(0.05)
            if plan.faults:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.faults.whole.wait(), DEADLINE)
            stop.set()
        self.faults.calm()

    async def flush(self) -> None:
        """Use each connection of each pool once: what broke while it was idle fails one request, no more."""
        for route in FLUSH:
            answer = await self.clients.ask(route)
            if answer.status == BROKEN_CONNECTION and not self.result.plan.pre_ping:
                self.result.stale += 1
            else:
                self.expect(answer)

    async def calm(self) -> None:
        """Hold that the next requests succeed."""
        for answer in await self.clients.calm(QUIET):
            self.result.calm += self.expect(answer)

    def expect(self, answer: Answer) -> bool:
        """Hold that a request was answered as its route answers where nothing goes wrong; returns whether."""
        promise = ROUTES[answer.route]
        expected = answer.status == promise.status or (promise.contended and answer.status == CONFLICT)
        if not expected:
            what = f"{answer.number} {answer.route} got {answer.status or 'no answer'}: {answer.error}"
            self.result.find("calm", f"without any fault {what}", answer.number)
        return expected

    async def idle(self) -> dict[str, Any]:
        """Wait until the application has nothing to do, and return its state."""
        state = dict[str, Any]()
        deadline = asyncio.get_running_loop().time() + self.result.plan.patience
        while asyncio.get_running_loop().time() < deadline:
            state = await self.process.state()
            state["idle"] = await self.server.idle_in_transaction()
            busy = state["in_flight"] or state["tasks"] or any(state["checked_out"].values())
            if not (busy or state["idle"]):
                break
            await asyncio.sleep(0.05)
        return state

    async def check_leaks(self) -> None:
        """Look for connections, tasks and transactions that nobody owns any more."""
        state = await self.idle()
        result = self.result
        result.errors = state["errors"]
        for kind, number, shown in (
            ("connections checked out", sum(state["checked_out"].values()), state["checked_out"]),
            ("sessions idle in a transaction", state["idle"], ""),
            ("requests under way", state["in_flight"], ""),
            ("tasks", len(state["tasks"]), state["tasks"][:3]),
            ("complaints of something dropped", len(state["leaks"]), state["leaks"][:2]),
        ):
            result.left[kind] = max(result.left[kind], number)
            if number:
                result.find("leak", f"{number} {kind} {shown}")

    async def walk(self, requests: int) -> None:
        """Send many requests without faults: the second half may not add to what the first one has left."""
        await self.clients.calm(min(requests // 5, 2000), ABREAST)  # what is made once for good
        states = [await self.idle()]
        for _ in range(2):
            answers = await self.clients.calm(requests // 2, ABREAST)
            states.append(await self.idle())
            for answer in answers:
                self.expect(answer)
        for key, limit in FLAT.items():
            values = self.result.memory[key] = [int(state[key]) for state in states]
            if values[2] > values[1] * limit:
                self.result.find(
                    "memory", f"{key} grew from {values[1]} to {values[2]} in {requests // 2} requests"
                )

    async def sigterm(self) -> None:
        """End the process under load."""
        stop = asyncio.Event()
        clients = asyncio.create_task(self.clients.storm(self.rng, self.result.plan.concurrency, stop))
        await asyncio.sleep(0.5)  # the load is there
        self.result.exit_status = status = await self.process.end()
        stop.set()
        await clients
        self.result.faults["SIGTERM"] += 1
        if status != 0:
            self.result.find("exit", f"SIGTERM under load: the process ended with {status}")

    def recover(self) -> tuple[float, str]:
        """Return the longest time from the end of a fault to the next acknowledged write."""
        writes = sorted(
            answer.at
            for answer in self.clients.answers
            if answer.seen == "acknowledged" and ROUTES[answer.route].transactions
        )
        longest, next_write = (0.0, ""), 0
        for ended, kind in self.faults.ended:
            while next_write < len(writes) and writes[next_write] < ended:
                next_write += 1
            if next_write < len(writes):
                longest = max(longest, (writes[next_write] - ended, kind))
        return longest


def reach(server: Server, driver: str, ports: dict[str, int]) -> dict[str, tuple[URL, dict[str, Any]]]:
    """Return how each database is reached through its proxy, and the first of them by another driver."""
    reached = {name: server.proxied(name, port, driver) for name, port in ports.items()}
    first = reached["main"][0].get_driver_name()
    second = next(other for other in DRIVERS[server.name] if other != first)
    return {**reached, "second": server.proxied("main", ports["main"], second)}


async def run(server: Server, plan: Plan) -> Result:
    """Run a campaign and judge it."""
    rng = random.Random(plan.seed)  # noqa: S311  # faults that can be had again, no secret
    result = Result(plan, server.name)
    async with AsyncExitStack() as stack:
        proxies = {name: await stack.enter_async_context(server.proxy(0.3)) for name in DATABASES}
        reached = reach(server, plan.driver, {name: proxy.port for name, proxy in proxies.items()})
        settings = Settings(
            urls={name: url.render_as_string(hide_password=False) for name, (url, _) in reached.items()},
            connect_args={name: arguments for name, (_, arguments) in reached.items()},
            pre_ping=plan.pre_ping,
            broken=plan.broken,
        )
        process = await stack.enter_async_context(Process(settings))
        routes = plan.routes or routes_for(postgresql=server.name == "postgresql")
        clients = Clients(process.port, routes, plan.deadline)
        faults = Faults(server, list(proxies.values()), lambda: clients.burst(3 * POOL_SIZE, 0.4), rng)
        campaign = Campaign(server, process, clients, faults, random.Random(rng.random()), result)  # noqa: S311  # as above
        await campaign.go_through()
        await campaign.judge()
    return result
