"""Servers that are programs of others: where they are, on which ports they listen, how they start and end."""

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil  # type: ignore[import-untyped]
from attrs import define, field, frozen

PATIENCE = 60.0
"""How many seconds something may take that takes a few."""
_PORTS = range(15000, 32000)
"""Ports that the system gives to no connection that goes out, so that they stay free once they are."""


class ProgramError(RuntimeError):
    """A program does not do what it should; the text has the end of its log."""


class ProgramMissingError(ProgramError):
    """A program is not installed; the text names the package that brings it."""


@frozen
class User:
    """Who runs a program, where that is not who runs this one."""

    user: int
    group: int

    def owns(self, path: Path) -> None:
        """Give it a file or a folder."""
        os.chown(path, self.user, self.group)

    def python(self) -> list[str]:
        """Return how to run Python as that user, who may have no way to root's interpreter."""
        ids = [f"--reuid={self.user}", f"--regid={self.group}", "--clear-groups"]
        return ["setpriv", *ids, "--inh-caps=+dac_override", "--ambient-caps=+dac_override", "--"]


def program(name: str, package: str) -> str:
    """Return where a program is, or raise ProgramMissingError."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if found is None:
        message = f"there is no program {name}: install {package}."
        raise ProgramMissingError(message)
    return found


def free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 on which nobody listens."""
    found: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        found.append(port)
        if len(found) == count:
            return found
    message = "there are no free ports"
    raise ProgramError(message)


def until(what: str, holds: Callable[[], bool], patience: float = PATIENCE) -> None:
    """Wait until something holds, or raise ProgramError; it blocks."""
    deadline = time.monotonic() + patience
    while not holds():
        if time.monotonic() > deadline:
            message = f"{what}: not within {patience} seconds"
            raise ProgramError(message)
        time.sleep(0.05)


@define(eq=False)
class Program:
    """A program of a session of its own, which Ctrl-C in a terminal does not reach."""

    command: Sequence[str]
    log: Path
    user: User | None = None
    environment: dict[str, str] = field(factory=dict[str, str])
    _process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process that a signal must go to."""
        if self._process is None:
            message = f"{self.command[0]} has not been started"
            raise ProgramError(message)
        return self._process.pid

    @property
    def runs(self) -> bool:
        """Whether it has been started, and has not ended."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it; its log goes on where it was."""
        with self.log.open("ab") as said:
            self._process = subprocess.Popen(  # noqa: S603  # the caller's program
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                cwd=self.log.parent,
                env={**os.environ, "HOME": f"{self.log.parent}", **self.environment},
                start_new_session=True,
                user=None if self.user is None else self.user.user,
                group=None if self.user is None else self.user.group,
                extra_groups=None if self.user is None else [],
            )

    def ready(self, what: str, holds: Callable[[], bool], patience: float = PATIENCE) -> None:
        """Wait until it does what it should, or raise ProgramError with the end of its log."""
        try:
            until(what, lambda: holds() or not self.runs, patience)
        except ProgramError as error:
            error.add_note(self._tail())
            raise
        if not self.runs:
            message = f"{what}: {self.command[0]} has ended\n{self._tail()}"
            raise ProgramError(message)

    def end(self, patience: float = PATIENCE) -> None:
        """Let it end, and kill it if it takes too long."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End it as a crash does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])


def kill_by_file(pid_file: Path, signal_: signal.Signals = signal.SIGKILL) -> None:
    """End the server whose process id stands in a file, and wait until it and its children have ended."""
    try:
        server = psutil.Process(int(pid_file.read_text().split()[0]))
    except (OSError, IndexError, psutil.NoSuchProcess):
        return
    try:
        family = [server, *server.children(recursive=True)]
        server.send_signal(signal_)
    except psutil.NoSuchProcess:
        return
    psutil.wait_procs(family, timeout=PATIENCE)
