"""What a program leaves behind that is told to end: servers that run on, and what they stored."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil  # type: ignore[import-untyped]
from attrs import frozen


@frozen
class Place:
    """Where a program makes its temporary folders that runs with `environment`."""

    path: Path

    @property
    def environment(self) -> dict[str, str]:
        """What the program must be told."""
        return {"TMPDIR": str(self.path)}

    def servers(self) -> list[psutil.Process]:
        """Return the servers that run on data in here."""
        running = psutil.process_iter(["name", "cmdline"])
        servers = (process for process in running if process.info["name"] == "postgres")
        return [server for server in servers if str(self.path) in " ".join(server.info["cmdline"] or ())]

    def data(self) -> list[Path]:
        """Return the folders that servers store in, and those that they are in."""
        return [*self.path.glob("campaign-*"), *self.path.glob("postgresql-*")]


@contextmanager
def temporary_place() -> Generator[Place]:
    """Make a place; on exit end and remove what is left there.

    It is open to all, as pytest's own folders are not: root's servers run as another user.
    """
    with TemporaryDirectory(prefix="place-") as folder:
        Path(folder).chmod(0o755)
        place = Place(Path(folder))
        try:
            yield place
        finally:
            for server in place.servers():
                server.kill()
                server.wait()
