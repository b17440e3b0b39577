"""Tables made and dropped, for demos, tests and the first page of a tutorial."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy.sql.schema import MetaData
from sqlalchemy.util import greenlet_spawn

from .._session.watched import connection_of
from ..exceptions import ConfigurationError
from .opening import open_scope

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Connection

    from .._unit.place import Handle
    from .._unit.unit import UnitOfWork


async def create_all(handle: Handle[Any], metadata: MetaData) -> None:
    """Create the tables that are not there yet, and commit."""
    _require(metadata)
    async with open_scope(handle, None, commit_on_exit=True) as unit:
        await _run(metadata.create_all, unit)


async def drop_all(handle: Handle[Any], metadata: MetaData) -> None:
    """Drop the tables that are there, and commit."""
    _require(metadata)
    async with open_scope(handle, None, commit_on_exit=True) as unit:
        await _run(metadata.drop_all, unit)


async def _run(change: Callable[[Connection], None], unit: UnitOfWork[Any]) -> None:
    await greenlet_spawn(change, await greenlet_spawn(connection_of, unit.session.sync_session))


def _require(metadata: object) -> None:
    if not isinstance(metadata, MetaData):
        wanted = "a MetaData such as Base.metadata"
        name = "metadata"
        raise ConfigurationError(name, wanted, metadata)
