"""The life of units of work against the model in `life.py` and `life_elsewhere.py`.

`MODEL_EXAMPLES=3000 pytest tests/unit/test_unit_model.py` hunts longer.
"""

import asyncio
import os
from collections.abc import Callable, Generator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from importlib.metadata import version
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from sqlalchemy import select

from tests.support.databases import Judge
from tests.support.tables import engine_with_tables
from tests.support.worker import open_worker
from tests.unit.life import TAKEN, Stage, Turn
from tests.unit.life_elsewhere import LifeElsewhere

RECORDED = pytest.mark.filterwarnings("ignore:record_property is incompatible:pytest.PytestWarning")
"""pytest writes properties of a test into every report, and warns of them if its schema is the strict one."""


@contextmanager
def open_stage(url: str, other_url: str, caplog: pytest.LogCaptureFixture) -> Generator[Stage]:
    """Open a worker and another engine; the examples run in two loops in turn, and in none of its own."""
    is_postgresql = url.startswith("postgresql")
    urls = (
        [url] if is_postgresql else [url, other_url]
    )  # PostgreSQL's other engine is one to the same database
    exits = AsyncExitStack()

    async def judge_for(url: str) -> Judge:
        return await exits.enter_async_context(Judge(url))

    with ExitStack() as runners:
        home = runners.enter_context(asyncio.Runner())
        worker = home.run(exits.enter_async_context(open_worker(url, judge_for)))
        other = home.run(exits.enter_async_context(engine_with_tables(other_url)))
        turns = [
            Turn(runners.enter_context(asyncio.Runner()), [Judge(one) for one in urls]) for _ in range(2)
        ]
        stage = Stage(worker, other, turns, caplog, is_postgresql)

        async def use_both() -> None:
            async with worker.db() as unit:
                for engine in (worker.engine, other):
                    await unit.session.execute(select(1), bind_arguments={"bind": engine.sync_engine})

        home.run(use_both())  # the package knows an engine that a session has come to
        try:
            for turn in turns:
                for judge in turn.judges:
                    turn.runner.run(judge.__aenter__())
            stage.runner.run(stage.execute(f"INSERT INTO note (text) VALUES ('{TAKEN}')"))
            yield stage
        finally:
            home.run(use_both())  # what the other loops have opened is closed there
            for turn in turns:
                for judge in turn.judges:
                    turn.runner.run(judge.__aexit__())
            home.run(exits.aclose())


@pytest.fixture
def other_url(request: pytest.FixtureRequest, server: str) -> str:
    """The database of the other engine: on PostgreSQL the same, by another driver."""
    url: str = request.getfixturevalue(f"{server}_url")
    if server == "postgresql":
        return url.replace("+asyncpg", "+psycopg")
    return url.replace("+psycopg", "+asyncpg") if server == "psycopg" else f"{url}.other"


@pytest.mark.slow
@RECORDED
@pytest.mark.skipif(
    version("sqlalchemy").startswith("2.0"),
    reason="the model knows what SQLAlchemy 2.1 says after a failed flush in a savepoint; 2.0 differs",
)
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("server", "examples"), [("sqlite", 60), ("postgresql", 20), ("psycopg", 10)])
def test_unit_does_as_the_model(
    server: str,
    examples: int,
    *,
    other_url: str,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
    record_property: Callable[[str, object], None],
) -> None:
    """Whatever is done to units, the rows, errors, hooks and connections that come of it are the model's."""
    bounds = settings(
        max_examples=int(os.environ.get("MODEL_EXAMPLES", examples)),
        stateful_step_count=30,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],  # a database takes the time it takes
    )
    with open_stage(request.getfixturevalue(f"{server}_url"), other_url, caplog) as stage:
        run_state_machine_as_test(cast("Any", lambda: LifeElsewhere(stage)), settings=bounds)
    record_property("examples", stage.examples)
