"""The page about GraphQL: resolvers side by side, mutations as a whole, one unit for each message."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
from fastapi import FastAPI
from httpx2 import AsyncClient
from sqlalchemy import delete, event, func, select
from websockets.asyncio.client import ClientConnection, connect
from websockets.typing import Subprotocol

pytest.importorskip("strawberry", reason="requirements/guides.in is not in the lowest row")

import strawberry
from graphql import ExecutionResult
from strawberry.extensions import SchemaExtension
from strawberry.fastapi import GraphQLRouter

from examples.graphql.app import AuthorRow, BookRow, create_app, lifespan, schema
from examples.graphql.extensions import RollBackOnErrors, UnitForEachTask
from fastapi_async_sqlalchemy import SQLAlchemyMiddleware, db
from tests.support.databases import JudgeFor
from tests.support.serving import asgi_client, serve

RESOLVERS = 5
BOOKS = "subscription { books(author: 1, interval: 0.01) { title } }"
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:(?s).*session.exec:DeprecationWarning"
    ),  # SQLModel's, which is installed
    pytest.mark.timeout(40),
]


@pytest.fixture(params=["postgresql", "sqlite"])
def url(request: pytest.FixtureRequest) -> str:
    """An empty database on each of the two in turn."""
    found: str = request.getfixturevalue(f"{request.param}_url")
    return found


@pytest.fixture
async def client(url: str) -> AsyncIterator[AsyncClient]:
    """A client of the library; no connection is out at its end."""
    async with asgi_client(create_app(url)) as client:
        yield client
        assert db.pool_status().checked_out == 0


async def ask(client: AsyncClient, query: str) -> dict[str, Any]:
    """Send an operation and return the answer, whose status is 200."""
    response = await client.post("/graphql", json={"query": query})
    assert response.status_code == 200
    answer: dict[str, Any] = response.json()
    return answer


async def add(client: AsyncClient, *names: str) -> None:
    """Add authors."""
    fields = " ".join(f'{name}: addAuthor(name: "{name}") {{ id }}' for name in names)
    assert "errors" not in await ask(client, f"mutation {{ {fields} }}")


async def test_resolvers_run_side_by_side(postgresql_url: str, judge_for: JudgeFor) -> None:
    """Five fields of a query wait for the database at the same time, each by its own connection."""
    judge, other = await judge_for(postgresql_url), await judge_for(postgresql_url)
    here = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    waiting = f"{here} AND wait_event_type = 'Lock'"
    async with asgi_client(create_app(postgresql_url)) as client:
        await other.execute("BEGIN")
        await other.execute("LOCK TABLE book")
        fields = " ".join(f"count{number}: count" for number in range(RESOLVERS))
        asking = asyncio.create_task(ask(client, f"{{ {fields} }}"))
        while await judge.scalar(waiting) != RESOLVERS:
            assert not asking.done()
        await other.execute("ROLLBACK")
        assert await asking == {"data": {f"count{number}": 0 for number in range(RESOLVERS)}}


async def test_loader_sends_one_statement(client: AsyncClient) -> None:
    """The books of all authors come by one statement, in a unit of the loader."""
    await add(client, "Ann", "Bob", "Cem")
    await ask(client, 'mutation { addBook(title: "One", author: 2) { id } }')
    statements: list[str] = []

    def note(_: object, __: object, statement: str, *___: object) -> None:
        statements.append(statement)

    event.listen(db.engine.sync_engine, "before_cursor_execute", note)
    answer = await ask(client, "{ authors { name books { title } } }")
    books = {author["name"]: author["books"] for author in answer["data"]["authors"]}
    assert books == {"Ann": [], "Bob": [{"title": "One"}], "Cem": []}
    assert len([statement for statement in statements if "FROM book" in statement]) == 1
    assert len([statement for statement in statements if "FROM" in statement]) == 2


async def test_mutation_is_one_transaction(client: AsyncClient) -> None:
    """The fields of a mutation's result see what it has written, and what came before in it."""
    answer = await ask(
        client,
        'mutation { a: addAuthor(name: "Ann") { namesakes books { id } }'
        ' b: addAuthor(name: "Abe") { namesakes books { id } } }',
    )
    assert answer["data"] == {"a": {"namesakes": 0, "books": []}, "b": {"namesakes": 1, "books": []}}


