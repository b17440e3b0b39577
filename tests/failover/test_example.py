"""The example of a cluster: one program runs, its leader is killed, and it leaves nothing behind."""

import asyncio
import os
import re
import signal
import sys
from pathlib import Path

import psutil  # type: ignore[import-untyped]
from httpx2 import AsyncClient

from examples.cluster.kill import PID_FILE
from tests.failover.conftest import missing
from tests.support.leftovers import Place, temporary_place
from tests.support.patroni import require_programs
from tests.support.programs import ProgramMissingError

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 120
NOTHING_RUNS = b"no cluster runs: start one by `make cluster`.\n"
RUNS_ALREADY = b"a cluster runs already: end it by Ctrl-C first.\n"


async def run(module: str, place: Place) -> tuple[int | None, bytes]:
    """Run a program of the example until it ends; return its status and what it says on stderr."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "ignore", "-m", module),
        cwd=ROOT,
        env={**os.environ, **place.environment},
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate()
    return process.returncode, said


async def test_program_ends_what_it_started() -> None:
    """It serves, refuses a second one, kills the leader when told to, and ends all its servers by SIGTERM."""
    try:
        require_programs()
    except ProgramMissingError as error:
        missing(error)
    with temporary_place() as place:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "ignore", "-m", "examples.cluster", "--haproxy"),
            cwd=ROOT,
            env={**os.environ, **place.environment},
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout
        async with asyncio.timeout(PATIENCE):
            said = await process.stdout.readuntil(b"leader running")
            url = re.search(rb"(http://\S+)/docs", said)
            assert url
            async with AsyncClient(base_url=url[1].decode(), timeout=30) as client:
                assert (await client.put("/notes/mine", json={"text": "tea"})).status_code == 201
                assert (await client.get("/servers")).json().keys() == {"primary", "replica"}
            assert await run("examples.cluster", place) == (1, RUNS_ALREADY)
            assert await run("examples.cluster.kill", place) == (0, b"")
            await process.stdout.readuntil(b"killing db")
            process.send_signal(signal.SIGTERM)
            rest, _ = await process.communicate()
        assert process.returncode == 0
        assert re.search(rb"acknowledged [1-9]\d*, .*; lost: ", rest), rest
        left = [
            one for one in psutil.process_iter(["cmdline"]) if str(place.path) in str(one.info["cmdline"])
        ]
        assert left == []
        assert place.data() == []


async def test_nothing_to_kill() -> None:
    """The command that kills the leader says so where no cluster runs."""
    with temporary_place() as place:
        assert await run("examples.cluster.kill", place) == (1, NOTHING_RUNS)


async def test_stale_file_harms_nobody() -> None:
    """A process that has the id of a program that ended gets no signal."""
    with temporary_place() as place:
        stranger = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "input()", stdin=asyncio.subprocess.PIPE
        )
        (place.path / PID_FILE.name).write_text(f"{stranger.pid}")
        assert await run("examples.cluster.kill", place) == (1, NOTHING_RUNS)
        await stranger.communicate(b"\n")
        assert stranger.returncode == 0
