"""The services of the bookshop refuse the sessions of other databases; both checkers must say so.

This file is never run: a line that is refused carries the code of each checker's error, and is an error itself
where it is not refused.
"""

from uuid import UUID

from examples.bookshop.databases import replica, reporting, shop
from examples.bookshop.models import Book, Isbn, OrderId, Sale
from examples.bookshop.orders import catalogue, find_order, place_order


async def accepted(key: UUID) -> None:
    """Reading services take either session of the shop; writing ones take the primary's unit."""
    async with shop() as unit, replica() as reading, reporting() as reports:
        await catalogue(unit.session)
        await catalogue(reading.session)
        await place_order(unit, key, "ann@example.com", {Isbn("9780141439518"): 1})
        await unit.session.get(Book, Isbn("9780141439518"))
        await reports.session.get(Sale, (OrderId(1), Isbn("9780141439518")))


async def refused(key: UUID) -> None:
    """The reporting session is none of the shop's, the replica's unit writes nothing, and text is no key."""
    async with shop() as unit, replica() as reading, reporting() as reports:
        await catalogue(reports.session)
        await place_order(reports, key, "ann@example.com", {})
        await place_order(reading, key, "ann@example.com", {})
        await place_order(unit, key, "ann@example.com", {"9780141439518": 1})
        await find_order(unit.session, 1)
        await reports.session.get(Book, "9780141439518")
        unit.session.add(Sale())
