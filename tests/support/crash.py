"""Dies in the middle of atomic transactions: `python -m tests.support.crash URL URL`.

One process for each step of the two-phase commit on each database; each writes a note of its own. The
names of the transactions are printed, as MariaDB lists them.
"""

import asyncio
import os
import sys
from collections.abc import Sequence

from sqlalchemy import Connection, event, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from fastapi_async_sqlalchemy import SessionProxy, atomic, create_middleware_and_session_proxy

STEPS = ("prepare_twophase", "commit_twophase")
DIED = 7
"""The exit status of a process that has died where it should."""


def die(*_: object) -> None:
    """End the process as a crash does: nothing is closed, nothing is sent."""
    os._exit(DIED)


def tell(_: Connection, name: str) -> None:
    """Print the name of a transaction that is about to be prepared."""
    os.write(1, f"{name}\n".encode())


async def write(urls: Sequence[str], place: int, step: str) -> None:
    """Write the note `place-step` to all, and die before that step."""
    proxies = list[SessionProxy[AsyncSession]]()
    for at, url in enumerate(urls):
        engine = create_async_engine(url)
        event.listen(engine.sync_engine, "prepare_twophase", tell)
        if at == place:
            event.listen(engine.sync_engine, step, die)
        _, db = create_middleware_and_session_proxy(AsyncSession)
        db.bind(engine)
        proxies.append(db)
    async with atomic(*proxies):
        for db in proxies:
            await db.session.execute(
                text("INSERT INTO note (text) VALUES (:text)"), {"text": f"{place}-{step}"}
            )


def main(urls: Sequence[str]) -> None:
    """Let a process die at each step."""
    for step in STEPS:
        for place in range(len(urls)):
            child = os.fork()
            if not child:
                asyncio.run(write(urls, place, step))
                os._exit(0)
            _, status = os.waitpid(child, 0)
            if os.waitstatus_to_exitcode(status) != DIED:
                sys.exit(f"{step} of {place} did not come")


if __name__ == "__main__":
    main(sys.argv[1:])
