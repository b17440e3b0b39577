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

WAYS = ("exit", "unused exit", "collected", "killed", "multiprocessing")
DEADLINE = 20


async def ask() -> int:
    """Ask the database which connection this is."""
    mine = "pg_backend_pid()" if sys.argv[1].startswith("postgresql") else "CONNECTION_ID()"
    async with asyncio.timeout(DEADLINE), db(commit_on_exit=True) as unit:
        return int(await unit.session.scalar(text(f"SELECT {mine}")) or 0)


def in_child(pipe: int, way: str) -> None:
    """Tell the parent which connection the child has, and end."""
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
    db.bind(create_async_engine(sys.argv[1], pool_size=1, max_overflow=0))
    with asyncio.Runner() as runner:
        mine = runner.run(ask())
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
        again = runner.run(ask())
    assert mine == again != theirs, (mine, theirs, again)
    sys.stdout.write("as before\n")


if __name__ == "__main__":
    main(sys.argv[2])
