"""OpenTelemetry: a span for each unit of work, and metrics of its pool, as the SDK's exporters get them."""

import asyncio
from collections.abc import Iterator
from importlib import import_module
from types import FunctionType
from typing import Any

import pytest
from attrs import define
from fastapi import FastAPI
from opentelemetry.instrumentation.asyncpg import (  # pyright: ignore[reportMissingTypeStubs]  # it has none
    AsyncPGInstrumentor,
)
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader, NumberDataPoint
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.metrics import (  # pyright: ignore[reportMissingTypeStubs]  # it has none
    db_metrics,
)
from opentelemetry.trace import StatusCode
from sqlalchemy import Connection, event, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_async_sqlalchemy import (
    ConfigurationError,
    ObservedUnit,
    Observer,
    PoolTimeoutError,
    create_middleware_and_session_proxy,
)
from fastapi_async_sqlalchemy.opentelemetry import OpenTelemetryObserver
from tests.support.databases import JudgeFor
from tests.support.observing import open_observed
from tests.support.serving import asgi_client
from tests.support.site import MakeSite
from tests.support.tables import ORPHAN, Note, Reply
from tests.support.versions import survives_cancellation

OURS = "fastapi_async_sqlalchemy"
POOL_NAME = "db.client.connection.pool.name"
CONVENTIONAL = {
    db_metrics.DB_CLIENT_CONNECTION_COUNT,
    db_metrics.DB_CLIENT_CONNECTION_IDLE_MAX,
    db_metrics.DB_CLIENT_CONNECTION_MAX,
    db_metrics.DB_CLIENT_CONNECTION_PENDING_REQUESTS,
    db_metrics.DB_CLIENT_CONNECTION_TIMEOUTS,
    db_metrics.DB_CLIENT_CONNECTION_USE_TIME,
    db_metrics.DB_CLIENT_CONNECTION_WAIT_TIME,
}