async def test_error_in_one_field_undoes_the_mutation(client: AsyncClient) -> None:
    """Where the second field fails nothing is stored, and the answer shows no data and no statement."""
    answer = await ask(
        client, 'mutation { a: addAuthor(name: "Ann") { id } b: addAuthor(name: "Ann") { id } }'
    )
    assert answer["data"] is None
    assert [error["message"] for error in answer["errors"]] == ["Unexpected error."]
    assert await ask(client, "{ authors { name } }") == {"data": {"authors": []}}


async def test_commit_that_fails_is_an_error(postgresql_url: str, judge_for: JudgeFor) -> None:
    """A constraint that is checked at COMMIT is an error of the mutation, and not a success."""
    async with asgi_client(create_app(postgresql_url)) as client:
        answer = await ask(client, 'mutation { addBook(title: "One", author: 99) { id } }')
    assert answer["data"] is None
    assert answer["errors"][0]["message"] == "violates book_author_id_fkey"
    assert await (await judge_for(postgresql_url)).scalar("SELECT count(*) FROM book") == 0


async def test_http_and_one_session_refuse(url: str) -> None:
    """Resolvers that share the request's session are told so; with turns they get their answers."""

    @strawberry.type
    class Query:
        @strawberry.field
        async def authors(self) -> int:
            return await db.session.scalar(select(func.count(AuthorRow.id))) or 0

        @strawberry.field
        async def books(self) -> int:
            return await db.session.scalar(select(func.count(BookRow.id))) or 0

    schema = strawberry.Schema(Query)
    async with asgi_client(served(schema, url)) as client:
        answer = await ask(client, "{ authors books }")
        assert "is in the middle of scalar()" in answer["errors"][0]["message"]
    async with asgi_client(served(schema, url, concurrent_use="wait")) as client:
        assert await ask(client, "{ authors books }") == {"data": {"authors": 0, "books": 0}}
    by_task = strawberry.Schema(Query, extensions=[UnitForEachTask])
    async with asgi_client(served(by_task, url)) as client:
        assert await ask(client, "{ authors books }") == {"data": {"authors": 0, "books": 0}}


def served(schema: strawberry.Schema, url: str, **options: Any) -> FastAPI:
    """Make an application with this schema."""
    app = FastAPI(lifespan=lifespan)
    app.add_middleware(SQLAlchemyMiddleware, db_url=url, **options)
    app.include_router(GraphQLRouter(schema), prefix="/graphql")
    return app


@strawberry.type
class Named:
    """An author whose number is asked for."""

    name: str

    @strawberry.field
    async def number(self) -> int:
        """Ask by the session of the task."""
        return await db.session.scalar(select(AuthorRow.id).where(AuthorRow.name == self.name)) or 0


async def test_unit_for_each_task_holds_while_fields_are_resolved(postgresql_url: str) -> None:
    """A task has its connection until the fields of its result are resolved, which need others."""

    @strawberry.type
    class Query:
        @strawberry.field
        async def names(self) -> list[Named]:
            return [Named(name=name) for name in await db.session.scalars(select(AuthorRow.name))]

        @strawberry.field
        async def count(self) -> int:
            return await db.session.scalar(select(func.count(AuthorRow.id))) or 0

    extension: type[SchemaExtension] = UnitForEachTask
    schema = strawberry.Schema(Query, extensions=[extension])
    small = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.2}
    async with asgi_client(served(schema, postgresql_url, engine_args=small)) as client:
        async with db.begin() as unit:
            unit.session.add_all([AuthorRow(name="Ann"), AuthorRow(name="Bob")])
        answer = await ask(client, "{ names { number } count }")
        assert "had no free connection within" in answer["errors"][0]["message"]


