"""Connections to the first of several servers that accepts one, although others may be silent."""

from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import asyncpg  # type: ignore[import-untyped]  # pyright: ignore[reportMissingTypeStubs]  # it has no types

driver: Any = asyncpg
Connection = TypeVar("Connection")


async def first_success(attempts: Iterable[Callable[[], Awaitable[Connection]]]) -> Connection:
    """Return the connection of the first attempt that succeeds, or raise the error of the last one."""
    failure: Exception = OSError("there are no hosts")
    for attempt in attempts:
        try:
            return await attempt()
        except Exception as error:  # noqa: BLE001  # whatever one host lacks, the next may have
            failure = error
    raise failure


async def connect_to_first(
    host: str | list[str], port: int | list[int], target_session_attrs: str = "any", **arguments: Any
) -> Any:
    """Connect to one host at a time, because the `timeout` of `asyncpg.connect()` covers all its hosts."""
    hosts = [host] if isinstance(host, str) else host
    ports = [port] if isinstance(port, int) else port
    wanted = ["standby", "any"] if target_session_attrs == "prefer-standby" else [target_session_attrs]
    return await first_success(
        partial(driver.connect, host=one, port=at, target_session_attrs=kind, **arguments)
        for kind in wanted
        for one, at in zip(hosts, ports, strict=True)
    )
