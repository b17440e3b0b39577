"""The example of a cluster: the program starts, its leader is killed, and it leaves nothing behind."""

import asyncio
import os
import re
import signal
import sys
from pathlib import Path

import psutil  # type: ignore[import-untyped]
from httpx2 import AsyncClient

from tests.failover.conftest import missing
from tests.support.leftovers import temporary_place
from tests.support.patroni import require_programs
from tests.support.programs import ProgramMissingError

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 120


async def test_program_ends_what_it_started() -> None:
    """It serves, says who leads, kills the leader when told to, and ends all of its servers by SIGTERM."""
    try:
        require_programs()
    except ProgramMissingError as error:
        missing(error)
    with temporary_place() as place:
        environment = {**os.environ, **place.environment}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "ignore", "-m", "examples.cluster", "--haproxy"),
            cwd=ROOT,
            env=environment,
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
            kill = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "examples.cluster.kill", cwd=ROOT, env=environment
            )
            assert await kill.wait() == 0
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
        kill = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "examples.cluster.kill"),
            cwd=ROOT,
            env={**os.environ, **place.environment},
            stderr=asyncio.subprocess.PIPE,
        )
        _, said = await kill.communicate()
        assert (kill.returncode, said) == (1, b"no cluster runs: start one by `make cluster`.\n")
