"""Three MariaDB that replicate by Galera, all on 127.0.0.1: each takes writes, and COMMIT asks the others."""

import os
import shutil
import signal
import subprocess
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil  # type: ignore[import-untyped]
from attrs import define
from sqlalchemy import URL

from tests.support.mariadb import FAST
from tests.support.programs import PATIENCE, Program, ProgramMissingError, free_ports, program, until

PROVIDERS = ("/usr/lib/galera/libgalera_smm.so", "/usr/lib64/galera-4/libgalera_smm.so")
NODES = 3
_OPTIONS = {"pc.recovery": "false", "gcache.size": "16M"}


@define(eq=False)
class Node:
    """One MariaDB of the cluster.

    Its methods block until what they do is done; call them by `asyncio.to_thread` where a loop runs.
    """

    port: int
    server: Program
    client: list[str]

    @property
    def url(self) -> str:
        """The node's database `shop`, by aiomysql."""
        return URL.create(
            "mysql+aiomysql", "root", host="127.0.0.1", port=self.port, database="shop"
        ).render_as_string()

    def run(self, statement: str) -> str:
        """Run a statement by the node's own client, and return what it prints; nothing where it fails."""
        done = subprocess.run(  # noqa: S603  # the server's own program
            [*self.client, "-e", statement], capture_output=True, text=True, check=False, timeout=PATIENCE
        )
        return done.stdout.strip()

    def status(self, name: str) -> str:
        """Return one of the node's wsrep status variables."""
        return self.run(f"SHOW STATUS LIKE 'wsrep_{name}'").rpartition("\t")[2]

    def kill(self) -> None:
        """Lose the node."""
        self.server.kill()

    def pause(self) -> None:
        """Let the node say nothing, as behind a cut network."""
        psutil.Process(self.server.pid).send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        psutil.Process(self.server.pid).send_signal(signal.SIGCONT)


@define(eq=False)
class Galera:
    """The nodes."""

    nodes: list[Node]

    def healthy(self) -> None:
        """Start what does not run, and wait until all nodes are in the cluster."""
        gone = [node for node in self.nodes if not node.server.runs]
        if gone:
            there = [node for node in self.nodes if node not in gone]
            size = f"{len(there)}"
            until("nodes that miss another", lambda: all(one.status("cluster_size") == size for one in there))
        for node in gone:
            node.server.start()
        until("a cluster of all nodes", lambda: all(_is_synced(node) for node in self.nodes), 2 * PATIENCE)


def _is_ready(node: Node) -> bool:
    return node.status("local_state_comment") == "Synced"


def _is_synced(node: Node) -> bool:
    return (node.status("cluster_size"), node.status("local_state_comment")) == (f"{NODES}", "Synced")


@contextmanager
def galera_cluster() -> Generator[Galera]:
    """Start the nodes; end them and remove what they stored on exit.

    Raises ProgramMissingError where a program is not installed, and ProgramError where one does not start.
    """
    server, install, client = (
        program(name, "Debian's package mariadb-server")
        for name in ("mariadbd", "mariadb-install-db", "mariadb")
    )
    program("rsync", "Debian's package rsync")
    provider = next((path for path in PROVIDERS if Path(path).exists()), None)
    if provider is None:
        message = "there is no Galera: install Debian's package galera-4."
        raise ProgramMissingError(message)
    with TemporaryDirectory(prefix="mariadb-") as name, ExitStack() as exits:
        if os.geteuid() == 0:
            shutil.chown(name, "mysql")
        ports = free_ports(4 * NODES)
        peers = ",".join(f"127.0.0.1:{port}" for port in ports[1::4])
        nodes = list[Node]()
        for number in range(NODES):
            folder = Path(name, f"node{number}")
            port, group, state, increments = ports[4 * number : 4 * number + 4]
            folder.mkdir()
            common = ["--no-defaults", f"--datadir={folder}/data", f"--tmpdir={folder}"]
            if os.geteuid() == 0:
                shutil.chown(folder, "mysql")
                common.append("--user=mysql")
            subprocess.run(  # noqa: S603  # the server's own program
                [install, *common, "--auth-root-authentication-method=normal", "--skip-test-db"],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            options = {
                "gmcast.listen_addr": f"tcp://127.0.0.1:{group}",
                "ist.recv_addr": f"127.0.0.1:{increments}",  # codespell:ignore ist
                **_OPTIONS,
            }
            command = [
                *(server, *common, *FAST, f"--socket={folder}/socket", f"--port={port}"),
                *("--bind-address=127.0.0.1", "--binlog-format=ROW", "--innodb-autoinc-lock-mode=2"),
                *(
                    "--wsrep-on=ON",
                    f"--wsrep-provider={provider}",
                    f"--wsrep-cluster-address=gcomm://{peers}",
                ),
                *(
                    "--wsrep-node-address=127.0.0.1",
                    "--wsrep-sst-method=rsync",
                    f"--wsrep-node-name=node{number}",
                ),
                f"--wsrep-sst-receive-address=127.0.0.1:{state}",
                f"--wsrep-provider-options={';'.join('='.join(one) for one in options.items())}",
            ]
            ask = [client, "--no-defaults", f"--socket={folder}/socket", "-u", "root", "-N", "-B"]
            node = Node(port, Program(command, folder / "log"), ask)
            exits.callback(node.kill)
            first = Program([*command, "--wsrep-new-cluster"], folder / "log")
            nodes.append(node)
            if number == 0:
                node.server = first
            node.server.start()
            node.server.ready(
                "a Galera node",
                partial(_is_ready, node),
                2 * PATIENCE,
            )
            node.server.command = command
        cluster = Galera(nodes)
        nodes[0].run("CREATE DATABASE shop")
        cluster.healthy()
        yield cluster
