"""A wire between a client and a server, which a test can cut: packets vanish, and nobody is told."""

import asyncio
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

from attrs import Factory, define

from tests.support.patroni import Address


@define(eq=False)
class Wire:
    """A port of this machine that passes on what it gets to a server, and back."""

    address: Address
    _server: Address
    _whole: asyncio.Event = Factory(asyncio.Event)
    _connections: set[asyncio.Task[None]] = Factory(set[asyncio.Task[None]])

    def cut(self) -> None:
        """Swallow all bytes from now on, of new connections, too; nothing is closed."""
        self._whole.clear()

    def mend(self) -> None:
        """Pass on what comes from now on; connections that were cut are reset, as TCP does after long."""
        for task in self._connections:
            task.cancel()
        self._whole.set()

    async def end(self) -> None:
        """Reset all connections."""
        self.mend()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._whole.wait()
            with suppress(OSError):
                await self._connect(reader, writer)
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            self._connections.discard(task)
            writer.close()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_connection(self._server.host, self._server.port)
        try:
            there = asyncio.create_task(self._pass_on(reader, ours))
            back = asyncio.create_task(self._pass_on(theirs, writer))
            try:
                await asyncio.wait({there, back}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                there.cancel()
                back.cancel()
        finally:
            ours.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                await self._whole.wait()
                writer.write(data)
                await writer.drain()
            await self._whole.wait()  # the end of a connection is not passed on either


@asynccontextmanager
async def wire_to(server: Address) -> AsyncGenerator[Wire]:
    """Lay a wire to a server; end its connections on exit."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        wire = Wire(Address(listener.getsockname()[1]), server)
        wire.mend()
        serving = await asyncio.start_server(wire.serve, sock=listener)
        try:
            yield wire
        finally:
            serving.close()
            await wire.end()
