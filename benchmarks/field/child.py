"""`python -m benchmarks.field.child NAME` plays the scenarios with what is installed, and prints JSON."""

import asyncio
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import version

from benchmarks.field.contenders import CONTENDERS, Contender
from benchmarks.field.ground import standing
from benchmarks.field.scenarios import ASYNCHRONOUS, SCENARIOS, Scenario
from tests.support.databases import fresh_database, postgresql_server

SHOWN = ("fastapi", "starlette", "sqlalchemy")
NONE = "not applicable"


async def play(contender: Contender, name: str, url: str) -> str:
    """Play one scenario on an empty database."""
    scenario: Scenario = SCENARIOS[name][1]
    if contender.synchronous and name in ASYNCHRONOUS:
        return NONE
    opened = contender.opened
    if name == "forgotten":
        if contender.unsettled is None:
            return "it always commits"
        opened = contender.unsettled
    async with asyncio.timeout(60), standing(opened(), url) as ground:
        return await scenario(ground)


def play_all(contender: Contender, database: Callable[[], AbstractContextManager[str]]) -> dict[str, str]:
    """Play all scenarios, each on a database of its own."""
    found: dict[str, str] = {}
    for name in SCENARIOS:
        with database() as url:
            found[name] = asyncio.run(play(contender, name, url))
    return found


def main() -> None:
    """Run the command line."""
    contender = CONTENDERS[sys.argv[1]]
    with postgresql_server() as server:
        found = play_all(contender, lambda: fresh_database(server))
    versions = {name: version(name) for name in {contender.distribution: None, **dict.fromkeys(SHOWN)}}
    versions["python"] = ".".join(str(part) for part in sys.version_info[:2])
    print("\n" + json.dumps({"versions": versions, "found": found}))


if __name__ == "__main__":
    main()
