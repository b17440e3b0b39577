"""Ways to drive an application: in process, through a real server, and over a bare socket."""

import asyncio
import re
import socket
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import uvicorn
from attrs import frozen
from httpx2 import ASGITransport, AsyncClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send


@asynccontextmanager
async def run_lifespan(app: ASGIApp) -> AsyncGenerator[dict[str, Any]]:
    """Run the application's startup and, on exit, its shutdown, both in one task; yield the lifespan state.

    An error of the application's own startup or shutdown is raised as it is.
    """
    state: dict[str, Any] = {}
    asked: asyncio.Queue[Message] = asyncio.Queue()
    answered: asyncio.Queue[Message] = asyncio.Queue()
    scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": state}

    async def protocol() -> None:
        try:
            await app(scope, asked.get, answered.put)
        finally:
            answered.put_nowait({"type": "returned"})

    async def ask(phase: str) -> None:
        asked.put_nowait({"type": f"lifespan.{phase}"})
        answer = await answered.get()
        if answer["type"] != f"lifespan.{phase}.complete":
            await task
            message = f"the application answered lifespan.{phase} with {answer}"
            raise RuntimeError(message)

    task = asyncio.create_task(protocol(), name="lifespan")
    await ask("startup")
    try:
        yield state
    finally:
        await ask("shutdown")
        await task


@asynccontextmanager
async def asgi_client(app: ASGIApp, *, raise_app_exceptions: bool = True) -> AsyncGenerator[AsyncClient]:
    """Run the application's lifespan around a client that calls it in process.

    The request runs in the caller's own task and context, and the response is there when the application has
    returned: the transport buffers it. For streams, disconnects and background work use `serve`.
    """
    async with run_lifespan(app) as state:

        async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
            await app({**scope, "state": state.copy()}, receive, send)

        transport = ASGITransport(with_state, raise_app_exceptions=raise_app_exceptions)
        async with AsyncClient(transport=transport, base_url="http://testserver") as client:
            yield client


@frozen
class Address:
    """Where a server listens."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """The server's address for HTTP clients."""
        return f"http://{self.host}:{self.port}"


class _Server(uvicorn.Server):
    """A server that tells when it has started, leaves the signals to pytest, and fails without `sys.exit`."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except SystemExit:
            message = "the application failed to start; its log record tells why"
            raise RuntimeError(message) from None
        self.ready.set()


@asynccontextmanager
async def serve(app: ASGIApp, *, patience: int = 30) -> AsyncGenerator[Address]:
    """Serve the application by uvicorn in the running loop, on a free port of 127.0.0.1, lifespan and all.

    On exit it lets what is under way finish, for so many seconds.
    """
    config = uvicorn.Config(
        app,
        http="h11",
        ws="websockets-sansio",
        lifespan="on",
        log_config=None,
        timeout_graceful_shutdown=patience,
    )
    server = _Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(server.serve(sockets=[listener]), name="uvicorn")
        ready = asyncio.create_task(server.ready.wait())
        await asyncio.wait({serving, ready}, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        try:
            if not serving.done():
                yield Address(*listener.getsockname())
        finally:
            server.should_exit = True
            await serving


class RawResponse:
    """A response read off a bare socket, whose connection the test can cut at any moment."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def status(self) -> int:
        """Wait for the head of the response and return its status; call it once, first."""
        head = await self.until(b"\r\n\r\n")
        found = re.match(rb"HTTP/1\.1 (\d{3}) ", head)
        assert found, head
        return int(found[1])

    async def until(self, mark: bytes) -> bytes:
        """Wait for these bytes and return all that came up to them, or raise IncompleteReadError."""
        return await self._reader.readuntil(mark)

    async def rest(self) -> bytes:
        """Return all that comes until the server closes the connection."""
        return await self._reader.read()

    def cut(self) -> None:
        """Cut the connection at once."""
        self._writer.transport.abort()


@asynccontextmanager
async def raw_get(address: Address, path: str) -> AsyncGenerator[RawResponse]:
    """Send a GET over a connection of its own, closed on exit; chunks keep their framing."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {address.host}\r\nConnection: close\r\n\r\n".encode())
        await writer.drain()
        yield RawResponse(reader, writer)
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
