"""The names of prepared transactions."""

from __future__ import annotations

import re
from hashlib import sha256
from typing import TYPE_CHECKING, Final

from attrs import frozen

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncEngine

_NAME: Final = re.compile(r"uow_(\d+)_([0-9a-f]{32})_([0-9a-f]{8})_(\d+)(w?)")
_POSTGRESQL_PORT: Final = 5432
_MARIADB_PORT: Final = 3306
_WITH_PORT: Final = re.compile(r"[^/]*:\d+")


@frozen(order=True)
class Branch:
    """One database's part of an atomic transaction, as encoded in the name of its prepared transaction."""

    witness: bool
    begun: int
    """Seconds since 1970."""
    transaction: str
    group: str
    """The digest shared by the transaction's databases, and by no others: see ``group_of``."""
    place: int

    @classmethod
    def parse(cls, name: str) -> Branch | None:
        """Parse a name; return None for a transaction that is not from this package."""
        found = _NAME.fullmatch(name)
        return (
            None if found is None else cls(found[5] == "w", int(found[1]), found[2], found[3], int(found[4]))
        )

    def __str__(self) -> str:
        mark = "w" if self.witness else ""
        return f"uow_{self.begun}_{self.transaction}_{self.group}_{self.place}{mark}"


def group_of(engines: Iterable[AsyncEngine]) -> str:
    """Return a digest of the databases' addresses, since a server lists other groups' transactions, too."""
    addresses = sorted(address_of(engine.url) for engine in engines)
    return sha256("\n".join(addresses).encode()).hexdigest()[:8]


def address_of(url: URL) -> str:
    """Return a database's address, the same whether a default port is named or left out."""
    query = url.normalized_query
    default = _POSTGRESQL_PORT if url.get_backend_name() == "postgresql" else _MARIADB_PORT
    port = url.port or default
    hosts = [f"{url.host}:{port}"] if url.host else list[str]()
    hosts += [one if _WITH_PORT.fullmatch(one) else f"{one}:{port}" for one in query.get("host", ())]
    return repr((sorted(hosts), query.get("port"), url.database))