@define(eq=False)
class Telemetry:
    """An SDK of the test's own, and an observer that uses it."""

    exporter: InMemorySpanExporter
    reader: InMemoryMetricReader
    tracing: TracerProvider
    observer: OpenTelemetryObserver

    def spans(self) -> list[ReadableSpan]:
        """Return the spans that have ended, in the order in which they began."""
        return sorted(self.exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

    def span(self, name: str) -> ReadableSpan:
        """Return the one span of this name."""
        [span] = [span for span in self.spans() if span.name == name]
        return span

    def points(self, name: str) -> list[NumberDataPoint | HistogramDataPoint]:
        """Return the data points of a metric."""
        return [point for found, points in self.metrics().items() if found == name for point in points]

    def metrics(self) -> dict[str, list[Any]]:
        """Return the data points of all metrics."""
        data = self.reader.get_metrics_data()
        if data is None:
            return {}
        return {
            metric.name: list(metric.data.data_points)
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    def values(self, name: str) -> list[tuple[dict[str, Any], Any]]:
        """Return a metric's values, or a histogram's counts, with the attributes but the pool's name."""
        return [
            (
                {key: value for key, value in (point.attributes or {}).items() if key != POOL_NAME},
                point.count if isinstance(point, HistogramDataPoint) else point.value,
            )
            for point in self.points(name)
        ]


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    """An SDK with exporters in memory, which is not the process's."""
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracing, metering = TracerProvider(), MeterProvider([reader])
    tracing.add_span_processor(SimpleSpanProcessor(exporter))
    observer = OpenTelemetryObserver(tracer_provider=tracing, meter_provider=metering)
    yield Telemetry(exporter, reader, tracing, observer)
    metering.shutdown()
    tracing.shutdown()


def parent_of(span: ReadableSpan) -> int | None:
    """Return the number of a span's parent."""
    return None if span.parent is None else span.parent.span_id


def number_of(span: ReadableSpan) -> int:
    """Return the number of a span."""
    assert span.context is not None
    number: int = span.context.span_id
    return number


async def test_spans_of_a_unit(database_url: str, judge_for: JudgeFor, telemetry: Telemetry) -> None:
    """A unit's span is inside the current one, holds its wait and its COMMIT, and says what it did."""
    async with open_observed(database_url, judge_for, telemetry.observer) as site:
        with telemetry.tracing.get_tracer("test").start_as_current_span("around"):
            async with site.db(commit_on_exit=True) as unit:
                unit.on_commit(lambda: None)
                await unit.session.execute(insert(Note).values(text="a"))
    around, unit_span, wait, commit = telemetry.spans()
    assert [unit_span.name, wait.name, commit.name] == ["unit of work", "wait for a connection", "COMMIT"]
    assert parent_of(unit_span) == number_of(around)
    assert parent_of(wait) == parent_of(commit) == number_of(unit_span)
    attributes = dict(unit_span.attributes or {})
    assert attributes["db.system.name"] == site.engine.dialect.name
    assert str(attributes["db.namespace"]) in database_url
    assert attributes[f"{OURS}.outcome"] == "committed"
    assert attributes[f"{OURS}.statements"] == attributes[f"{OURS}.rows"] == 1
    assert [one.name for one in unit_span.events] == ["transaction ended", "hooks ran"]
    for inner in (wait, commit):
        assert (unit_span.start_time or 0) <= (inner.start_time or 0) <= (inner.end_time or 0)
        assert (inner.end_time or 0) <= (unit_span.end_time or 0)
    assert unit_span.status.status_code is StatusCode.UNSET


async def test_no_span_of_an_untouched_request(
    sqlite_url: str, make_site: MakeSite, telemetry: Telemetry
) -> None:
    """A request that asks for no session has no unit's span."""
    site = await make_site(sqlite_url, observers=[telemetry.observer])
    site.app.get("/")(lambda: None)
    await site.get()
    assert telemetry.spans() == []


async def test_failed_commit(deferring_url: str, judge_for: JudgeFor, telemetry: Telemetry) -> None:
    """A COMMIT that fails is an error of its span and of the unit's."""

    async def work() -> None:
        async with site.db(commit_on_exit=True) as unit:
            unit.session.add(Reply(**ORPHAN))

    async with open_observed(deferring_url, judge_for, telemetry.observer) as site:
        with pytest.raises(DBAPIError):
            await work()
        for name in ("COMMIT", "unit of work"):
            span = telemetry.span(name)
            assert span.status.status_code is StatusCode.ERROR
            assert (span.attributes or {})["error.type"] == "IntegrityError"
        assert telemetry.values(f"{OURS}.transactions") == [({f"{OURS}.outcome": "rolled back"}, 1)]
        assert telemetry.values(f"{OURS}.commit_time") == [({"error.type": "IntegrityError"}, 1)]


@survives_cancellation
async def test_unknown_outcome(postgresql_url: str, judge_for: JudgeFor, telemetry: Telemetry) -> None:
    """A COMMIT whose answer never comes is an error of an unknown kind."""

    async def work() -> None:
        async with site.db(commit_on_exit=True) as unit:
            await unit.session.execute(insert(Note).values(text="a"))

    async with open_observed(postgresql_url, judge_for, telemetry.observer) as site:
        task = asyncio.create_task(work())

        def cancel(_: Connection) -> None:
            task.cancel()

        event.listen(site.engine.sync_engine, "commit", cancel, once=True)
        await asyncio.wait([task])
        assert (telemetry.span("COMMIT").attributes or {})["error.type"] == "unknown"
        assert telemetry.values(f"{OURS}.transactions") == [({f"{OURS}.outcome": "unknown"}, 1)]


async def test_metrics_follow_the_conventions(
    database_url: str, judge_for: JudgeFor, telemetry: Telemetry
) -> None:
    """The names are those of the semantic conventions, and each data point has its pool's plain name."""
    async with open_observed(
        database_url, judge_for, telemetry.observer, pool_size=3, max_overflow=4
    ) as site:
        async with site.db() as unit:
            await unit.session.scalar(select(Note.text))
            states = {
                attributes["db.client.connection.state"]: value
                for attributes, value in telemetry.values("db.client.connection.count")
            }
            assert states["used"] == 1
            assert telemetry.values("db.client.connection.max") == [({}, 7)]
            assert telemetry.values("db.client.connection.idle.max") == [({}, 3)]
            assert telemetry.values("db.client.connection.pending_requests") == [({}, 0)]
            assert telemetry.values("db.client.connection.wait_time") == [({}, 1)]
            assert telemetry.values("db.client.connection.use_time") == []
        assert telemetry.values("db.client.connection.use_time") == [({}, 1)]
        assert telemetry.values(f"{OURS}.transactions") == [({f"{OURS}.outcome": "only read"}, 1)]
        found = telemetry.metrics()
        names = {point.attributes[POOL_NAME] for points in found.values() for point in points}
        assert names == {site.engine.url.database}
    assert telemetry.points("db.client.connection.count") == []


class Waits(Observer):
    """Says when a wait has begun."""

    def __init__(self) -> None:
        self.began = asyncio.Event()

    def wait_began(self, unit: ObservedUnit) -> None:
        """Say so."""
        self.began.set()


async def test_wait_that_times_out(sqlite_url: str, judge_for: JudgeFor, telemetry: Telemetry) -> None:
    """A wait counts while it lasts; one that times out is a timeout, and an error of its span."""
    tight = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 30}
    waits = Waits()
    async with open_observed(sqlite_url, judge_for, telemetry.observer, waits, **tight) as site:

        async def wait(seconds: float | None) -> None:
            async with site.db(pool_timeout=seconds) as unit:
                await unit.session.scalar(select(Note.text))

        async with site.engine.connect():
            with pytest.raises(PoolTimeoutError):
                await wait(0.05)
            waits.began.clear()
            waiting = asyncio.create_task(wait(None))
            await waits.began.wait()
            assert telemetry.values("db.client.connection.pending_requests") == [({}, 1)]
        await waiting
        assert telemetry.values("db.client.connection.pending_requests") == [({}, 0)]
        assert telemetry.values("db.client.connection.timeouts") == [({}, 1)]
        assert telemetry.values("db.client.connection.wait_time") == [({}, 1)]
    failed = [span for span in telemetry.spans() if span.status.status_code is StatusCode.ERROR]
    assert [span.name for span in failed] == ["unit of work", "wait for a connection"]
    assert (failed[1].end_time or 0) - (failed[1].start_time or 0) >= 0.05e9


@pytest.fixture
def statements(telemetry: Telemetry) -> Iterator[None]:
    """Have asyncpg's statements traced, by OpenTelemetry's own instrumentation."""
    instrumentor = AsyncPGInstrumentor()  # type: ignore[no-untyped-call]  # it has no types
    instrumentor.instrument(tracer_provider=telemetry.tracing)
    yield
    instrumentor.uninstrument()


@pytest.mark.usefixtures("statements")
async def test_beside_other_instrumentations(postgresql_url: str, telemetry: Telemetry) -> None:
    """FastAPI's span is around the units of two databases; asyncpg's statements are in the same trace."""
    shop, audit = (
        create_middleware_and_session_proxy(AsyncSession, observers=[telemetry.observer]) for _ in range(2)
    )
    app = FastAPI()

    @app.get("/orders/{number}")
    async def route(number: int) -> int:
        await audit[1].session.scalar(text("SELECT 2"))
        found: int = await shop[1].session.scalar(text("SELECT 1"))
        return found

    for middleware, _ in (shop, audit):
        app.add_middleware(middleware, db_url=postgresql_url, commit_on_exit=True)
    FastAPIInstrumentor.instrument_app(app, tracer_provider=telemetry.tracing)
    async with asgi_client(app) as client:
        telemetry.exporter.clear()
        assert (await client.get("/orders/1")).json() == 1
    spans = telemetry.spans()
    server = next(span for span in spans if parent_of(span) is None)
    assert server.name == "GET /orders/{number}"
    units = [span for span in spans if span.name == "unit of work"]
    assert [parent_of(span) for span in units] == [number_of(server)] * 2
    assert {span.context.trace_id for span in spans if span.context} == {
        server.context.trace_id if server.context else 0
    }
    theirs = [span for span in spans if (span.attributes or {}).get("db.statement") == "SELECT 1"]
    prepared: Any = import_module("asyncpg.prepared_stmt").PreparedStatement
    # early instrumentations see no prepared statements, and SQLAlchemy sends no others
    assert len(theirs) == (type(prepared.fetch) is not FunctionType)
    assert [span.name for span in spans].count("COMMIT") >= 2


async def test_given_pool_name(sqlite_url: str, judge_for: JudgeFor, telemetry: Telemetry) -> None:
    """The caller may name the pools; what is no function is refused."""
    reader = InMemoryMetricReader()
    named = OpenTelemetryObserver(
        pool_name=lambda pool: f"my {pool.system}", meter_provider=MeterProvider([reader])
    )
    telemetry.reader = reader
    async with open_observed(sqlite_url, judge_for, named):
        [point] = telemetry.points("db.client.connection.max")
        assert (point.attributes or {})[POOL_NAME] == "my sqlite"
    with pytest.raises(ConfigurationError, match="pool_name must be a function from an ObservedPool"):
        OpenTelemetryObserver(pool_name="mine")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # that is the mistake


async def test_without_an_sdk(sqlite_url: str, judge_for: JudgeFor) -> None:
    """Where the process has no SDK, nothing is recorded and nothing fails."""
    async with open_observed(sqlite_url, judge_for, OpenTelemetryObserver()) as site:
        async with site.db(commit_on_exit=True) as unit:
            unit.session.add(Note(text="a"))
        assert await site.notes() == ["a"]


async def test_every_metric_is_conventional_or_ours(
    sqlite_url: str, judge_for: JudgeFor, telemetry: Telemetry
) -> None:
    """Nothing is emitted under a name that OpenTelemetry does not know, but what has our own prefix."""
    tight = {"pool_size": 1, "max_overflow": 0}
    async with open_observed(sqlite_url, judge_for, telemetry.observer, **tight) as site:
        async with site.db(commit_on_exit=True) as unit:
            unit.session.add(Note(text="a"))
        async with site.engine.connect(), site.db(pool_timeout=0.01) as unit:
            with pytest.raises(PoolTimeoutError):
                await unit.session.scalar(text("SELECT 1"))
        found = set(telemetry.metrics())
    assert {name for name in found if not name.startswith(OURS)} == CONVENTIONAL
    assert found - CONVENTIONAL == {f"{OURS}.transactions", f"{OURS}.commit_time"}
