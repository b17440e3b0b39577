"""The clients of I, a process of its own: keep-alive connections, told what to do by stdin."""

import asyncio
import sys
from time import perf_counter

CONNECTIONS = 10


async def client(host: str, port: int, path: str, times: int) -> None:
    """Send requests one after the other over one connection."""
    reader, writer = await asyncio.open_connection(host, port)
    message = f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    for _ in range(times):
        writer.write(message)
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(2)
        if not head.startswith(b"HTTP/1.1 200") or body != b"ok":
            sys.exit(f"{path} answered {head!r} {body!r}")
    writer.close()
    await writer.wait_closed()


async def load(host: str, port: int, path: str, times: int) -> float:
    """Return the seconds of so many requests over ten connections, less by a remainder."""
    start = perf_counter()
    await asyncio.gather(*(client(host, port, path, times // CONNECTIONS) for _ in range(CONNECTIONS)))
    return perf_counter() - start


def main() -> None:
    """Serve commands until stdin ends."""
    for line in sys.stdin:
        host, port, path, times = line.split()
        print(asyncio.run(load(host, int(port), path, int(times))), flush=True)


if __name__ == "__main__":
    main()
