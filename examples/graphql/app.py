"""A library served by Strawberry: each resolver of a query has a unit, each mutation one transaction."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import strawberry
from fastapi import FastAPI
from graphql import ExecutionResult, GraphQLError
from sqlalchemy import ForeignKey, String, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from strawberry.dataloader import DataLoader
from strawberry.extensions import MaskErrors, SchemaExtension
from strawberry.fastapi import BaseContext, GraphQLRouter
from strawberry.types.graphql import OperationType

from fastapi_async_sqlalchemy import Propagation, SQLAlchemyMiddleware, db, violated_constraint


class Base(DeclarativeBase):
    """The tables of the library."""


class AuthorRow(Base):
    """An author."""

    __tablename__ = "author"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50), unique=True)


class BookRow(Base):
    """A book; the database checks at COMMIT that its author exists."""

    __tablename__ = "book"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(50), unique=True)
    author_id: Mapped[int] = mapped_column(ForeignKey("author.id", deferrable=True, initially="DEFERRED"))


P = ParamSpec("P")
R = TypeVar("R")

propagation: ContextVar[Propagation] = ContextVar("propagation", default="requires_new")
"""A query's resolver opens a unit; a mutation's resolver joins the mutation's unit and sees its writes."""


def in_unit(resolver: Callable[P, Awaitable[R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    """Run a resolver in a unit, which ends before the fields of its result are resolved."""

    @wraps(resolver)
    async def resolve(*args: P.args, **kwargs: P.kwargs) -> R:
        async with db(propagation=propagation.get()):
            return await resolver(*args, **kwargs)

    return resolve


class OneTransaction(SchemaExtension):
    """Commit a mutation as a whole before its response, or store nothing if it has an error."""

    async def on_execute(self) -> AsyncGenerator[None]:
        """Open a unit around a mutation."""
        if self.execution_context.operation_type is not OperationType.MUTATION:
            yield
            return
        async with db() as unit:
            token = propagation.set("required")
            yield
            propagation.reset(token)
            result = self.execution_context.result
            if not isinstance(result, ExecutionResult) or result.errors:
                await unit.rollback()
                if isinstance(result, ExecutionResult):
                    result.data = None  # none of it is stored
                return
            try:
                await unit.commit()
            except IntegrityError as error:
                message = f"violates {violated_constraint(error) or 'a constraint'}"
                raise GraphQLError(message) from error


async def books_of(authors: Sequence[int]) -> list[list["Book"]]:
    """Return the books of each author with one statement."""
    async with db(propagation=propagation.get()) as unit:
        rows = await unit.session.scalars(
            select(BookRow).where(BookRow.author_id.in_(authors)).order_by(BookRow.id)
        )
    found: dict[int, list[Book]] = {author: [] for author in authors}
    for row in rows:
        found[row.author_id].append(Book.of(row))
    return [found[author] for author in authors]


class Context(BaseContext):
    """Objects that the resolvers of one operation share."""

    def __init__(self) -> None:
        super().__init__()
        self.books = DataLoader(load_fn=books_of)


Info = strawberry.Info[Context, None]


@strawberry.type
class Book:
    """A book."""

    id: int
    title: str

    @classmethod
    def of(cls, row: BookRow) -> "Book":
        """Create a book from its row."""
        return cls(id=row.id, title=row.title)


@strawberry.type
class Author:
    """An author."""

    id: int
    name: str

    @strawberry.field
    async def books(self, info: Info) -> list[Book]:
        """The author's books."""
        return await info.context.books.load(self.id)

    @strawberry.field
    @in_unit
    async def namesakes(self) -> int:
        """The number of other authors whose name begins with the same letter."""
        begin_alike = AuthorRow.name.startswith(self.name[0]) & (AuthorRow.id != self.id)
        return await db.session.scalar(select(func.count(AuthorRow.id)).where(begin_alike)) or 0


@strawberry.type
class Query:
    """The queries."""

    @strawberry.field
    @in_unit
    async def authors(self) -> list[Author]:
        """All authors."""
        rows = await db.session.scalars(select(AuthorRow).order_by(AuthorRow.id))
        return [Author(id=row.id, name=row.name) for row in rows]

    @strawberry.field
    @in_unit
    async def count(self) -> int:
        """The number of books."""
        return await db.session.scalar(select(func.count(BookRow.id))) or 0


@strawberry.type
class Mutation:
    """The mutations."""

    @strawberry.mutation
    async def add_author(self, name: str) -> Author:
        """Add an author."""
        row = AuthorRow(name=name)
        db.session.add(row)
        await db.session.flush()
        return Author(id=row.id, name=name)

    @strawberry.mutation
    async def add_book(self, title: str, author: int) -> Book:
        """Add a book."""
        row = BookRow(title=title, author_id=author)
        db.session.add(row)
        await db.session.flush()
        return Book.of(row)


@strawberry.type
class Subscription:
    """The subscriptions."""

    @strawberry.subscription
    async def books(self, author: int, interval: float = 1.0) -> AsyncGenerator[list[Book]]:
        """Send an author's books, now and whenever they change.

        This sends a state and not a log: ids are not assigned in the order of COMMITs, so "all books with a
        higher id" would miss some.
        """
        sent: list[Book] | None = None
        query = select(BookRow).where(BookRow.author_id == author).order_by(BookRow.id)
        while True:
            async with db(read_only=True) as unit:  # a unit for each query, so none is open during the wait
                books = [Book.of(row) for row in await unit.session.scalars(query)]
            if books != sent:
                sent = books
                yield books
            await asyncio.sleep(interval)


def unexpected(error: GraphQLError) -> bool:
    """Return whether to hide an error: the text of a database error has a statement and its values."""
    return error.original_error is not None and not isinstance(error.original_error, GraphQLError)


schema = strawberry.Schema(
    Query,
    Mutation,
    Subscription,
    extensions=[OneTransaction, lambda: MaskErrors(should_mask_error=unexpected)],
)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    """Create the tables of the example."""
    await db.create_all(Base.metadata)
    yield


def create_app(db_url: str) -> FastAPI:
    """Create the application for one database."""
    app = FastAPI(lifespan=lifespan)
    app.add_middleware(SQLAlchemyMiddleware, db_url=db_url, concurrent_use="wait")
    router: GraphQLRouter[Context, None] = GraphQLRouter(schema, context_getter=Context)
    app.include_router(router, prefix="/graphql")
    return app
