"""A TCP proxy between a pool and its server that cuts, stalls and half-closes, also around COMMIT."""

import asyncio
import random
import socket
import struct
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Literal, Self

from attrs import Factory, define, frozen

from campaign.wire import Wire

CommitFault = Literal["cut before COMMIT", "cut after COMMIT", "stall after COMMIT"]
Side = Literal["client", "server"]

_CHUNK = 65536
_TURN = 0.05
"""Seconds after which a proxy that ends looks for links that have been made meanwhile."""
_AT_ONCE = struct.pack("ii", 1, 0)
"""SO_LINGER with no time to linger: the other end sees a reset."""


@frozen
class Upstream:
    """Where the server listens: a socket in the file system, or a TCP address."""

    path: str | None = None
    host: str = "127.0.0.1"
    port: int = 0

    async def connect(self) -> "Stream":
        """Open a connection."""
        if self.path is not None:
            return Stream(*await asyncio.open_unix_connection(self.path))
        return Stream(*await asyncio.open_connection(self.host, self.port))


@frozen
class Stream:
    """Both directions of a connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        """Pass bytes on."""
        self.writer.write(data)
        await self.writer.drain()

    def reset(self) -> None:
        """End the connection at once, by a reset where there is such a thing."""
        sock: socket.socket | None = self.writer.get_extra_info("socket")
        if sock is not None and sock.family == socket.AF_INET:
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
        self.writer.transport.abort()

    async def close(self) -> None:
        """End the connection when what was written has gone out."""
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()


@define(eq=False)
class Link:
    """One connection through the proxy."""

    client: Stream
    server: Stream
    wire: Wire
    next_fault: Callable[[], CommitFault | None]
    """Take the fault that the COMMIT at hand meets, if any."""
    stall_seconds: float
    _flowing: asyncio.Event = Factory(asyncio.Event)
    _withheld: bytearray | None = None
    _fault: CommitFault | None = None

    async def run(self) -> None:
        """Pass on what comes, until one side ends."""
        self._flowing.set()
        pumps = [asyncio.create_task(self._forward()), asyncio.create_task(self._back())]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            await asyncio.gather(self.server.close(), self.client.close())

    def cut(self) -> None:
        """End both connections at once; nothing that is under way arrives."""
        self.client.reset()
        self.server.reset()

    def stall(self) -> None:
        """Hold everything for a bounded time, or until it is released."""
        self._flowing.clear()
        asyncio.get_running_loop().call_later(self.stall_seconds, self.release)

    def release(self) -> None:
        """End a stall."""
        self._flowing.set()

    def half_close(self, side: Side) -> None:
        """Tell one side that nothing more will come; what it sends is still passed on."""
        writer = self.client.writer if side == "client" else self.server.writer
        if not writer.is_closing():
            with suppress(OSError):
                writer.write_eof()

    async def _forward(self) -> None:
        with suppress(OSError):
            while data := await self.client.reader.read(_CHUNK):
                await self._flowing.wait()
                for message in self.wire.split(data):
                    if self.wire.is_commit(message) and (fault := self.next_fault()) is not None:
                        if fault == "cut before COMMIT":
                            self.cut()
                            return
                        self._fault, self._withheld = fault, bytearray()
                    await self.server.send(message)

    async def _back(self) -> None:
        with suppress(OSError):
            while data := await self.server.reader.read(_CHUNK):
                await self._flowing.wait()
                if self._withheld is None:
                    await self.client.send(data)
                    continue
                self._withheld += data
                if self.wire.is_answer(bytes(self._withheld)):
                    withheld, self._withheld = bytes(self._withheld), None
                    if self._fault == "cut after COMMIT":
                        self.cut()
                        return
                    self.stall()
                    await self._flowing.wait()
                    await self.client.send(withheld)


@define(eq=False)
class Proxy:
    """Listens on a free port of the loopback; `async with Proxy(...) as proxy`."""

    upstream: Upstream
    make_wire: Callable[[], Wire]
    stall_seconds: float = 0.3
    port: int = 0
    met: Counter[str] = Factory(Counter[str])
    """The faults that a COMMIT has met, by kind."""
    links: list[Link] = Factory(list[Link])
    """The connections that are open."""
    _armed: deque[CommitFault] = Factory(deque["CommitFault"])
    _listener: asyncio.Server | None = None
    _serving: set[asyncio.Task[None]] = Factory(set["asyncio.Task[None]"])

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._listener is not None:
            self._listener.close()
        await asyncio.sleep(0)  # what has just been accepted begins to be served
        while self._serving:
            for link in self.links:
                link.release()
                link.cut()
            await asyncio.wait(self._serving, timeout=_TURN, return_when=asyncio.FIRST_COMPLETED)

    def arm(self, fault: CommitFault) -> None:
        """Let the next COMMIT that comes meet a fault."""
        self._armed.append(fault)

    def disarm(self) -> None:
        """Let no COMMIT meet a fault any more, and end all stalls."""
        self._armed.clear()
        for link in self.links:
            link.release()

    def choose(self, rng: random.Random) -> Link | None:
        """Return a random connection, None if there is none."""
        return rng.choice(self.links) if self.links else None

    def _next_fault(self) -> CommitFault | None:
        if not self._armed:
            return None
        fault = self._armed.popleft()
        self.met[fault] += 1
        return fault

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)
        client = Stream(reader, writer)
        try:
            server = await self.upstream.connect()
        except OSError:  # the server is down
            client.reset()
            return
        link = Link(client, server, self.make_wire(), self._next_fault, self.stall_seconds)
        self.links.append(link)
        try:
            await link.run()
        finally:
            self.links.remove(link)
