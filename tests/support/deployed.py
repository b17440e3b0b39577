"""The servers that the page about deployment names, as processes of their own."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

from attrs import define, frozen

from tests.support.databases import Judge
from tests.support.serving import Address, RawResponse

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 60
"""Seconds that a server has to do what it must do: a failure then says what it was, before pytest's own."""
CONNECTIONS = (
    "SELECT application_name FROM pg_stat_activity "
    "WHERE datname = current_database() AND application_name LIKE 'orders-%'"
)
WAITING = f"SELECT count(*) FROM ({CONNECTIONS} AND wait_event_type = 'Lock') AS waiting"
BUSY = f"SELECT count(*) FROM ({CONNECTIONS} AND state <> 'idle') AS busy"
NOT_CLOSED = (
    "SELECT sessions_abandoned + sessions_fatal + sessions_killed FROM pg_stat_database "
    "WHERE datname = current_database()"
)
"""How many connections have ended without the client's goodbye."""


@frozen
class Server:
    """A command of the page, with the port 8000 and 20 seconds for requests under way after SIGTERM."""

    name: str
    words: list[str]
    processes: int

    @property
    def program(self) -> str:
        """The program that the command runs."""
        return self.words[0]

    @classmethod
    def parse(cls, line: str, *more: str) -> "Server":
        """Read a command line."""
        words = [*line.split(), *more]
        asked = [int(words[place + 1]) for place, word in enumerate(words) if word in {"-w", "--workers"}]
        name = "-".join(
            [words[0], *(word.rpartition(".")[2] for word in words if "Worker" in word or word == "asgi")]
        )
        return cls(f"{name}-{asked[0]}", words, asked[0])

    def command(self, app: str, port: int, patience: int) -> list[str]:
        """Return the command, run by this interpreter."""
        module, _, *words = self.words
        own = {"8000": str(port), "127.0.0.1:8000": f"127.0.0.1:{port}", "20": str(patience)}
        found = [own.get(word, word) for word in words]
        return [sys.executable, "-W", "ignore::DeprecationWarning", "-m", module, app, *found]

    def __str__(self) -> str:
        """Return the name, for the test run."""
        return self.name


class Exchange(RawResponse):
    """A request that is being sent, and its response."""

    async def send(self, data: bytes) -> None:
        """Send a part of the request's body."""
        self._writer.write(data)
        await self._writer.drain()


@define
class Deployed:
    """A server that runs, and what its database shows."""

    process: asyncio.subprocess.Process
    address: Address
    judge: Judge
    log: Path

    async def until(
        self, statement: str, *, is_true: Callable[[object], bool] = bool, ended: bool = False
    ) -> None:
        """Ask the database again and again, until it answers so."""
        with self.explained(statement):
            async with asyncio.timeout(PATIENCE):
                while not is_true(await self.judge.scalar(statement)):
                    assert self.process.returncode is None or ended
                    await asyncio.sleep(0.01)  # the server needs the processor, too

    async def until_logged(self, text: str) -> None:
        """Wait until the server has said so."""
        with self.explained(text):
            async with asyncio.timeout(PATIENCE):
                while text not in self.log.read_text("utf-8", errors="replace"):  # noqa: ASYNC110  # a file
                    await asyncio.sleep(0.01)

    async def until_refused(self) -> None:
        """Connect again and again, until nothing listens."""
        with suppress(ConnectionRefusedError):
            async with asyncio.timeout(PATIENCE):
                while True:
                    with suppress(ConnectionResetError, EOFError):  # taken before the port was closed
                        await self.answer("GET", "/health/live")

    @contextmanager
    def explained(self, waited_for: str) -> Generator[None]:
        """Add to a failure what was waited for, and what the server said."""
        try:
            yield
        except (AssertionError, TimeoutError, EOFError) as error:
            error.add_note(f"waited for: {waited_for}\n{self.log.read_text(errors='replace')}")
            raise

    @asynccontextmanager
    async def request(self, method: str, path: str, *, length: int = 0) -> AsyncGenerator[Exchange]:
        """Send a request's head over a connection of its own, which is closed on exit."""
        reader, writer = await asyncio.open_connection(self.address.host, self.address.port)
        try:
            head = (
                f"{method} {path} HTTP/1.1",
                "Host: test",
                f"Content-Length: {length}",
                "Connection: close",
            )
            writer.write("\r\n".join((*head, "", "")).encode())
            await writer.drain()
            with self.explained(f"{method} {path}"):
                async with asyncio.timeout(PATIENCE):
                    yield Exchange(reader, writer)
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def answers(self) -> None:
        """Wait until the server takes connections."""
        while True:
            try:
                _, writer = await asyncio.open_connection(self.address.host, self.address.port)
            except ConnectionRefusedError:
                assert self.process.returncode is None, self.log.read_text(errors="replace")
                await asyncio.sleep(0.02)
            else:
                writer.close()
                with suppress(ConnectionError):
                    await writer.wait_closed()
                return

    async def answer(self, method: str, path: str) -> tuple[int, str]:
        """Return the status and the body of the answer to a request."""
        async with self.request(method, path) as exchange:
            status = await exchange.status()
            return status, (await exchange.rest()).decode()

    @asynccontextmanager
    async def idle(self) -> AsyncGenerator[Exchange]:
        """Open a connection and send nothing."""
        reader, writer = await asyncio.open_connection(self.address.host, self.address.port)
        try:
            yield Exchange(reader, writer)
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    def stop(self) -> None:
        """Send SIGTERM to the server's first process, as an orchestrator does."""
        self.process.send_signal(signal.SIGTERM)


@asynccontextmanager
async def deployed(
    server: Server, app: str, url: str, judge: Judge, log: Path, *, patience: int = 20
) -> AsyncGenerator[Deployed]:
    """Start a server with an application, and go on when it answers; end what is left of it on exit."""
    with socket.socket() as reserved:  # bound, so that nobody is given its port, and not listening
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        address = Address(*reserved.getsockname())
        with log.open("wb") as said:
            process = await asyncio.create_subprocess_exec(
                *server.command(app, address.port, patience),
                cwd=ROOT,
                env={**os.environ, "DATABASE_URL": url},
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        try:
            running = Deployed(process, address, judge, log)
            await running.answers()
            yield running
        finally:
            with suppress(ProcessLookupError):  # the group is gone where all have ended
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
