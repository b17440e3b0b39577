"""The application's process: started, asked for its state, ended by SIGTERM."""

import asyncio
import json
import sys
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Self

from attrs import define

from campaign.app import Settings
from campaign.line import Line

ROOT = Path(__file__).parent.parent
DEADLINE = 20.0
"""Seconds in which the process must start, become idle, and end."""


@define(eq=False)
class Process:
    """`async with Process(settings) as process`: it serves from then on, and is ended on exit."""

    settings: Settings
    port: int = 0
    _child: asyncio.subprocess.Process | None = None
    _log: IO[bytes] | None = None

    async def __aenter__(self) -> Self:
        self._log = TemporaryFile()  # noqa: SIM115  # closed on exit
        self._child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "ignore", "-m", "campaign.serve"),
            cwd=ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=self._log,
        )
        stdin, stdout = self._child.stdin, self._child.stdout
        if stdin is not None:
            stdin.write(self.settings.text().encode())  # not an argument: it may hold a password
            stdin.close()
        try:
            async with asyncio.timeout(DEADLINE):
                await self._started(b"" if stdout is None else await stdout.readline())
        except BaseException:
            await self.end()
            raise
        return self

    async def _started(self, line: bytes) -> None:
        if not line:
            message = f"the application did not start: {self.log()[-2000:]}"
            raise RuntimeError(message)
        self.port = int(line)
        while not await self._answers():  # noqa: ASYNC110  # another process tells it in no other way
            await asyncio.sleep(0.02)

    async def __aexit__(self, *exc_info: object) -> None:
        await self.end()
        if self._log is not None:
            self._log.close()

    async def _answers(self) -> bool:
        try:
            await self.state()
        except OSError:
            return False
        return True

    async def state(self) -> dict[str, Any]:
        """Ask the process for its state."""
        async with asyncio.timeout(DEADLINE), Line(self.port) as line:
            return dict(json.loads((await line.ask("/state")).body))

    def signal(self) -> None:
        """Send SIGTERM."""
        if self._child is not None and self._child.returncode is None:
            self._child.terminate()

    async def end(self) -> int | None:
        """Send SIGTERM and wait for the end; returns the exit status, None if it had to be killed."""
        if self._child is None:
            return None
        self.signal()
        try:
            async with asyncio.timeout(DEADLINE):
                return await self._child.wait()
        except TimeoutError:
            self._child.kill()
            await self._child.wait()
            return None

    def log(self) -> str:
        """Return what the process has said."""
        if self._log is None:
            return ""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")
