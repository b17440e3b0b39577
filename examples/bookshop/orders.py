"""The services of the shop: they take a unit or a session, and do not depend on HTTP."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import selectinload

from examples.bookshop.databases import ReadingSession, ShopSession, shop
from examples.bookshop.models import Book, Isbn, Kind, Message, Order, OrderId, OrderLine
from fastapi_async_sqlalchemy import UnitOfWork

TO_DO: tuple[Kind, ...] = ("confirmation", "sale")
"""The messages for each order; they are separate, so that a failure of one does not delay the other."""

Wake = Callable[[], Awaitable[None]]
"""Notifies the workers of messages in the outbox."""


class UnknownBookError(Exception):
    """The title does not exist."""


class SoldOutError(Exception):
    """Fewer copies are left than were ordered."""


class KeyReusedError(Exception):
    """The idempotency key belongs to a different order."""


async def catalogue(session: ReadingSession, after: Isbn, limit: int) -> Sequence[Book]:
    """Return a page of titles that follow an ISBN."""
    page = select(Book).where(Book.isbn > after).order_by(Book.isbn).limit(limit)
    return (await session.scalars(page)).all()


async def find_order(session: ReadingSession, number: OrderId) -> Order | None:
    """Return an order and its lines."""
    return await session.get(Order, number, options=[selectinload(Order.lines)])


async def place_order(
    unit: UnitOfWork[ShopSession], key: UUID, customer: str, copies: Mapping[Isbn, int]
) -> Order:
    """Place an order, or return the existing order with this key."""
    session = unit.session
    before = select(Order).where(Order.customer == customer, Order.idempotency_key == key)
    placed = await session.scalar(before.options(selectinload(Order.lines)))
    if placed is not None:
        if {line.isbn: line.quantity for line in placed.lines} != copies:
            message = f"the Idempotency-Key {key} has placed another order"
            raise KeyReusedError(message)
        return placed
    order = Order(customer=customer, idempotency_key=key)
    books = {book.isbn: book for book in await session.scalars(select(Book).where(Book.isbn.in_(copies)))}
    for isbn, quantity in copies.items():
        if (book := books.get(isbn)) is None:
            message = f"there is no book {isbn}"
            raise UnknownBookError(message)
        if book.stock < quantity:
            message = f"{book.stock} copies of {isbn} are left, and {quantity} were ordered"
            raise SoldOutError(message)
        book.stock -= quantity
        order.lines.append(OrderLine(isbn=isbn, quantity=quantity, cents=book.cents))
    session.add(order)
    await session.flush()
    session.add_all(Message(kind=kind, order_id=order.id) for kind in TO_DO)
    return order


@shop.transactional(propagation="requires_new", isolation_level="REPEATABLE READ", retries=9)
async def buy(key: UUID, customer: str, copies: Mapping[Isbn, int], wake: Wake) -> Order:
    """Place an order in a separate transaction; retry if another one changed the stock meanwhile."""
    order = await place_order(shop.unit, key, customer, copies)
    shop.unit.on_commit(wake)
    return order
