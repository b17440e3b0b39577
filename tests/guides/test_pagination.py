"""The example of fastapi-pagination: its pages follow each other, in the request's transaction."""

import pytest

pytest.importorskip("fastapi_pagination", reason="requirements/guides.in is not in the lowest row")

from examples.pagination import create_app
from fastapi_async_sqlalchemy import ObservedTransaction, ObservedUnit, Observer
from tests.support.serving import asgi_client

pytestmark = pytest.mark.filterwarnings(  # SQLModel, of its own execute()
    "ignore:(?s).*session.exec:DeprecationWarning"
)


class Transactions(Observer):
    """Notes how many statements each transaction has had."""

    def __init__(self) -> None:
        self.statements: list[int] = []

    def transaction_ended(self, unit: ObservedUnit, transaction: ObservedTransaction) -> None:
        """Note it."""
        self.statements.append(transaction.statements)


async def test_pages_follow_each_other(database_url: str) -> None:
    """Three pages have all the tasks, each once and in order."""
    async with asgi_client(create_app(database_url)) as client:
        read: list[tuple[int, int]] = []
        for page in (1, 2, 3):
            answer = (await client.get("/tasks", params={"page": page, "size": 12})).json()
            assert (answer["total"], answer["pages"]) == (30, 3)
            read += [(task["priority"], task["id"]) for task in answer["items"]]
    assert len(read) == 30
    assert read == sorted(set(read))


async def test_count_and_page_share_a_transaction(sqlite_url: str) -> None:
    """A page is one transaction with two statements, and it ends with the request."""
    app = create_app(sqlite_url)
    seen = Transactions()
    app.user_middleware[0].kwargs["observers"] = [seen]
    async with asgi_client(app) as client:
        seen.statements.clear()
        assert (await client.get("/tasks")).status_code == 200
        assert seen.statements == [2]
