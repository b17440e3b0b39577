"""The name of a violated constraint, by each of the five drivers."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import (
    CheckConstraint,
    ForeignKeyConstraint,
    Index,
    String,
    UniqueConstraint,
    event,
    insert,
    text,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fastapi_async_sqlalchemy import (
    SessionProxy,
    UnexpectedRollbackError,
    create_middleware_and_session_proxy,
    violated_constraint,
)


class Base(DeclarativeBase):
    """The tables of these tests."""


class Shelf(Base):
    """What books refer to."""

    __tablename__ = "shelf"

    id: Mapped[int] = mapped_column(primary_key=True)


class Book(Base):
    """A row with a constraint of each kind."""

    __tablename__ = "book"
    __table_args__ = (
        UniqueConstraint("title", name="one_title"),
        CheckConstraint("pages > 0", name="some_pages"),
        ForeignKeyConstraint(["shelf_id"], ["shelf.id"], name="known_shelf"),
        Index("one_spot", "spot", unique=True),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(100))
    pages: Mapped[int] = mapped_column(default=1)
    shelf_id: Mapped[int] = mapped_column(default=1)
    spot: Mapped[int]


ON_SQLITE = {"some_pages"}
"""What SQLite names: of a unique key it names columns, of a foreign key nothing."""
BOOK = {"id": 1, "title": "tea' for key 'one_spot", "pages": 1, "shelf_id": 1, "spot": 1}
VIOLATIONS: dict[str | None, dict[str, Any]] = {
    "one_title": {"id": 2, "spot": 2},
    "one_spot": {"id": 2, "title": "milk"},
    "some_pages": {"id": 2, "title": "milk", "spot": 2, "pages": 0},
    "known_shelf": {"id": 2, "title": "milk", "spot": 2, "shelf_id": 404},
    None: {"id": 2, "title": None, "spot": 2},
}


@pytest.fixture
async def db(driver_url: str) -> AsyncIterator[SessionProxy[AsyncSession]]:
    """A library with one book, by each driver in turn."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    engine = create_async_engine(driver_url)
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine.sync_engine, "connect")
        def enforce(connection: Any, _: object) -> None:
            connection.execute("PRAGMA foreign_keys = ON")

    async with db.connect(engine):
        await db.create_all(Base.metadata)
        async with db.begin() as unit:
            unit.session.add(Shelf(id=1))
            await unit.session.flush()
            await unit.session.execute(insert(Book).values(BOOK))
        yield db
    await engine.dispose()


@pytest.mark.parametrize("constraint", VIOLATIONS)
async def test_constraint(db: SessionProxy[AsyncSession], constraint: str | None) -> None:
    """The name is that of the table's definition, whatever the values are; NOT NULL has none."""
    async with db() as unit:
        with pytest.raises(DBAPIError) as refused:
            await unit.session.execute(insert(Book).values(BOOK | VIOLATIONS[constraint]))
        named = db.engine.dialect.name != "sqlite" or constraint in ON_SQLITE
        assert violated_constraint(refused.value) == (constraint if named else None)


async def test_constraint_of_a_cause(db: SessionProxy[AsyncSession]) -> None:
    """An error that has the database's as its cause is about the same constraint."""
    book = BOOK | VIOLATIONS["some_pages"]
    with pytest.raises(UnexpectedRollbackError) as refused:  # noqa: PT012  # the block raises at its end
        async with db.begin() as unit:
            unit.session.add(Book(**book))
            with pytest.raises(DBAPIError):
                await unit.session.flush()
    assert violated_constraint(refused.value) == "some_pages"


async def test_other_errors(db: SessionProxy[AsyncSession]) -> None:
    """Whatever is no violation has no constraint."""
    assert violated_constraint(ValueError("for key 'x'")) is None
    async with db() as unit:
        with pytest.raises(DBAPIError) as refused:
            await unit.session.execute(text("SELECT nothing FROM nowhere"))
        assert violated_constraint(refused.value) is None