async def test_errors_mark_the_request_rollback_only(url: str) -> None:
    """In the request's own unit an error in an answer of status 200 leaves nothing to commit."""

    @strawberry.type
    class Query:
        @strawberry.field
        async def count(self) -> int:
            return await db.session.scalar(select(func.count(AuthorRow.id))) or 0

    @strawberry.type
    class Mutation:
        @strawberry.mutation
        async def add(self, name: str) -> bool:
            db.session.add(AuthorRow(name=name))
            await db.session.flush()
            if not name:
                raise ValueError
            return True

    halves = 'mutation { a: add(name: "Ann") b: add(name: "") }'
    for extensions, stored in (([RollBackOnErrors], 0), ([], 2)):
        schema = strawberry.Schema(Query, Mutation, extensions=extensions)
        async with asgi_client(served(schema, url, commit_on_exit=True)) as client:
            assert (await ask(client, halves))["errors"]
            assert await ask(client, "{ count }") == {"data": {"count": stored}}
            if not stored:
                await ask(client, 'mutation { add(name: "Cem") }')
                assert await ask(client, "{ count }") == {"data": {"count": 1}}
                await ask(client, 'mutation { add(name: "") }')
        async with db.connect(url), db.begin() as unit:
            await unit.session.execute(delete(AuthorRow))


def subscribed(address: str) -> AbstractAsyncContextManager[ClientConnection]:
    """Open a WebSocket for GraphQL."""
    return connect(
        f"{address.replace('http', 'ws')}/graphql", subprotocols=[Subprotocol("graphql-transport-ws")]
    )


def books(*titles: str) -> dict[str, Any]:
    """Return what the subscription sends for these books."""
    return {"data": {"books": [{"title": title} for title in titles]}}


async def test_websocket_has_a_unit_for_each_message(url: str) -> None:
    """A subscription sends the books at each change; a mutation over the WebSocket is one transaction."""
    async with serve(create_app(url)) as address, subscribed(address.url) as websocket:

        async def send(kind: str, number: str = "", query: str = "") -> None:
            await websocket.send(json.dumps({"id": number, "type": kind, "payload": {"query": query}}))

        async def until(kind: str, number: str) -> Any:
            while (message := json.loads(await websocket.recv()))["type"] != kind or message["id"] != number:
                pass
            return message["payload"]

        await send("connection_init")
        assert json.loads(await websocket.recv())["type"] == "connection_ack"
        await send("subscribe", "author", 'mutation { addAuthor(name: "Ann") { id } }')
        assert await until("next", "author") == {"data": {"addAuthor": {"id": 1}}}
        await send("subscribe", "books", BOOKS)
        assert await until("next", "books") == books()
        for title, titles in (("One", ["One"]), ("Two", ["One", "Two"])):
            await send("subscribe", title, f'mutation {{ addBook(title: "{title}", author: 1) {{ id }} }}')
            assert await until("next", "books") == books(*titles)
        await send(
            "subscribe", "half", 'mutation { a: addAuthor(name: "Z") { id } b: addAuthor(name: "Z") { id } }'
        )
        assert (await until("next", "half"))["data"] is None
        await send("subscribe", "all", "{ authors { name } }")
        assert await until("next", "all") == {"data": {"authors": [{"name": "Ann"}]}}
        await send("complete", "books")


async def test_subscription_misses_no_book(postgresql_url: str, judge_for: JudgeFor) -> None:
    """A book is sent although one with a higher id was committed before it."""
    earlier, later = await judge_for(postgresql_url), await judge_for(postgresql_url)
    async with asgi_client(create_app(postgresql_url)) as client:
        await add(client, "Ann")
        sent = await schema.subscribe(BOOKS)
        assert not isinstance(sent, ExecutionResult)
        assert (await anext(sent)).data == books()["data"]
        for writer, title in ((earlier, "One"), (later, "Two")):
            await writer.execute("BEGIN")
            await writer.execute("INSERT INTO book (title, author_id) VALUES (:title, 1)", title=title)
        await later.execute("COMMIT")
        assert (await anext(sent)).data == books("Two")["data"]
        await earlier.execute("COMMIT")
        assert (await anext(sent)).data == books("One", "Two")["data"]
        await sent.aclose()
