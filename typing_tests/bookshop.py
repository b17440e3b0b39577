"""The services of the bookshop refuse the sessions of other databases; both checkers must say so.

This file is never run. A line that must be refused carries the code of each checker's error; it is an error
where a checker accepts the line.
"""

from uuid import UUID

from examples.bookshop.databases import replica, reporting, shop
from examples.bookshop.models import Book, Isbn, OrderId, Sale
from examples.bookshop.orders import catalogue, find_order, place_order


async def accepted(key: UUID, isbn: Isbn) -> None:
    """Reading services take either session of the shop; writing ones take the primary's unit."""
    async with shop() as unit, replica() as reading, reporting() as reports:
        await catalogue(unit.session, isbn, 50)
        await catalogue(reading.session, isbn, 50)
        await place_order(unit, key, "ann@example.com", {isbn: 1})
        await unit.session.get(Book, isbn)
        await reports.session.get(Sale, (OrderId(1), isbn))


async def refused(key: UUID, isbn: Isbn) -> None:
    """The reporting session is none of the shop's, the replica's unit writes nothing, and text is no key."""
    async with shop() as unit, replica() as reading, reporting() as reports:
        await catalogue(reports.session, isbn, 50)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        await place_order(reports, key, "ann@example.com", {})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        await place_order(reading, key, "ann@example.com", {})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        await place_order(unit, key, "ann@example.com", {"9780141439518": 1})  # type: ignore[dict-item]  # pyright: ignore[reportArgumentType]
        await find_order(unit.session, 1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        await reports.session.get(Book, "9780141439518")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        unit.session.add(Sale())  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
