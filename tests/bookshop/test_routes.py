"""The routes of the bookshop, in a sandbox: what clients are told, and what is kept."""

import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from uuid import uuid4

import pytest
import stamina
from attrs import define
from httpx2 import AsyncClient
from sqlalchemy import URL

pytest.importorskip("alembic", reason="requirements/guides.in is not in the lowest row")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import text

from examples.bookshop.app import create_app
from examples.bookshop.databases import replica, reporting, shop
from examples.bookshop.settings import Settings
from fastapi_async_sqlalchemy.testing import Sandbox, SandboxedApp
from tests.support.bookshop import ISBN, OTHER, fill, migrated, order, stock_of
from tests.support.serving import asgi_client


@define
class Visit:
    """A client of the shop, its sandbox, and how often the workers were woken."""

    client: AsyncClient
    box: Sandbox
    woken: int = 0
    queue_works: bool = True

    async def wake(self) -> None:
        """Count, or fail as a Redis that is down."""
        if not self.queue_works:
            message = "Redis is down"
            raise ConnectionError(message)
        self.woken += 1


@pytest.fixture(scope="module")
def settings(postgresql_server: URL, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """The settings of a shop that is there."""
    with migrated(postgresql_server, tmp_path_factory.mktemp("mail")) as settings:
        yield settings


@asynccontextmanager
async def visiting(
    settings: Settings, tracer_provider: TracerProvider | None = None
) -> AsyncGenerator[Visit]:
    """Open the shop in a sandbox, with three copies of each title."""
    visits: list[Visit] = []

    async def wake() -> None:
        await visits[0].wake()

    app = SandboxedApp(
        create_app(settings, wake=wake, tracer_provider=tracer_provider), shop, replica, reporting
    )
    async with asgi_client(app) as client:
        await fill(3)
        visits.append(Visit(client, app.box))
        yield visits[0]


@pytest.fixture
async def visit(settings: Settings) -> AsyncIterator[Visit]:
    """A visit to the shop."""
    async with visiting(settings) as visit:
        yield visit


async def test_order_is_placed(visit: Visit) -> None:
    """An order takes the copies, wakes the workers after COMMIT, and can be read by its position."""
    before = visit.box.commits
    placed = await order(visit.client, {ISBN: 2, OTHER: 1})
    assert placed.status_code == 201
    assert placed.json()["lines"] == [
        {"isbn": ISBN, "quantity": 2, "cents": 799},
        {"isbn": OTHER, "quantity": 1, "cents": 899},
    ]
    assert (visit.woken, visit.box.commits - before) == (1, 1)
    assert [await stock_of(visit.client, isbn) for isbn in (ISBN, OTHER)] == [1, 2]
    found = await visit.client.get(
        f"/orders/{placed.json()['id']}", headers={"X-Position": placed.headers["X-Position"]}
    )
    assert found.json() == placed.json()


async def test_order_costs_few_statements(visit: Visit) -> None:
    """Fifty titles would cost what two do: nothing is loaded row by row."""
    visit.box.statements.clear()
    await order(visit.client, {ISBN: 1, OTHER: 1})
    visit.box.assert_statements(at_most=8)


async def test_order_that_is_sent_twice(visit: Visit) -> None:
    """A key places one order, and answers it again; another order by the same key is refused."""
    key = uuid4()
    first, second = [await order(visit.client, {ISBN: 1}, key=key) for _ in range(2)]
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json() == second.json()
    assert await stock_of(visit.client, ISBN) == 2
    assert (await order(visit.client, {ISBN: 2}, key=key)).status_code == 422
    other = await order(visit.client, {ISBN: 1}, key=key, customer="bob@example.com")
    assert other.json()["id"] != first.json()["id"]


async def test_order_that_is_refused(visit: Visit) -> None:
    """Too many copies are a 409, no such title is a 404, and the other lines of the order take nothing."""
    sold_out = await order(visit.client, {ISBN: 1, OTHER: 4})
    assert (sold_out.status_code, sold_out.json()["detail"]) == (
        409,
        f"3 copies of {OTHER} are left, and 4 were ordered",
    )
    unknown = await order(visit.client, {ISBN: 1, type(ISBN)("9" * 13): 1})
    assert unknown.status_code == 404
    assert await stock_of(visit.client, ISBN) == 3
    assert (await order(visit.client, {ISBN: 0})).status_code == 422
    assert visit.woken == 0


async def test_constraint_has_a_sentence(visit: Visit) -> None:
    """A second book of the same ISBN breaks its primary key at COMMIT; the client reads why."""
    book = {"isbn": "9780000000000", "title": "Emma", "cents": 699, "stock": 1}
    assert (await visit.client.post("/books", json=book)).status_code == 201
    again = await visit.client.post("/books", json=book)
    assert (again.status_code, again.json()["detail"]) == (409, "There is a book with this ISBN already.")


async def test_commit_that_fails(visit: Visit) -> None:
    """A refused COMMIT is a 409, and nothing is kept; after a conflict the order is placed again."""
    visit.box.fail_commit("constraint", on=shop)
    assert (await order(visit.client, {ISBN: 1})).status_code == 409
    assert (await stock_of(visit.client, ISBN), visit.woken) == (3, 0)
    visit.box.fail_commit("conflict", on=shop)
    assert (await order(visit.client, {ISBN: 1})).status_code == 201
    assert (await stock_of(visit.client, ISBN), visit.woken) == (2, 1)


@pytest.mark.parametrize("failure", ["lost", "lost_after_commit"])
async def test_commit_whose_answer_is_lost(visit: Visit, failure: str) -> None:
    """Nobody knows then if the order was placed: 503, and the same request again places it once."""
    key = uuid4()
    visit.box.fail_commit("lost" if failure == "lost" else "lost_after_commit", on=shop)
    unknown = await order(visit.client, {ISBN: 1}, key=key)
    assert (unknown.status_code, unknown.headers["Retry-After"]) == (503, "1")
    assert (await order(visit.client, {ISBN: 1}, key=key)).status_code == 201
    assert await stock_of(visit.client, ISBN) == 2


async def test_connection_that_is_lost(visit: Visit) -> None:
    """A statement that finds its connection lost is a 503, and the next request is served."""
    visit.box.lose_connection(on=shop)
    assert (await order(visit.client, {ISBN: 1})).status_code == 503
    assert (await order(visit.client, {ISBN: 1})).status_code == 201


async def test_queue_that_is_down(visit: Visit, caplog: pytest.LogCaptureFixture) -> None:
    """An order is placed without Redis; the log says so, and a sweep will find its messages."""
    visit.queue_works = False
    assert (await order(visit.client, {ISBN: 1})).status_code == 201
    assert "Redis is down" in caplog.text
    async with shop() as unit:
        assert await unit.session.scalar(text("SELECT count(*) FROM outbox")) == 2


async def test_health(visit: Visit) -> None:
    """The shop is alive and ready; with another schema it is alive, and not ready."""
    assert (await visit.client.get("/health/ready")).json() == "ready"
    async with reporting.begin() as unit:
        await unit.session.execute(text("UPDATE alembic_version SET version_num = 'older'"))
    ready = await visit.client.get("/health/ready")
    assert (ready.status_code, ready.json()["detail"]) == (503, "the schema is older and not 0001")
    assert (await visit.client.get("/health/live")).status_code == 200


async def test_header_that_is_no_position(visit: Visit) -> None:
    """A client's mistake is a client's error."""
    answer = await visit.client.get("/orders/1", headers={"X-Position": "soon"})
    assert answer.status_code == 422


@pytest.mark.parametrize(
    "customer",
    ["a,b@c", "a;b@c", "<@c", "a\0@c", "a@c\x1cBcc:b", "=?utf-8?q?a=0aBcc:b?=@c", "\u00e4@c", "a@", "a@b@c"],
)
async def test_customer_who_has_no_plain_address(visit: Visit, customer: str) -> None:
    """An address that could be more than one, or could not be written into a mail, is refused."""
    assert (await order(visit.client, {ISBN: 1}, customer=customer)).status_code == 422


@pytest.mark.parametrize(
    "wrong",
    [
        *({"isbn": "\u0663" * 13}, {"title": "\0"}, {"title": ""}),
        *({"cents": 2**31}, {"cents": 0}, {"stock": 2**31}),
    ],
    ids=repr,
)
async def test_book_that_the_database_cannot_hold(visit: Visit, wrong: dict[str, object]) -> None:
    """A value that no column could hold is the client's error, and not the server's."""
    book = {"isbn": "9780000000000", "title": "Emma", "cents": 699, "stock": 1}
    assert (await visit.client.post("/books", json={**book, **wrong})).status_code == 422
    assert (await visit.client.get(f"/orders/{2**63}")).status_code == 422


async def test_conflicts_that_go_on(visit: Visit) -> None:
    """A client whose order met a conflict at its last attempt is told to send it again."""
    visit.box.fail_commit("conflict", on=shop)
    stamina.set_active(False)
    try:
        answer = await order(visit.client, {ISBN: 1})
    finally:
        stamina.set_active(True)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert answer.json()["detail"] == "Too many others want the same: send it again."


async def test_catalogue_comes_in_pages(visit: Visit) -> None:
    """A page has as many titles as were asked for, and the next one goes on after its last."""
    first = await visit.client.get("/books", params={"limit": 1})
    second = await visit.client.get("/books", params={"limit": 1, "after": first.json()[0]["isbn"]})
    assert [page.json()[0]["isbn"] for page in (first, second)] == [ISBN, OTHER]


async def test_admin(visit: Visit) -> None:
    """The admin lets in by its password alone, and what it saves is committed."""
    login = {"username": "admin", "password": "a wrong password"}
    assert (await visit.client.post("/admin/login", data=login)).status_code == 400
    assert (await visit.client.get("/admin/book/list")).status_code == 302
    login["password"] = "a password for tests"  # noqa: S105  # of no other shop
    assert (await visit.client.post("/admin/login", data=login)).status_code == 302
    assert "Pride and Prejudice" in (await visit.client.get("/admin/book/list")).text
    change = {"isbn": ISBN, "title": "Pride and Prejudice", "cents": "799", "stock": "7"}
    page = await visit.client.get(f"/admin/book/edit/{ISBN}")
    change |= dict(re.findall(r'name="(csrf\w*)"[^>]*value="([^"]+)"', page.text))
    saved = await visit.client.post(f"/admin/book/edit/{ISBN}", data={**change, "save": "Save"})
    assert saved.status_code == 302, saved.text
    assert await stock_of(visit.client, ISBN) == 7


@pytest.mark.parametrize("https", [False, True])
async def test_cookie_of_the_admin(settings: Settings, *, https: bool) -> None:
    """No script and no other site can use the cookie; it goes by HTTPS alone unless the settings say so."""
    login = {"username": "admin", "password": "a password for tests"}
    async with visiting(settings.model_copy(update={"admin_https": https})) as visit:
        answer = await visit.client.post("/admin/login", data=login)
    flags = {flag.strip() for flag in answer.headers["set-cookie"].split(";")[1:]}
    assert {"httponly", "samesite=strict"} <= flags
    assert ("secure" in flags) is https


async def test_shop_without_an_admin(settings: Settings) -> None:
    """Without a password there is no admin."""
    async with visiting(settings.model_copy(update={"admin_password": None, "admin_secret": None})) as visit:
        assert (await visit.client.get("/admin/book/list")).status_code == 404


async def test_admin_works_in_units(settings: Settings) -> None:
    """A page of the admin has a unit of work, as observers see."""
    login = {"username": "admin", "password": "a password for tests"}
    spans, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    async with visiting(settings.model_copy(update={"telemetry": True}), provider) as visit:
        await visit.client.post("/admin/login", data=login)
        spans.clear()
        assert (await visit.client.get("/admin/book/list")).status_code == 200
    assert "unit of work" in {span.name for span in spans.get_finished_spans()}


async def test_telemetry(settings: Settings) -> None:
    """With telemetry an order is one trace, from the request to COMMIT."""
    spans, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    async with visiting(settings.model_copy(update={"telemetry": True}), provider) as visit:
        spans.clear()
        await order(visit.client, {ISBN: 1})
    finished = {span.name: span for span in spans.get_finished_spans()}
    request, commit = finished["POST /orders"], finished["COMMIT"]
    assert request.context
    assert commit.context
    assert commit.context.trace_id == request.context.trace_id
