"""Arguments come first: they are checked before an engine is looked for, and an empty mapping is none."""

from collections.abc import Callable
from typing import Any, cast

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_async_sqlalchemy import (
    ConfigurationError,
    SessionProxy,
    atomic,
    create_middleware_and_session_proxy,
)
from tests.support.site import Site

Db = SessionProxy[AsyncSession]
WRONG: Any = "wrong"
SOME: Any = {"autoflush": False}
CALLS: dict[str, Callable[[Db], object]] = {
    "db(session_args)": lambda db: db(WRONG),
    "db(bind)": lambda db: db(cast("Any", {"bind": 1})),
    "db(propagation)": lambda db: db(SOME, propagation=WRONG),
    "db(isolation_level, propagation)": lambda db: db(isolation_level="SERIALIZABLE", propagation=WRONG),
    "db(pool_timeout)": lambda db: db(SOME, pool_timeout=-1),
    "db(multi_sessions)": lambda db: db(read_only=True, multi_sessions=WRONG),
    "db(max_concurrent)": lambda db: db(SOME, max_concurrent=2),
    "db(multi_sessions, propagation)": lambda db: db(SOME, multi_sessions=True, propagation="required"),
    "db(wait_for)": lambda db: db(wait_for=WRONG),
    "db(wait_for, timeout)": lambda db: db(wait_for=cast("Any", "0/1"), timeout=-1),
    "db(wait_for, fallback)": lambda db: db(wait_for=cast("Any", "0/1"), fallback=WRONG),
    "db(wait_for, propagation)": lambda db: db(SOME, wait_for=cast("Any", "0/1"), propagation="required"),
    "db(timeout)": lambda db: db(timeout=1.0),
    "connection(timeout)": lambda db: db.connection(timeout=-1),
    "gather(session_args)": lambda db: cast("Any", db).gather(session_args=WRONG),
    "task_group(session_args)": lambda db: db.task_group(session_args=WRONG),
    "atomic(one)": cast("Any", atomic),
    "atomic(twice)": lambda db: atomic(db, db),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_arguments_before_the_engine(call: Callable[[Db], object]) -> None:
    """A wrong argument is told although there is no engine."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    with pytest.raises(ConfigurationError, match=r"."):
        call(db)


@pytest.mark.parametrize("propagation", ["required", "nested", "mandatory"])
async def test_empty_mapping(sqlite_worker: Site, propagation: Any) -> None:
    """A block with empty `session_args` joins as one without."""
    async with sqlite_worker.db() as unit, sqlite_worker.db({}, propagation=propagation) as joined:
        assert joined is unit
