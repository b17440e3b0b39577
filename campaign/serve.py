"""`python -m campaign.serve`: the application, served by uvicorn in a process of its own."""

import signal
import socket
import sys
from types import FrameType

import uvicorn

from campaign.app import Settings, build


def _do_nothing(_: int, __: FrameType | None) -> None:
    """Handle a signal."""


def main() -> None:
    """Read the settings, serve until SIGTERM, and say on which port."""
    app, _ = build(Settings.parse(sys.stdin.read()))
    # uvicorn raises the signal again when it has shut down; the exit status is to tell how that went
    signal.signal(signal.SIGTERM, _do_nothing)
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(
        app, http="h11", lifespan="on", log_config=None, access_log=False, timeout_graceful_shutdown=5
    )
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
