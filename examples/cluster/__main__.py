"""Start etcd, three PostgreSQL under Patroni, HAProxy and the application, with clients that write.

Ctrl-C ends them and removes all that they stored. The application's URL names all servers; with --haproxy it
names HAProxy. It needs the development requirements, and the programs etcd and haproxy.
"""

import argparse
import asyncio
import itertools
import os
import signal
import sys
from collections import Counter
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import TextIO

from attrs import Factory, define
from httpx2 import AsyncClient, HTTPError
from sqlalchemy import select
from sqlalchemy.exc import DBAPIError

from examples.cluster.app import Note, create_app, primary
from examples.cluster.kill import PID_FILE, lock
from tests.support.patroni import Cluster, Member, patroni_cluster
from tests.support.programs import ProgramMissingError
from tests.support.serving import serve

WRITERS = 4
ABSENCE = 30
"""Seconds until a killed member is restarted, like under systemd."""
GUIDE = """
Open  {url}/docs

Clients write continuously. Their responses are printed every five seconds, and so is each new leader.
Kill the leader, Patroni and PostgreSQL:
  make cluster-kill
Switch over to another leader:
  {patronictl} switchover --force
Query Patroni and the application:
  {patronictl} list
  curl {url}/servers

A killed leader is restarted after {absence} seconds. Ctrl-C ends the program and removes the servers.
"""


@define(eq=False)
class Clients:
    """Clients that write one note after another, and record which of them were acknowledged."""

    url: str
    acknowledged: set[str] = Factory(set[str])
    refused: Counter[str] = Factory(Counter[str])
    longest: float = 0.0

    async def write(self, name: int) -> None:
        """Write until cancelled."""
        async with AsyncClient(base_url=self.url, timeout=30) as client:
            for number in itertools.count():
                key, begun = f"{name}-{number}", monotonic()
                try:
                    response = await client.put(f"/notes/{key}", json={"text": "hello"})
                except HTTPError as error:  # the application ends
                    self.refused[type(error).__name__] += 1
                    await asyncio.sleep(1)
                    continue
                self.longest = max(self.longest, monotonic() - begun)
                if response.status_code == 201:
                    self.acknowledged.add(key)
                else:
                    self.refused[response.text] += 1
                await asyncio.sleep(0.05)

    def summary(self) -> str:
        """Return the responses so far."""
        refused = ", ".join(f"{count} {answer}" for answer, count in self.refused.items()) or "none"
        acknowledged = f"acknowledged {len(self.acknowledged)}"
        return f"{acknowledged}, longest response {self.longest:.1f} s, refused: {refused}"

    async def lost(self) -> str:
        """Count the acknowledged notes that are missing."""
        try:
            async with primary() as unit:
                return str(len(self.acknowledged - set(await unit.session.scalars(select(Note.key)))))
        except (DBAPIError, OSError) as error:
            return f"unknown, because there is no leader ({type(error).__name__})"


async def watch(cluster: Cluster) -> None:
    """Print each new leader."""
    before = ""
    while True:
        view = await asyncio.to_thread(cluster.view)
        now = ", ".join(f"{name} {one['role']} {one['state']}" for name, one in sorted(view.items()))
        if now != before:
            print(f"members: {now or 'no Patroni answers'}", flush=True)
        before = now
        await asyncio.sleep(0.5)


async def kill_leader(cluster: Cluster) -> None:
    """Kill the leader, and restart it later."""
    leader = await asyncio.to_thread(cluster.leader)
    print(f"killing {leader.name}", flush=True)
    await asyncio.to_thread(leader.kill)
    await asyncio.sleep(ABSENCE)
    leader.start()


async def report(clients: Clients) -> None:
    """Print the responses to the clients."""
    while True:
        await asyncio.sleep(5)
        print(clients.summary(), flush=True)


async def run(cluster: Cluster, pid_file: TextIO, *, proxied: bool) -> None:
    """Serve the application, with clients that write, until Ctrl-C or SIGTERM."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    for one in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(one, ended.set)
    app = create_app(cluster.url("primary", proxied=proxied), cluster.url("replica", proxied=proxied))
    async with serve(app) as address:
        clients, tasks = Clients(address.url), list[asyncio.Task[None]]()

        def start(work: Coroutine[None, None, None]) -> None:
            tasks.append(asyncio.create_task(work))

        loop.add_signal_handler(signal.SIGUSR1, lambda: start(kill_leader(cluster)))
        control = patronictl(cluster.members[0])
        print(GUIDE.format(url=address.url, patronictl=control, absence=ABSENCE), flush=True)
        for work in (watch(cluster), report(clients), *map(clients.write, range(WRITERS))):
            start(work)
        print(os.getpid(), file=pid_file, flush=True)
        await ended.wait()
        pid_file.truncate(0)  # the handler of SIGUSR1 ends with the loop
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        print(f"{clients.summary()}; lost: {await clients.lost()}", flush=True)


def patronictl(member: Member) -> str:
    """Return the command that controls the cluster."""
    return f"{Path(sys.executable).with_name('patronictl')} -c {member.folder}/patroni.yml"


def main() -> None:
    """Serve until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(prog="make cluster", description=__doc__)
    parser.add_argument("--haproxy", action="store_true", help="connect by HAProxy")
    proxied: bool = parser.parse_args().haproxy
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with PID_FILE.open("a") as pid_file:
        if not lock(pid_file):
            sys.exit("a cluster runs already: end it by Ctrl-C first.")
        pid_file.truncate(0)  # what a killed program left
        try:
            with suppress(KeyboardInterrupt), patroni_cluster() as cluster:
                asyncio.run(run(cluster, pid_file, proxied=proxied))
        except ProgramMissingError as error:
            sys.exit(f"{error}")


if __name__ == "__main__":
    main()
