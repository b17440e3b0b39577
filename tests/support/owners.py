"""An owner with pets: rows with a version, stamps and relationships, and an application that reads them."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from sqlalchemy import ForeignKey, String, func, select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    WriteOnlyMapped,
    attribute_keyed_dict,
    mapped_column,
    relationship,
    selectinload,
)

from fastapi_async_sqlalchemy import create_middleware_and_session_proxy
from tests.support.databases import JudgeFor
from tests.support.site import Site


class Base(DeclarativeBase):
    """The metadata of the tables here."""


class Owner(Base):
    """A row with a version, a stamp that each UPDATE changes, and pets."""

    __tablename__ = "owner"
    id: Mapped[int] = mapped_column(primary_key=True)
    mail: Mapped[str] = mapped_column(String(100))
    attempts: Mapped[int]
    version: Mapped[int] = mapped_column()
    stamp: Mapped[str] = mapped_column(String(100), default="made", onupdate=func.lower("CHANGED"))
    local: Mapped[str] = mapped_column(String(100), default="made", onupdate=lambda: "changed")
    pets: Mapped[list["Pet"]] = relationship(back_populates="owner", cascade="all, delete-orphan")
    by_name: Mapped[dict[str, "Pet"]] = relationship(
        collection_class=attribute_keyed_dict("name"), viewonly=True
    )
    later: WriteOnlyMapped["Pet"] = relationship(overlaps="pets,owner", passive_deletes=True)
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012  # SQLAlchemy's own form


class Pet(Base):
    """A row that belongs to an owner."""

    __tablename__ = "pet"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    owner_id: Mapped[int | None] = mapped_column(ForeignKey("owner.id"))
    owner: Mapped[Owner | None] = relationship(back_populates="pets")


LOADED = {
    "id": 1,
    "mail": "mail",
    "attempts": 0,
    "version": 1,
    "stamp": "made",
    "local": "made",
    "pets": ["cat", "dog"],
    "by_name": ["cat", "dog"],
}


def values(owner: Owner) -> dict[str, object]:
    """Read all attributes, without a connection."""
    return {
        "id": owner.id,
        "mail": owner.mail,
        "attempts": owner.attempts,
        "version": owner.version,
        "stamp": owner.stamp,
        "local": owner.local,
        "pets": sorted(pet.name for pet in owner.pets),
        "by_name": sorted(owner.by_name),
    }


async def load(session: AsyncSession) -> Owner:
    """Load the owner, the pets and the pets' owner."""
    query = select(Owner).options(selectinload(Owner.pets), selectinload(Owner.by_name))
    return (await session.scalars(query)).one()


@asynccontextmanager
async def open_owners(url: str, judge_for: JudgeFor) -> AsyncGenerator[Site]:
    """Make an application whose database has an owner with two pets."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    engine = create_async_engine(url)
    app = FastAPI()
    app.add_middleware(middleware, custom_engine=engine, commit_on_exit=True)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with AsyncSession(engine) as session:
        session.add(Owner(mail="mail", attempts=0, pets=[Pet(name="cat"), Pet(name="dog")]))
        await session.commit()
    db.bind(engine)
    try:
        yield Site(app, db, engine, await judge_for(url))
    finally:
        await engine.dispose()
