"""The routes: they validate the request, call a service, and return its result."""

from collections.abc import AsyncGenerator, Sequence
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Header, HTTPException, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import func, select

from examples.bookshop.databases import ReadingSession, Reporting, ShopUnit, replica, shop
from examples.bookshop.models import Book, Isbn, Order, OrderId, Sale
from examples.bookshop.orders import Wake, buy, catalogue, find_order
from fastapi_async_sqlalchemy import WalPosition

router = APIRouter()

IsbnText = Annotated[Isbn, Field(pattern=r"^[0-9]{13}$")]
Customer = Annotated[str, Field(pattern=r"^[A-Za-z0-9._+-]+@[A-Za-z0-9.-]+$", max_length=254)]
"""An address that goes into a mail's header as it is: nothing there is a list, a comment or an encoding."""
Count = Annotated[int, Field(ge=0, lt=2**31)]
"""What an INTEGER of the database holds; BIGINT goes on to 2**63."""
FIRST = Isbn("0" * 13)
Copies = Annotated[dict[IsbnText, Annotated[int, Field(gt=0, le=100)]], Field(min_length=1, max_length=50)]


class Answer(BaseModel):
    """A response that is read from an object's attributes."""

    model_config = ConfigDict(from_attributes=True)


class BookData(Answer):
    """A title in the catalogue, or a new one."""

    isbn: IsbnText
    title: Annotated[str, Field(pattern="^[^\0]+$", max_length=200)]
    cents: Annotated[Count, Field(gt=0)]
    stock: Count


class NewOrder(BaseModel):
    """A customer's order: how many copies of which titles."""

    customer: Customer
    copies: Copies


class LineData(Answer):
    """A line of an order."""

    isbn: Isbn
    quantity: int
    cents: int


class OrderData(Answer):
    """An order as its customer sees it."""

    id: OrderId
    lines: list[LineData]


class TitleSales(BaseModel):
    """How many copies of a title were sold, and for how much."""

    title: str
    copies: int
    cents: int


Position = Annotated[str | None, Header(alias="X-Position", pattern=r"^[0-9A-F]{1,8}/[0-9A-F]{1,8}$")]


async def reading(position: Position = None) -> AsyncGenerator[ReadingSession]:
    """Read from the replica, or from the primary if the replica lags behind the client's position."""
    unit = replica() if position is None else replica.after(WalPosition(position), timeout=0.5, fallback=shop)
    async with unit as opened:
        yield opened.session


async def waking(request: Request) -> Wake:
    """Return the function that notifies the workers of new messages."""
    wake: Wake = request.app.state.wake
    return wake


Reading = Annotated[ReadingSession, Depends(reading, scope="function")]
"""With this scope the unit ends, and its connection is returned, before the response is sent."""


@router.get("/books", response_model=list[BookData])
async def read_books(
    session: Reading, after: IsbnText = FIRST, limit: Annotated[int, Query(gt=0, le=100)] = 50
) -> Sequence[Book]:
    """Return a page of the catalogue; pass its last ISBN to get the next one."""
    return await catalogue(session, after, limit)


@router.post("/books", status_code=201)
async def add_book(book: BookData, unit: ShopUnit) -> None:
    """Add a title, which is committed when the response starts."""
    unit.session.add(Book(**book.model_dump()))


@router.post("/orders", status_code=201, response_model=OrderData)
async def post_order(
    order: NewOrder,
    key: Annotated[UUID, Header(alias="Idempotency-Key")],
    wake: Annotated[Wake, Depends(waking)],
    response: Response,
) -> Order:
    """Place an order only once, even if the request is repeated; X-Position lets any replica serve it."""
    placed = await buy(key, order.customer, order.copies, wake)
    response.headers["X-Position"] = await shop.commit_position()
    return placed


@router.get("/orders/{number}", response_model=OrderData)
async def read_order(number: Annotated[OrderId, Path(lt=2**63)], session: Reading) -> Order:
    """Return an order."""
    order = await find_order(session, number)
    if order is None:
        raise HTTPException(404, "there is no such order")
    return order


@router.get("/reports/sales")
async def read_sales(session: Reporting) -> list[TitleSales]:
    """Return the sales of each title, best first; the worker brings new orders within seconds."""
    copies, cents = func.sum(Sale.quantity), func.sum(Sale.quantity * Sale.cents)
    rows = await session.execute(
        select(Sale.title, copies, cents).group_by(Sale.title).order_by(copies.desc())
    )
    return [TitleSales(title=title, copies=sold, cents=earned) for title, sold, earned in rows]
