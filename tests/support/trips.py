"""A proxy on loopback that counts round trips to a database, and may lengthen them."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

from attrs import Factory, define
from sqlalchemy import URL, make_url

_PORTS: Final = {"postgresql": 5432, "mysql": 3306}
_CHUNK: Final = 1 << 16


@define(eq=False)
class Trips:
    """What has passed a proxy: a round trip is all that a client sends before it waits for an answer."""

    server: URL
    delay: float
    """Seconds that every message takes, each way."""
    url: str = ""
    """The database's, through the proxy."""
    count: int = 0
    """Round trips since the last ``taken()``."""
    serving: set[asyncio.Task[None]] = Factory(set["asyncio.Task[None]"])

    def taken(self) -> int:
        """Return the count, and begin anew."""
        count, self.count = self.count, 0
        return count

    async def ended(self) -> None:
        """Wait until nobody is connected."""
        if self.serving:
            await asyncio.wait(self.serving)

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one client."""
        self.serving.add(asyncio.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await _connect(self.server)
        waits = False

        async def ask() -> None:
            nonlocal waits
            while sent := await reader.read(_CHUNK):
                self.count += not waits
                waits = True
                self._after_delay(to_server.write, sent)

        def answered(sent: bytes) -> None:
            nonlocal waits
            waits = False
            writer.write(sent)

        async def answer() -> None:
            while sent := await from_server.read(_CHUNK):
                self._after_delay(answered, sent)

        both = [asyncio.create_task(ask()), asyncio.create_task(answer())]
        try:
            with suppress(ConnectionError):  # one side is gone, and the other follows
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in both:
                task.cancel()
            writer.close()
            to_server.close()

    def _after_delay(self, write: Callable[[bytes], None], sent: bytes) -> None:
        """Write now or later; what was sent earlier does not hold up what follows."""
        if self.delay:
            asyncio.get_running_loop().call_later(self.delay, write, sent)
        else:
            write(sent)


async def _connect(server: URL) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to a server on its TCP port, or on PostgreSQL's socket."""
    port = server.port or _PORTS[server.get_backend_name()]
    folder = server.query.get("host")
    if isinstance(folder, str):
        return await asyncio.open_unix_connection(Path(folder, f".s.PGSQL.{port}"))
    return await asyncio.open_connection(server.host, port)


@asynccontextmanager
async def counting(url: str | URL, *, delay: float = 0.0) -> AsyncGenerator[Trips]:
    """Yield the count of round trips through a proxy in front of a server."""
    server = make_url(url)
    trips = Trips(server, delay)
    listening = await asyncio.start_server(trips.accept, "127.0.0.1", 0)
    port: int = listening.sockets[0].getsockname()[1]
    query = {key: value for key, value in server.query.items() if key != "host"}
    through = server.set(host="127.0.0.1", port=port, query=query)
    trips.url = through.render_as_string(hide_password=False)
    try:
        yield trips
    finally:
        listening.close()
        for task in trips.serving:
            task.cancel()
        await trips.ended()
