"""Fixtures: a cluster of each kind, which is whole again when a test begins."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.databases import Judge
from tests.support.patroni import Cluster, patroni_cluster
from tests.support.programs import ProgramMissingError

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests here: they run where they are asked for."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def lasting_cluster() -> Iterator[Cluster]:
    """The PostgreSQL cluster of this run, which replicates synchronously."""
    try:
        with patroni_cluster() as cluster:
            yield cluster
    except ProgramMissingError as error:
        missing(error)


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


def missing(error: ProgramMissingError) -> None:
    """Skip a test whose programs are not installed, or fail where they must be."""
    if os.environ.get("REQUIRE_CLUSTER"):
        pytest.fail(f"{error}")
    pytest.skip(f"{error}")
