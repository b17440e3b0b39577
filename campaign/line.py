"""One HTTP connection of a client, which can be cut at any point of a request."""

import asyncio
import re
from typing import Self

from attrs import Factory, define, frozen


@frozen
class Head:
    """The start of a response."""

    status: int
    headers: dict[str, str]

    def names(self, header: str) -> frozenset[str]:
        """Return a header that lists names."""
        return frozenset(name for name in self.headers.get(header, "").split(",") if name)


@frozen
class Response:
    """A whole response."""

    head: Head
    body: bytes


@define(eq=False)
class Line:
    """`async with Line(port) as line`; the connection is opened when it is needed, and kept."""

    port: int
    _reader: asyncio.StreamReader = Factory(asyncio.StreamReader)
    _writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.cut()

    async def send(self, path: str, *, half: bool = False) -> None:
        """Send a request, or its first half."""
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self.port)
        request = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n".encode()
        self._writer.write(request[: len(request) // 2] if half else request)
        await self._writer.drain()

    async def head(self) -> Head:
        """Wait for the start of the response."""
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        found = re.match(r"HTTP/1\.1 (\d{3})", lines[0])
        if found is None:
            raise ConnectionError(lines[0])
        pairs = (line.partition(": ") for line in lines[1:] if line)
        return Head(int(found[1]), {name.lower(): value for name, _, value in pairs})

    async def body(self, head: Head) -> bytes:
        """Read the rest of the response; it raises if the response is cut short."""
        if "content-length" in head.headers:
            return await self._reader.readexactly(int(head.headers["content-length"]))
        parts = list[bytes]()
        while part := await self.chunk():
            parts.append(part)
        return b"".join(parts)

    async def chunk(self) -> bytes:
        """Read the next part of a response that comes in parts; the last one is empty."""
        size = int((await self._reader.readuntil(b"\r\n")).strip(), 16)
        return (await self._reader.readexactly(size + 2))[:-2]

    async def ask(self, path: str) -> Response:
        """Send a request and return the whole response."""
        await self.send(path)
        head = await self.head()
        body = await self.body(head)
        if head.headers.get("connection") == "close":
            self.cut()
        return Response(head, body)

    def cut(self) -> None:
        """Cut the connection; the next request opens another."""
        if self._writer is not None:
            self._writer.transport.abort()
            self._writer = None
