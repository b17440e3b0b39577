"""A session that says whose models it takes refuses all others, before anything is sent."""

from collections.abc import AsyncIterator, Awaitable, Callable
from types import new_class
from typing import Any, Generic, TypeVar, cast

import pytest
from attrs import define
from sqlalchemy import (
    Column,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    delete,
    event,
    exists,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, aliased, mapped_column, registry, relationship
from sqlalchemy.orm import Session as SyncSession
from sqlmodel import Field, SQLModel
from sqlmodel import select as sqlmodel_select
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelSession

from fastapi_async_sqlalchemy import (
    ConfigurationError,
    ModelSession,
    SessionProxy,
    WrongDatabaseError,
    create_middleware_and_session_proxy,
)

B = TypeVar("B", contravariant=True)  # noqa: PLC0105  # as in the programs of users


class ShopBase(DeclarativeBase):
    """The tables of the shop."""


class AuditBase(DeclarativeBase):
    """The tables of the audit, one of which has the name of one of the shop's."""


class Order(ShopBase):
    """An order of the shop."""

    __tablename__ = "entries"
    id: Mapped[int] = mapped_column(primary_key=True)
    product: Mapped[str] = mapped_column(String(30))


class Refund(ShopBase):
    """A row of the shop that refers to rows of the audit: a mistake that SQLAlchemy lets pass."""

    __tablename__ = "refunds"
    id: Mapped[int] = mapped_column(primary_key=True)
    entries: Mapped[list["Entry"]] = relationship(
        lambda: Entry,
        primaryjoin=lambda: Refund.id == Entry.__table__.c.id,
        foreign_keys=lambda: Entry.__table__.c.id,
    )


class Entry(AuditBase):
    """An entry of the audit."""

    __tablename__ = "entries"
    id: Mapped[int] = mapped_column(primary_key=True)
    product: Mapped[str] = mapped_column(String(30))


SHOP_LINKS = Table(
    "links", ShopBase.metadata, Column[int]("order", ForeignKey("entries.id"), primary_key=True)
)
AUDIT_LINKS = Table(
    "links", AuditBase.metadata, Column[int]("order", ForeignKey("entries.id"), primary_key=True)
)
REFLECTED = Table("entries", MetaData(), Column("id", Integer, primary_key=True))


class ShopSession(ModelSession[ShopBase]):
    """The session of the shop."""


class AuditSession(ModelSession[AuditBase]):
    """The session of the audit."""


Session = AsyncSession
"""To type checkers any session: these tests are about what they cannot see."""


@define(eq=False)
class Shop:
    """The shop's pair and engine, and how often a statement was sent."""

    db: SessionProxy[ShopSession]
    engine: AsyncEngine
    sent: int = 0

    def count(self, *_: object) -> None:
        """Count a statement."""
        self.sent += 1


@pytest.fixture
async def shop(database_url: str) -> AsyncIterator[Shop]:
    """A shop with its tables, on each of the three databases."""
    _, db = create_middleware_and_session_proxy(ShopSession)
    engine = create_async_engine(database_url)
    async with engine.begin() as connection:
        await connection.run_sync(ShopBase.metadata.create_all)
    shop = Shop(db, engine)
    async with db.connect(engine):
        event.listen(engine.sync_engine, "after_cursor_execute", shop.count)
        yield shop
    await engine.dispose()


def joined(session: Session) -> Awaitable[Any]:
    """Join a model of the audit to one of the shop."""
    return session.execute(select(Order).join(Entry, Entry.id == Order.id))


def in_bulk(session: Session) -> Awaitable[Any]:
    """Save an object in bulk."""
    return session.run_sync(lambda sync: sync.bulk_save_objects([Entry(id=1, product="tea")]))


def in_bulk_mappings(session: Session) -> Awaitable[Any]:
    """Insert mappings in bulk."""
    return session.run_sync(lambda sync: sync.bulk_insert_mappings(Entry, [{"id": 1}]))


def queried(session: Session) -> Awaitable[Any]:
    """Use the query of SQLAlchemy 1."""

    def query(sync: SyncSession) -> list[Entry]:
        return sync.query(Entry).all()

    return session.run_sync(query)


async def cascaded(session: Session) -> None:
    """Add an object of the shop that refers to one of the audit."""
    session.add(Refund(id=1, entries=[Entry(id=1, product="tea")]))


async def added(session: Session) -> None:
    """Add an object."""
    session.add(Entry(id=1, product="tea"))


async def added_with_another(session: Session) -> None:
    """Add two objects."""
    session.add_all([Order(id=1, product="tea"), Entry(id=1, product="tea")])


STATEMENTS: dict[str, Any] = {
    "select": select(Entry),
    "select a column": select(Entry.id),
    "select of both": select(Order.id, Entry.product).where(Order.id == Entry.id),
    "select an alias": select(aliased(Entry)),
    "insert": insert(Entry).values(id=1, product="tea"),
    "update": update(Entry).values(product="milk"),
    "delete": delete(Entry),
    "a subquery": select(Order).where(Order.id.in_(select(Entry.id))),
    "exists": select(Order).where(exists().where(Entry.id == 1)),
    "a common table expression": select(select(Entry.id).cte()),
    "an insert from a select": insert(Order).from_select(["id", "product"], select(Entry.id, Entry.product)),
    "Core's insert": insert(cast("Table", Entry.__table__)).values(id=1, product="tea"),
    "Core's select": select(func.count()).select_from(Entry.__table__),
    "a table without a model": select(AUDIT_LINKS),
}
OPERATIONS: dict[str, Callable[[Session], Awaitable[Any]]] = {
    "add": added,
    "add_all": added_with_another,
    "cascade": cascaded,
    "get": lambda session: session.get(Entry, 1),
    "get_one": lambda session: session.get_one(Entry, 1),
    "merge": lambda session: session.merge(Entry(id=1, product="tea")),
    "merge without a key": lambda session: session.merge(Entry(product="tea")),
    "stream": lambda session: session.stream(select(Entry)),
    "scalars": lambda session: session.scalars(select(Entry)),
    "bulk": in_bulk,
    "bulk mappings": in_bulk_mappings,
    "query": queried,
    "join": joined,
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
async def test_operation_with_a_foreign_model(
    shop: Shop, operation: Callable[[Session], Awaitable[Any]]
) -> None:
    """Whatever takes a model refuses one of another base; nothing is sent, and the error names all three."""
    async with shop.db() as unit:
        with pytest.raises(
            WrongDatabaseError, match=r"Entry.* a model of AuditBase, and ShopSession \("
        ) as refused:
            await operation(unit.session)
        assert shop.sent == 0
        await unit.rollback()
    assert "accepts only models of ShopBase" in str(refused.value)
    assert refused.value.owner is None


@pytest.mark.parametrize("statement", STATEMENTS.values(), ids=STATEMENTS)
async def test_statement_with_a_foreign_table(shop: Shop, statement: Any) -> None:
    """A statement is refused wherever in it the table is, each time; the transaction can go on."""
    async with shop.db(commit_on_exit=True) as unit:
        unit.session.add(Order(id=7, product="tea"))
        await unit.session.flush()
        sent = shop.sent
        for _ in range(2):
            with pytest.raises(WrongDatabaseError, match=r"'links'|'entries'|Entry"):
                await unit.session.execute(statement)
        assert shop.sent == sent
    async with shop.db() as unit:
        assert await unit.session.scalar(select(func.count(Order.id))) == 1


async def test_own_models_and_tables(shop: Shop) -> None:
    """Its own models pass, and so do its tables, those that no model has, and text."""
    async with shop.db(commit_on_exit=True) as unit:
        session = unit.session
        session.add_all([Order(id=1, product="tea"), Order(id=2, product="milk")])
        await session.flush()
        await session.execute(insert(SHOP_LINKS).values({"order": 1}))
        merged = await session.merge(Order(id=2, product="coffee"))
        assert merged.product == "coffee"
        assert await session.get(Order, 1) is not None
        linked = select(Order.product).join(SHOP_LINKS, SHOP_LINKS.c.order == Order.id)
        assert list(await session.scalars(linked)) == ["tea"]
        assert await session.scalar(select(func.count()).select_from(REFLECTED)) == 2
        assert await session.scalar(text("SELECT COUNT(*) FROM entries")) == 2
        await session.execute(update(Order).where(Order.id == 2).values(product="water"))
        await session.execute(delete(Order).where(Order.id == 2))
    async with shop.engine.connect() as connection:  # an engine is not a session
        assert await connection.scalar(select(func.count()).select_from(Entry.__table__)) == 1


async def test_error_names_the_database_of_the_model(shop: Shop, tmp_path: Any) -> None:
    """Where a pair is known for the model, the error says which database that is."""
    _, audit = create_middleware_and_session_proxy(AuditSession)
    async with audit.connect(f"sqlite+aiosqlite:///{tmp_path / 'audit.db'}"), shop.db() as unit:
        with pytest.raises(WrongDatabaseError, match=r"use a session of AuditSession") as refused:
            Session.add(unit.session, Entry(id=1, product="tea"))
        assert refused.value.owner is not None
        with pytest.raises(WrongDatabaseError, match=r"use a session of AuditSession"):
            await unit.session.execute(select(AUDIT_LINKS))


async def test_cascade_by_an_attribute(shop: Shop) -> None:
    """An object that comes along with one that is in the session already is refused where it is assigned."""
    async with shop.db() as unit:
        refund = Refund(id=1)
        unit.session.add(refund)
        with pytest.raises(WrongDatabaseError):
            refund.entries = [Entry(id=1, product="tea")]


class BothSession(ModelSession[ShopBase | AuditBase]):
    """A session of a database that has all tables."""


class Of(ModelSession[B], Generic[B]):
    """A session class of a company's own, for all its databases."""

    async def size(self, model: type) -> int:
        """Count rows."""
        return await self.scalar(select(func.count()).select_from(model)) or 0


class OfShop(Of[ShopBase]):
    """The shop's session of that class."""


async def test_union_of_bases(sqlite_url: str) -> None:
    """A session class may take the models of several bases."""
    _, both = create_middleware_and_session_proxy(BothSession)
    async with both.connect(sqlite_url), both() as unit:
        await unit.session.run_sync(lambda sync: ShopBase.metadata.create_all(sync.connection()))
        unit.session.add_all([Order(id=1, product="tea"), Entry(id=2, product="milk")])
        assert await unit.session.get(Entry, 1) is not None


async def test_two_session_classes_of_one_database(sqlite_url: str) -> None:
    """Where a unit has another session class, each session is asked what it takes."""
    _, shop = create_middleware_and_session_proxy(ShopSession)
    inside = select(Order.id).where(Order.id.in_(select(Entry.id)))
    async with shop.connect(sqlite_url), shop(session_args={"class_": BothSession}) as unit:
        await unit.session.run_sync(lambda sync: ShopBase.metadata.create_all(sync.connection()))
        assert (await unit.session.execute(inside)).all() == []
        async with shop() as narrow:
            with pytest.raises(WrongDatabaseError, match="'entries' is the table of Entry"):
                await narrow.session.execute(inside)
        assert (await unit.session.execute(inside)).all() == []


async def test_generic_class_between(sqlite_url: str) -> None:
    """A generic class between passes its parameter on."""
    _, shop = create_middleware_and_session_proxy(OfShop)
    async with shop.connect(sqlite_url), shop() as unit:
        await unit.session.run_sync(lambda sync: ShopBase.metadata.create_all(sync.connection()))
        assert await unit.session.size(Order) == 0
        with pytest.raises(WrongDatabaseError):
            await unit.session.size(Entry)


def test_class_that_does_not_say() -> None:
    """A session class without the parameter is no session class of a pair, and neither is an alias."""
    with pytest.raises(ConfigurationError, match=r"write `class ShopSession\(ModelSession\[ShopBase\]\)`"):
        create_middleware_and_session_proxy(ModelSession)
    with pytest.raises(ConfigurationError, match=r"write `class ShopSession\(Of\[ShopBase\]\)`"):
        create_middleware_and_session_proxy(Of)
    with pytest.raises(
        ConfigurationError, match=r"must be a class: write `class ShopSession\(ModelSession\["
    ):
        create_middleware_and_session_proxy(ModelSession[ShopBase])


def test_parameter_that_is_no_class() -> None:
    """The parameter names classes: anything else is refused where the class is made."""
    with pytest.raises(ConfigurationError, match=r"parameter of Late must be a declarative base"):
        new_class("Late", (ModelSession["ShopBase"],))


class ShopModel(SQLModel, registry=registry()):
    """The models of the shop, by SQLModel."""


class AuditModel(SQLModel, registry=registry()):
    """The models of the audit, by SQLModel."""


class Hero(ShopModel, table=True):
    """A model of the shop."""

    id: int = Field(primary_key=True)


class Villain(AuditModel, table=True):
    """A model of the audit."""

    id: int = Field(primary_key=True)


class HeroSession(ModelSession[ShopModel], SQLModelSession):
    """SQLModel's session, of the shop."""


async def test_sqlmodel(sqlite_url: str) -> None:
    """SQLModel's session class and models are told apart in the same way."""
    _, heroes = create_middleware_and_session_proxy(HeroSession)
    async with heroes.connect(sqlite_url), heroes() as unit:
        await unit.session.run_sync(lambda sync: ShopModel.metadata.create_all(sync.connection()))
        unit.session.add(Hero(id=1))
        assert (await unit.session.exec(sqlmodel_select(Hero))).one().id == 1
        with pytest.raises(WrongDatabaseError, match="Villain is a model of AuditModel"):
            await unit.session.exec(sqlmodel_select(Villain))
        with pytest.raises(WrongDatabaseError, match="Villain is a model of AuditModel"):
            Session.add(unit.session, Villain(id=1))
