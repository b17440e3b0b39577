"""`python -m campaign`: runs it, prints the table, exits with 1 if something was found."""

import argparse
import asyncio
import json
import signal
import sys
from pathlib import Path
from types import FrameType

from campaign import report, server
from campaign.broken import BROKEN
from campaign.clients import DEADLINE
from campaign.promise import ROUTES
from campaign.run import Plan, Result, run
from campaign.sabotage import SABOTAGE
from tests.support.databases import find_mariadb

INTERRUPTED = 130
"""The exit status where the end came before the verdict."""


def measure(database: str, plan: Plan) -> Result:
    """Run the campaign against a kind of database."""
    if database == "postgresql":
        with server.own_postgresql() as own:
            return asyncio.run(run(own, plan))
    with server.databases(asyncio.run(find_mariadb())) as found:
        return asyncio.run(run(found, plan))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; `plan` is made of it, or an error said."""
    parser = argparse.ArgumentParser(
        prog="python -m campaign",
        description=__doc__,
        epilog="The faults end after --requests or --seconds, whichever is first, but not before each kind "
        f"of fault has come about; for that they are given {DEADLINE:g} seconds more.",
    )
    add, default = parser.add_argument, "default: %(default)s"
    add("--database", choices=("postgresql", "mariadb"), default="postgresql", help=default)
    add("--seed", type=int, default=1, help=f"of everything that is drawn ({default})")
    add("--requests", type=int, default=50_000, help=f"enough under faults, see below ({default})")
    add("--seconds", type=float, default=75.0, help=f"enough under faults, see below ({default})")
    add("--concurrency", type=int, default=16, help=f"clients at a time ({default})")
    memory = f"without faults, for the memory, which 0 leaves out ({default})"
    add("--memory-requests", type=int, default=12_000, help=memory)
    drivers = server.DRIVERS
    add("--driver", choices=[one for each in drivers.values() for one in each], help="of most routes")
    add("--pre-ping", action="store_true", help="let the pools ping what they hand out")
    routes = f"only these, of: {', '.join(ROUTES)}"
    add("--routes", nargs="+", metavar="ROUTE", choices=tuple(ROUTES), default=(), help=routes)
    add("--broken", choices=(*BROKEN, *SABOTAGE), default="", help="an application that is broken")
    add("--json", type=Path, help="write the numbers to a file as well")
    options = parser.parse_args(arguments)
    if options.driver is not None and options.driver not in drivers[options.database]:
        parser.error(f"the driver of {options.database} is one of {', '.join(drivers[options.database])}")
    try:
        options.plan = Plan(
            seed=options.seed,
            requests=options.requests,
            seconds=options.seconds,
            concurrency=options.concurrency,
            memory_requests=options.memory_requests,
            pre_ping=options.pre_ping,
            driver=options.driver or "",
            broken=options.broken,
            routes=tuple(options.routes),
        )
    except ValueError as error:
        parser.error(str(error))
    return options


def interrupt(_: int, __: FrameType | None) -> None:
    """Handle SIGTERM as Ctrl-C: an event loop that runs is left in order, and what was started is removed."""
    signal.raise_signal(signal.SIGINT)


def main() -> None:
    """Run the command line."""
    options = parse()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets ignore it what it runs with &
    signal.signal(signal.SIGTERM, interrupt)
    try:
        result = measure(options.database, options.plan)
    except KeyboardInterrupt:
        print("Interrupted before the verdict: nothing was found out.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    print(report.table(result))
    if options.json is not None:
        options.json.write_text(json.dumps(report.as_json(result), indent=2) + "\n")
    if result.findings:
        print(f"\nThe end of the application's log:\n{result.log}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
