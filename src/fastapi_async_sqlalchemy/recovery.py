"""Finish transactions that a crash interrupted: ``python -m fastapi_async_sqlalchemy.recovery URL URL``.

A transaction that ``atomic()`` has prepared holds its locks until it is committed or rolled back, even
over restarts of the server. Of each block, one is the witness, which is prepared last and committed last.
If the witness is found, all were prepared, and the rest is committed. If not, nothing was committed, and
all are rolled back.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import re
from typing import TYPE_CHECKING

from attrs import frozen

from ._arguments.checks import boolean, positive
from ._arguments.engines import async_engine, create_engine, place_of
from ._cluster.branch import Branch, address_of, group_of
from ._cluster.prepared import finish_prepared, prepared
from ._telemetry.logs import fields
from .exceptions import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

logger = logging.getLogger("fastapi_async_sqlalchemy")

_GROUP = re.compile(r"[0-9a-f]{8}")
_LEFT_ALONE = (
    "%s on %s belongs to other databases, and is left alone: recover it with the URLs that its application "
    "uses, or, where these are its databases and have moved, all of them, by group=%r (--group)."
)

__all__ = ["Resolved", "main", "recover"]


@frozen
class Resolved:
    """The outcome of one prepared transaction of a database."""

    name: str
    database: str
    committed: bool
    """False if it was rolled back."""


async def recover(
    *engines: AsyncEngine, older_than: float = 600.0, dry_run: bool = False, group: str | None = None
) -> list[Resolved]:
    """Commit or roll back the prepared transactions that ``atomic()`` has left on these databases.

    ``engines`` must be all databases of those transactions. A transaction younger than ``older_than`` seconds
    by its server's clock is left alone, since it may be under way. ``dry_run`` only reports. Run it again
    after an error, or several times at once: it never decides one transaction in two ways.

    Sets of databases are distinguished by host, port and database of their URLs. Transactions of other sets
    are left alone, with a WARNING that names them. If databases have moved, ``group`` is the name of the set
    from that WARNING.
    """
    resolved, _ = await _resolve(engines, older_than, group, dry_run=dry_run)
    return resolved


async def _resolve(
    engines: Sequence[AsyncEngine], older_than: float, group: str | None, *, dry_run: bool
) -> tuple[list[Resolved], int]:
    """Implement ``recover()``; return also how many transactions of other sets were left alone."""
    boolean("dry_run", dry_run)
    addresses = {address_of(async_engine("engines", engine).url) for engine in engines}
    if len(addresses) < max(2, len(engines)):
        message = "engines must be all databases of the transactions, each once: give two or more."
        raise ConfigurationError(message)
    oldest, group = positive("older_than", older_than), _group(group, engines)
    start = asyncio.get_running_loop().time()
    found: dict[Branch, AsyncEngine] = {}
    young: set[str] = set()
    for engine in engines:
        for branch, age in (await prepared(engine, start)).items():
            found.setdefault(branch, engine)  # MariaDB lists those of the whole server
            if age < oldest:
                young.add(branch.transaction)
    found = {branch: engine for branch, engine in found.items() if branch.transaction not in young}
    ours = sorted(branch for branch in found if branch.group == group)  # the witnesses last
    for branch in found.keys() - ours:
        place = place_of(found[branch].url)
        logger.warning(_LEFT_ALONE, branch, place, branch.group, extra=fields(str(place)))
    complete = {branch.transaction for branch in ours if branch.witness}
    resolved: list[Resolved] = []
    for branch in ours:
        engine, committed = found[branch], branch.transaction in complete
        if dry_run or await finish_prepared(engine, branch, committed=committed):
            resolved.append(Resolved(str(branch), str(place_of(engine.url)), committed))
    return resolved, len(found) - len(ours)


def _group(value: object, engines: Sequence[AsyncEngine]) -> str:
    if value is None:
        return group_of(engines)
    if not isinstance(value, str) or _GROUP.fullmatch(value) is None:
        wanted = "the eight letters and digits of a warning of recover()"
        msg = "group"
        raise ConfigurationError(msg, wanted, value)
    return value


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fastapi_async_sqlalchemy.recovery",
        description="Commit or roll back what atomic() has left prepared after a crash.",
    )
    parser.add_argument(
        "url", nargs="+", help="each database of the transactions; env:NAME reads a URL from the environment"
    )
    parser.add_argument(
        "--older-than", type=float, default=600.0, metavar="SECONDS", help="what is younger may be under way"
    )
    parser.add_argument("--dry-run", action="store_true", help="tell what would be done")
    parser.add_argument("--group", help="the name of the set of databases, where they have moved since")
    options = parser.parse_args(arguments)
    try:
        urls = [os.environ[url[4:]] if url.startswith("env:") else url for url in options.url]
        resolved, left = asyncio.run(_run(urls, options.older_than, options.group, dry_run=options.dry_run))
    except KeyError as error:
        parser.error(f"the environment has no {error}")
    except ConfigurationError as error:
        parser.error(str(error))
    except Exception as error:
        if not hasattr(error, "__notes__"):
            raise
        said = str(error).partition("\n")[0]
        parser.exit(1, f"{error.__notes__[0]}: {type(error).__name__}: {said}\n")
    for one in resolved:
        print(f"{'commit' if one.committed else 'roll back'} {one.name} on {one.database}")  # noqa: T201
    if left:
        parser.exit(1)


async def _run(
    urls: Sequence[str], older_than: float, group: str | None, *, dry_run: bool
) -> tuple[list[Resolved], int]:
    engines = [create_engine("url", url, None) for url in urls]
    try:
        return await _resolve(engines, older_than, group, dry_run=dry_run)
    finally:
        for engine in engines:
            await engine.dispose()


if __name__ == "__main__":
    main()
