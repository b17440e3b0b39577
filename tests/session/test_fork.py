"""A process that forks while its pair has pooled connections: each has connections of its own."""

import asyncio
import sys
from pathlib import Path

import pytest

from tests.support.forked import WAYS

PROJECT = Path(__file__).parents[2]
DEADLINE = 60


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fixture", ["postgresql_url", "psycopg_url", "mariadb_url", "asyncmy_url"])
def test_child_leaves_its_parents_connections(request: pytest.FixtureRequest, fixture: str, way: str) -> None:
    """A child uses connections of its own, and the parent's work when it has ended, however it ends."""
    asyncio.run(_fork(request.getfixturevalue(fixture), way))


async def _fork(url: str, way: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.forked", url, way),
        cwd=PROJECT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(DEADLINE):
            output, errors = await process.communicate()
    except TimeoutError:
        process.kill()
        raise
    assert (process.returncode, output.decode()) == (0, "as before\n"), errors.decode()
