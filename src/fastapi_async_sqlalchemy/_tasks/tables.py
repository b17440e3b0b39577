"""Tables made and dropped, for demos, tests and the first page of a tutorial."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy.sql.schema import MetaData

from ..exceptions import ConfigurationError
from .opening import open_scope

if TYPE_CHECKING:
    from .._unit.place import Handle


async def create_all(handle: Handle[Any], metadata: MetaData) -> None:
    """Create the tables that are not there yet, and commit."""
    _require(metadata)
    async with open_scope(handle, None, commit_on_exit=True) as unit:
        connection = await unit.session.connection()
        await connection.run_sync(metadata.create_all)


async def drop_all(handle: Handle[Any], metadata: MetaData) -> None:
    """Drop the tables that are there, and commit."""
    _require(metadata)
    async with open_scope(handle, None, commit_on_exit=True) as unit:
        connection = await unit.session.connection()
        await connection.run_sync(metadata.drop_all)


def _require(metadata: object) -> None:
    if not isinstance(metadata, MetaData):
        wanted = "a MetaData such as Base.metadata"
        name = "metadata"
        raise ConfigurationError(name, wanted, metadata)
