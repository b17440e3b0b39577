"""The optional admin interface: sqladmin behind a password, in units of the shop."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from secrets import compare_digest
from typing import Any, ClassVar, TypeAlias

from fastapi import FastAPI, Request
from sqladmin import Admin, ModelView
from sqladmin.authentication import AuthenticationBackend
from sqlalchemy.ext.asyncio import async_sessionmaker

from examples.bookshop.databases import ShopSession, shop
from examples.bookshop.models import Book, Message, Order
from examples.bookshop.settings import Settings

Columns: TypeAlias = str | Sequence[Any]


class Password(AuthenticationBackend):
    """A single password shared by all administrators."""

    def __init__(self, password: str, secret_key: str, *, https_only: bool) -> None:
        super().__init__(secret_key, https_only=https_only, same_site="strict")
        self._password = password

    async def login(self, request: Request) -> bool:
        """Log in if the password is correct."""
        given = (await request.form()).get("password")
        known = isinstance(given, str) and compare_digest(given.encode(), self._password.encode())
        if known:
            request.session["admin"] = True
        return known

    async def logout(self, request: Request) -> bool:
        """Log out."""
        request.session.clear()
        return True

    async def authenticate(self, request: Request) -> bool:
        """Return whether the client is logged in."""
        return request.session.get("admin") is True


@asynccontextmanager
async def unit_session() -> AsyncGenerator[ShopSession]:
    """Open a unit and yield its session, which sqladmin commits."""
    async with shop() as unit:
        yield unit.session


class UnitSessions(async_sessionmaker[ShopSession]):
    """Opens a unit when sqladmin needs a session, so that observers see it."""

    def __call__(self, **_: Any) -> AbstractAsyncContextManager[ShopSession]:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]  # it is for `async with` alone
        """Return the session for `async with`."""
        return unit_session()


class Books(ModelView, model=Book):
    """Prices and stock."""

    column_list: ClassVar[Columns] = [Book.isbn, Book.title, Book.cents, Book.stock]


class Orders(ModelView, model=Order):
    """Orders, read-only."""

    column_list: ClassVar[Columns] = [Order.id, Order.customer, Order.placed_at]
    can_create = can_edit = can_delete = False


class Outbox(ModelView, model=Message):
    """Pending messages, and why they failed."""

    column_list: ClassVar[Columns] = [
        Message.id,
        Message.kind,
        Message.due_at,
        Message.attempts,
        Message.last_error,
    ]
    can_create = can_edit = False


def add_admin(app: FastAPI, settings: Settings) -> None:
    """Add the admin at /admin if a password is set."""
    if not settings.admin_password or not settings.admin_secret:
        return
    login = Password(
        settings.admin_password.get_secret_value(),
        settings.admin_secret.get_secret_value(),
        https_only=settings.admin_https,
    )
    admin = Admin(app, session_maker=UnitSessions(class_=ShopSession), authentication_backend=login)
    for view in (Books, Orders, Outbox):
        admin.add_view(view)
