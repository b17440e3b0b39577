"""Fixtures: a cluster of each kind, which is whole again when a test begins."""

import asyncio
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn, TypeVar

import pytest

from tests.support.databases import Judge
from tests.support.patroni import Cluster, patroni_cluster
from tests.support.programs import ProgramError, ProgramMissingError

HERE = Path(__file__).parent
Servers = TypeVar("Servers")
not_started: list[str] = []
"""Why servers had to be started again."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests here: they run where they are asked for."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.cluster)


@contextmanager
def started(start: Callable[[], AbstractContextManager[Servers]]) -> Generator[Servers]:
    """Start servers, once more if they do not start; skip or fail the test if they are not installed.

    Only a start is repeated: a test that has failed is never run again, for one lost write is a finding.
    """
    with ExitStack() as exits:
        try:
            servers = exits.enter_context(start())
        except ProgramMissingError as error:
            missing(error)
        except ProgramError as error:
            not_started.append(f"{error}")
            servers = exits.enter_context(start())
        yield servers


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print at the end of the run what did not start at once, also where CI collects such notes."""
    for error in not_started:
        terminalreporter.write_line(f"Servers were started again: {error}", yellow=True)
        if notes := os.environ.get("GITHUB_STEP_SUMMARY"):
            with Path(notes).open("a") as file:
                file.write(f"Servers were started again: {error}\n")


@pytest.fixture(scope="session")
def lasting_cluster() -> Iterator[Cluster]:
    """The PostgreSQL cluster of this run, which replicates synchronously."""
    with started(patroni_cluster) as cluster:
        yield cluster


@pytest.fixture
def cluster(lasting_cluster: Cluster) -> Cluster:
    """The PostgreSQL cluster, with all its members, and without what other tests wrote."""
    for member in lasting_cluster.members:
        if not member.patroni.runs:
            member.start()
    leader = lasting_cluster.healthy()
    asyncio.run(_empty(leader.url))
    return lasting_cluster


async def _empty(url: str) -> None:
    async with Judge(url) as judge:
        await judge.execute("DROP TABLE IF EXISTS note, reply")


def missing(error: ProgramMissingError) -> NoReturn:
    """Skip a test whose programs are not installed, or fail where they must be."""
    if os.environ.get("REQUIRE_CLUSTER"):
        pytest.fail(f"{error}")
    pytest.skip(f"{error}")
