"""Loaded values across a rollback: unchanged ones stay readable, changed ones return to their old state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import inspect
from sqlalchemy.orm import LoaderCallableStatus
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.orm.collections import collection_adapter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.orm import InstanceState, Mapper, Session

    from .state import StatefulSession


def note_flushed(session: StatefulSession, _flush_context: object) -> None:
    """Record the values that a flush has overwritten; a listener of ``after_flush``."""
    if not (session.dirty or session.deleted):
        return
    originals = session._fastapi_async_sqlalchemy.writing().originals
    for one in session.dirty:
        state: InstanceState[Any] = inspect(one)
        _add(originals.setdefault(state, {}), state.committed_state)
    for one in session.deleted:
        state = inspect(one)
        _add(originals.setdefault(state, {}), {**state.dict, **state.committed_state})


def note_loaded(session: StatefulSession, statement: Any) -> None:
    """Record the values that an UPDATE or DELETE of an entity may change in memory."""
    entity = statement.entity_description.get("entity")
    if entity is None:
        return
    originals = session._fastapi_async_sqlalchemy.writing().originals
    for one in session.identity_map.values():
        if isinstance(one, entity):
            state: InstanceState[Any] = inspect(one)
            _add(originals.setdefault(state, {}), {**state.dict, **state.committed_state})


def roll_back(session: Session) -> None:
    """Roll back, and keep the values loaded before the transaction changed them; for ``run_sync()``.

    SQLAlchemy's own ``rollback()`` expires everything, and under asyncio an expired attribute cannot be
    loaded by reading it.
    """
    originals = cast("StatefulSession", session)._fastapi_async_sqlalchemy.ledger.originals
    states: list[InstanceState[Any]] = [inspect(one) for one in session.identity_map.values()]
    loaded = [(state.obj(), state, _loaded(state, originals.get(state, {}))) for state in states]
    known = set(states)
    loaded += [(state.obj(), state, before) for state, before in originals.items() if state not in known]
    session.rollback()
    for one, state, values in loaded:
        if one is not None and state.persistent:
            for key, value in _restorable(state, values):
                set_committed_value(one, key, value)


def _add(before: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        before.setdefault(key, value)


def _loaded(state: InstanceState[Any], before: dict[str, Any]) -> dict[str, Any]:
    return {**state.dict, **state.committed_state, **before}


def _restorable(state: InstanceState[Any], values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the values that hold after the rollback; others stay expired."""
    mapper: Mapper[Any] = state.mapper
    for key, value in values.items():
        if isinstance(value, LoaderCallableStatus):
            continue  # it was not loaded when it was changed
        if key in mapper.column_attrs:
            yield key, value
        elif key in mapper.relationships:
            related = _related(value, uselist=bool(mapper.relationships[key].uselist))
            if all(inspect(one).persistent for one in related):
                yield key, related if mapper.relationships[key].uselist else value


def _related(value: Any, *, uselist: bool) -> list[Any]:
    if not uselist:
        return [] if value is None else [value]
    adapter = collection_adapter(value) if hasattr(value, "_sa_adapter") else None
    return list(value if adapter is None else adapter)
