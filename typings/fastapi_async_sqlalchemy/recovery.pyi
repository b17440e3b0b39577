from collections.abc import Sequence

from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["Resolved", "main", "recover"]

class Resolved:
    def __init__(self, name: str, database: str, committed: bool) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def database(self) -> str: ...
    @property
    def committed(self) -> bool: ...

async def recover(
    first: AsyncEngine,
    second: AsyncEngine,
    /,
    *engines: AsyncEngine,
    older_than: float = 600.0,
    dry_run: bool = False,
    group: str | None = None,
) -> list[Resolved]: ...
def main(arguments: Sequence[str] | None = None) -> None: ...
