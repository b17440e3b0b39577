"""The page about admin interfaces: their forms write in units, which hooks and observers see."""

import logging
import re
from collections.abc import AsyncIterator

import pytest
from attrs import define, field
from fastapi import FastAPI
from httpx2 import AsyncClient, Response
from sqlalchemy.ext.asyncio import create_async_engine

pytest.importorskip("sqladmin", reason="requirements/guides.in is not in the lowest row")

from starlette_admin.contrib import sqla as starlette_admin

from examples.admin import by_engine, by_sqladmin, by_starlette_admin
from examples.admin.tables import Product
from fastapi_async_sqlalchemy import SQLAlchemyMiddleware, db
from tests.support.databases import Judge, JudgeFor
from tests.support.serving import asgi_client

PRODUCTS = "SELECT name, price FROM product ORDER BY name"
TOKEN = re.compile(r'name="csrftoken" value="(?P<token>[^"]+)"')
CREATE = "/admin/product/create"


@define
class Forms:
    """The forms of an admin interface, filled in by a client."""

    client: AsyncClient
    edit: str
    """The path of the form of the first product."""
    removal: tuple[str, str]
    """The method and the path by which the page of a list deletes the first product."""
    announced: pytest.LogCaptureFixture
    _token: dict[str, str] = field(factory=dict[str, str])

    async def send(self, path: str, name: str, price: int) -> Response:
        """Open a form, fill it in and send it."""
        form = (await self.client.get(path)).text
        if found := TOKEN.search(form):
            self._token["csrftoken"] = found["token"]
        return await self.client.post(path, data={"name": name, "price": str(price), **self._token})

    async def delete(self) -> Response:
        """Delete the first product."""
        method, path = self.removal
        headers = {"X-CSRFToken": self._token.get("csrftoken", "")}
        return await self.client.request(method, path, headers=headers)

    def messages(self) -> list[str]:
        """Return what has been announced."""
        return [record.getMessage() for record in self.announced.records if "tables" in record.name]


@pytest.fixture(params=["postgresql", "sqlite"])
def url(request: pytest.FixtureRequest) -> str:
    """An empty database on each of the two in turn."""
    found: str = request.getfixturevalue(f"{request.param}_url")
    return found


@pytest.fixture(params=["sqladmin", "starlette-admin"])
async def forms(
    request: pytest.FixtureRequest, url: str, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[Forms]:
    """The forms of each interface in turn; no connection is out at their end."""
    caplog.set_level(logging.INFO)
    if request.param == "sqladmin":
        app = by_sqladmin.create_app(url)
        edit, removal = "/admin/product/edit/1", ("DELETE", "/admin/product/delete?pks=1")
    else:
        app = by_starlette_admin.create_app(url)
        edit = "/admin/product/edit?pk=1"
        removal = "POST", "/admin/_api/product/row-action?name=delete&pk=1"
    async with asgi_client(app, raise_app_exceptions=False) as client:
        yield Forms(client, edit, removal, caplog)
        assert db.pool_status().checked_out == 0


@pytest.fixture
async def judge(url: str, judge_for: JudgeFor) -> Judge:
    """Look at the database from outside."""
    return await judge_for(url)


pytestmark = [
    pytest.mark.filterwarnings("ignore:No secret_key provided:UserWarning"),
    pytest.mark.filterwarnings("ignore:(?s).*session.exec:DeprecationWarning"),  # SQLModel's
]


async def test_forms_write(forms: Forms, judge: Judge) -> None:
    """What a form creates, edits and deletes is committed, and each change is announced once."""
    assert (await forms.send(CREATE, "tea", 3)).is_redirect
    assert await judge.rows(PRODUCTS) == [("tea", 3)]
    assert (await forms.send(forms.edit, "green tea", 4)).is_redirect
    assert await judge.rows(PRODUCTS) == [("green tea", 4)]
    assert (await forms.delete()).is_success
    assert await judge.rows(PRODUCTS) == []
    assert forms.messages() == ["tea has changed", "green tea has changed"]


async def test_form_that_violates_a_constraint(forms: Forms, judge: Judge) -> None:
    """Nothing of a form that the database refuses is stored or announced; the next one is."""
    await forms.send(CREATE, "tea", 3)
    refused = await forms.send(CREATE, "cup", -1)
    assert refused.status_code == (400 if "edit/" in forms.edit else 500)
    assert ("costs_something" in refused.text) == (refused.status_code == 400)
    assert (await forms.send(forms.edit, "tea", -1)).status_code >= 400
    assert await judge.rows(PRODUCTS) == [("tea", 3)]
    assert (await forms.send(CREATE, "cup", 1)).is_redirect
    assert await judge.rows(PRODUCTS) == [("cup", 1), ("tea", 3)]
    assert forms.messages() == ["tea has changed", "cup has changed"]


@pytest.mark.parametrize("interface", ["sqladmin", "starlette-admin"])
async def test_engine_alone(interface: str, url: str, judge: Judge, caplog: pytest.LogCaptureFixture) -> None:
    """With the application's engine an interface makes plain sessions: committed, but no unit sees them."""
    if interface == "sqladmin":
        app = by_engine.create_app(url)
    else:
        engine = create_async_engine(url)
        app = FastAPI(lifespan=by_starlette_admin.lifespan)
        app.add_middleware(SQLAlchemyMiddleware, custom_engine=engine)
        admin = starlette_admin.Admin(engine)
        admin.add_view(starlette_admin.ModelView(Product))
        admin.mount_to(app)
    opened: list[object] = []
    async with asgi_client(app, raise_app_exceptions=False) as client:
        db.on_open(opened.append)
        response = await Forms(client, "", ("", ""), caplog).send(CREATE, "tea", 3)
        assert response.is_redirect, response.text
        assert await judge.rows(PRODUCTS) == [("tea", 3)]
        assert opened == []
        assert db.pool_status().checked_out == 0
        await db.engine.dispose()
