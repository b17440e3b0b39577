"""The example with SQLModel: in a sandbox, on PostgreSQL and SQLite."""

from collections.abc import AsyncIterator

import pytest
from httpx2 import AsyncClient

from examples.sqlmodel_app import create_app, tickets_db
from fastapi_async_sqlalchemy.testing import SandboxedApp
from tests.support.databases import JudgeFor
from tests.support.serving import asgi_client


@pytest.fixture
def sandboxed(deferring_url: str) -> SandboxedApp:
    """The application, of which nothing stays."""
    return SandboxedApp(create_app(deferring_url), tickets_db)


@pytest.fixture
async def client(sandboxed: SandboxedApp) -> AsyncIterator[AsyncClient]:
    """A client of the application in its sandbox."""
    async with asgi_client(sandboxed) as client:
        yield client


async def test_ticket_goes_its_way(client: AsyncClient) -> None:
    """A team gets a ticket, which is done once: the second time is a 409."""
    assert (await client.post("/teams", json={"name": "web"})).status_code == 201
    made = await client.post("/teams/web/tickets", json={"title": "a broken link"})
    assert made.status_code == 201, made.text
    ticket = made.json()
    assert (await client.get("/teams/web")).json()["tickets"] == [ticket]
    assert (await client.get("/tickets")).json() == [ticket]
    for status in (200, 409):
        assert (await client.post(f"/tickets/{ticket['id']}/done")).status_code == status
    assert (await client.get("/tickets")).json() == []
    assert (await client.get("/tickets?done=true")).json() == [{**ticket, "done": True}]


async def test_second_team_of_a_name_is_refused(client: AsyncClient, sandboxed: SandboxedApp) -> None:
    """A name that is taken is a 409, be it at the statement or at COMMIT, and the first team stays."""
    assert (await client.post("/teams", json={"name": "web"})).status_code == 201
    assert (await client.post("/teams", json={"name": "web"})).status_code == 409
    sandboxed.box.fail_commit()
    assert (await client.post("/teams/web/tickets", json={"title": "lost"})).status_code == 409
    assert (await client.get("/teams/web")).json()["tickets"] == []


async def test_team_comes_with_its_tickets_in_two_statements(
    client: AsyncClient, sandboxed: SandboxedApp
) -> None:
    """However many tickets a team has, it is read in two statements."""
    await client.post("/teams", json={"name": "web"})
    for title in ("one", "two", "three"):
        await client.post("/teams/web/tickets", json={"title": title})
    sandboxed.box.statements.clear()
    tickets = (await client.get("/teams/web")).json()["tickets"]
    assert [ticket["title"] for ticket in tickets] == ["one", "two", "three"]
    sandboxed.box.assert_statements(at_most=2)


async def test_wrong_names_are_answered(client: AsyncClient) -> None:
    """What is not there is a 404, and what is no title a 422."""
    assert (await client.get("/teams/nobody")).status_code == 404
    assert (await client.post("/tickets/1/done")).status_code == 404
    assert (await client.post("/teams/nobody/tickets", json={"title": ""})).status_code == 422


async def test_nothing_stays(postgresql_url: str, judge_for: JudgeFor) -> None:
    """After the sandbox the database has not even the tables."""
    async with asgi_client(SandboxedApp(create_app(postgresql_url), tickets_db)) as client:
        assert (await client.post("/teams", json={"name": "web"})).status_code == 201
    judge = await judge_for(postgresql_url)
    assert await judge.rows("SELECT * FROM pg_tables WHERE schemaname = 'public'") == []
