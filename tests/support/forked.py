"""Forks while its pair has a pooled connection: `python -m tests.support.forked URL WAY_TO_END`.

The child asks by the pair, too, and ends; the parent must have its own connection as before, and no other.
"""

import asyncio
import gc
import multiprocessing
import os
import sys

from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from fastapi_async_sqlalchemy import db

WAYS = ("exit", "unused exit", "collected", "killed", "multiprocessing", "bound later")
DEADLINE = 20
if __name__ == "__main__":
    ENGINE = create_async_engine(sys.argv[1], pool_size=1, max_overflow=0)
    MINE = text(
        "SELECT pg_backend_pid()" if sys.argv[1].startswith("postgresql") else "SELECT CONNECTION_ID()"
    )


async def ask() -> int:
    """Ask the database which connection this is."""
    async with asyncio.timeout(DEADLINE), db(commit_on_exit=True) as unit:
        return int(await unit.session.scalar(MINE) or 0)


async def ask_engine() -> int:
    """Ask by the engine alone, which nobody has bound."""
    async with asyncio.timeout(DEADLINE), ENGINE.connect() as connection:
        return int(await connection.scalar(MINE) or 0)


def in_child(pipe: int, way: str) -> None:
    """Tell the parent which connection the child has, and end."""
    if way == "bound later":  # as a server does that loads its application before it forks
        db.bind(ENGINE)
    if way != "unused exit":
        os.write(pipe, str(asyncio.run(ask())).encode())
    if way == "killed":
        os._exit(0)
    if way == "collected":
        db.unbind()
        gc.collect()
    if way != "multiprocessing":
        sys.exit(0)


def main(way: str) -> None:
    """Fork, and compare."""
    if way != "bound later":
        db.bind(ENGINE)
    with asyncio.Runner() as runner:
        mine = runner.run(ask_engine() if way == "bound later" else ask())
        reading, writing = os.pipe()
        if way == "multiprocessing":
            process = multiprocessing.get_context("fork").Process(target=in_child, args=(writing, way))
            process.start()
            process.join()
            code = process.exitcode
        else:
            child = os.fork()
            if not child:
                in_child(writing, way)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == 0, code
        os.close(writing)
        theirs = int(os.read(reading, 100) or 0)
        again = runner.run(ask_engine() if way == "bound later" else ask())
    assert mine == again != theirs, (mine, theirs, again)
    sys.stdout.write("as before\n")


if __name__ == "__main__":
    main(sys.argv[2])
