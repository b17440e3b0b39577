"""I: requests per second over uvicorn on the loopback, its clients in a second process."""

import asyncio
import socket
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from functools import partial
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from benchmarks.contenders import BARE
from benchmarks.load import CONNECTIONS
from benchmarks.measuring import Plan, Row, in_turn, plain, ratio
from benchmarks.sites import Stand

ROUNDS = 9
_HOST = "127.0.0.1"
Load = Callable[[int, str, int], Awaitable[float]]


async def over_uvicorn(stand: Stand, plan: Plan) -> list[Row]:
    """I: requests per second as they are, bare without a session; the more the better."""
    kinds = (("/untouched", "untouched", 600), ("/selected", "one SELECT on PostgreSQL", 300))
    rows: list[Row] = []
    async with _clients() as load, AsyncExitStack() as servers:
        ports = {
            name: await servers.enter_async_context(_serve(site.app)) for name, site in stand.sites.items()
        }
        for path, kind, usual in kinds:
            times = max(CONNECTIONS, plan.times(usual))
            samples = await in_turn(
                {
                    name: partial(load, port, "/untouched" if name == BARE else path, times)
                    for name, port in ports.items()
                },
                min(ROUNDS, plan.rounds),
            )
            what = f"requests over uvicorn, {kind}"
            rows += [
                Row(key="I", what=what, unit=unit, framework=stand.framework, figures=figures)
                for unit, figures in (("a second", plain(samples)), ("ratio, more is better", ratio(samples)))
            ]
    return rows


@asynccontextmanager
async def _serve(app: ASGIApp) -> AsyncGenerator[int]:
    """Serve in the running loop and yield the port.

    The loop opens the socket itself: only then does asyncio send without Nagle's delay.
    """
    with closing(socket.create_server((_HOST, 0))) as free:
        port: int = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host=_HOST, port=port, http="h11", log_config=None))
    serving = asyncio.ensure_future(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
        assert not serving.done()
    try:
        yield port
    finally:
        server.should_exit = True
        await serving


@asynccontextmanager
async def _clients() -> AsyncGenerator[Load]:
    """Start the second process and yield what sends a command to it; it ends with its stdin."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.load"),
        cwd=Path(__file__).parent.parent,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None
    assert stdout is not None

    async def load(port: int, path: str, times: int) -> float:
        stdin.write(f"{_HOST} {port} {path} {times}\n".encode())
        return times // CONNECTIONS * CONNECTIONS / float(await stdout.readline())

    try:
        yield load
    finally:
        stdin.close()
        await process.wait()
