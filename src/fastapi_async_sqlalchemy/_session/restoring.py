"""Loaded values across a rollback: unchanged ones stay readable, changed ones return to their old state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from sqlalchemy.orm import LoaderCallableStatus
from sqlalchemy.orm.attributes import instance_state, set_committed_value
from sqlalchemy.orm.collections import collection_adapter
from sqlalchemy.util import EMPTY_DICT

from .plain import deleted_of, dirty_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, MutableMapping

    from sqlalchemy.orm import InstanceState, Session

    from .state import StatefulSession


def note_unflushed(session: StatefulSession, _flush_context: object, _objects: object) -> None:
    """Remember the objects that a flush is about to write; a listener of ``before_flush``.

    A flush itself changes some of their attributes: versions, and what has an ``onupdate``.
    """
    if session.identity_map.check_modified() or deleted_of(session):  # the set of dirty objects is slow
        originals = session._fastapi_async_sqlalchemy.writing().originals
        for one in (*dirty_of(session), *deleted_of(session)):
            _note(originals, instance_state(one))


def note_flushed(session: StatefulSession, flush_context: Any) -> None:
    """Remember what a flush has reached by relationships; a listener of ``after_flush``."""
    reached: dict[InstanceState[Any], tuple[bool, bool]] = flush_context.states
    if not (session.identity_map.check_modified() or any(deleted for deleted, _ in reached.values())):
        return
    originals = session._fastapi_async_sqlalchemy.writing().originals
    for one in dirty_of(session):
        state: InstanceState[Any] = instance_state(one)
        _add(originals.setdefault(state, {}), state.committed_state)
    for state, (deleted, _) in reached.items():
        if deleted:
            _note(originals, state)


def note_loaded(session: StatefulSession, statement: Any, options: Mapping[str, Any] = EMPTY_DICT) -> None:
    """Remember what an UPDATE or DELETE of an entity may change in memory; nothing if it shall not."""
    entity = None if statement.is_insert else statement.entity_description.get("entity")
    options = {**statement.get_execution_options(), **(options or EMPTY_DICT)}
    if entity is None or options.get("synchronize_session") is False:
        return
    originals = session._fastapi_async_sqlalchemy.writing().originals
    for one in session.identity_map.values():
        if isinstance(one, entity):
            _note(originals, instance_state(one))


def roll_back(session: Session) -> None:
    """Roll back, and keep the values loaded before the transaction changed them.

    Called inside SQLAlchemy's greenlet. SQLAlchemy's own ``rollback()`` expires everything, and under asyncio
    an expired attribute cannot be loaded by reading it.
    """
    originals = cast("StatefulSession", session)._fastapi_async_sqlalchemy.ledger.originals
    states: list[InstanceState[Any]] = [instance_state(one) for one in session.identity_map.values()]
    loaded = [(state.obj(), state, _loaded(state, originals.get(state, {}))) for state in states]
    known = set(states)
    loaded += [(state.obj(), state, before) for state, before in originals.items() if state not in known]
    try:
        session.rollback()
    finally:
        restored = [entry for entry in loaded if entry[0] is not None and entry[1].persistent]
        for one, state, values in restored:
            for key, value in _columns(state, values):
                set_committed_value(one, key, value)
        for one, state, values in restored:  # a collection may read its members' columns
            for key, value in _relationships(state, values):
                set_committed_value(one, key, value)


def _note(originals: MutableMapping[InstanceState[Any], dict[str, Any]], state: InstanceState[Any]) -> None:
    _add(originals.setdefault(state, {}), {**state.dict, **state.committed_state})


def _add(before: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        before.setdefault(key, value)


def _loaded(state: InstanceState[Any], before: dict[str, Any]) -> dict[str, Any]:
    return {**state.dict, **state.committed_state, **before}


def _columns(state: InstanceState[Any], values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Choose the columns that were loaded; others stay expired."""
    columns = state.mapper.column_attrs
    for key, value in values.items():
        if key in columns and not isinstance(value, LoaderCallableStatus):
            yield key, value


def _relationships(state: InstanceState[Any], values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Choose the relationships that still hold after the rollback."""
    relationships = state.mapper.relationships
    for key, value in values.items():
        if key not in relationships or isinstance(value, LoaderCallableStatus):
            continue
        found = relationships[key]
        if found.lazy in {"dynamic", "write_only"}:
            continue  # they load nothing
        related = _related(value, uselist=bool(found.uselist))
        if all(instance_state(one).persistent for one in related):
            yield key, related if found.uselist else value


def _related(value: Any, *, uselist: bool) -> list[Any]:
    if not uselist:
        return [] if value is None else [value]
    adapter = collection_adapter(value) if hasattr(value, "_sa_adapter") else None
    return list(value if adapter is None else adapter)
