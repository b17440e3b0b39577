"""The outbox: messages are committed together with an order, delivered as soon as possible, and deleted."""

import logging
from collections.abc import Awaitable, Callable
from datetime import timedelta

from sqlalchemy import func, select, update
from sqlalchemy.orm import selectinload

from examples.bookshop.databases import ShopSession, shop
from examples.bookshop.models import Message, MessageId, Order, OrderLine
from fastapi_async_sqlalchemy import UnitOfWork

LONGEST_PAUSE = 12
"""Pauses between attempts are powers of two, in seconds; this is the highest power, about an hour."""

logger = logging.getLogger(__name__)

Deliver = Callable[[Message, Order], Awaitable[None]]
"""Does the work for a message. It must tolerate being called again for the same message."""


async def drain(deliver: Deliver) -> int:
    """Deliver all messages that are due, one transaction each; return how many were taken."""
    taken = 0
    while await deliver_one(deliver):
        taken += 1
    return taken


async def deliver_one(deliver: Deliver) -> bool:
    """Deliver the first message that is due and that no other worker holds; return False if there is none.

    The row's lock lasts as long as the transaction. A worker that is killed loses both, and another one can
    take the message.
    """
    number: MessageId | None = None
    try:
        async with shop.begin() as unit:
            message = await claim(unit)
            if message is None:
                return False
            number = message.id
            await deliver(message, await order_of(unit, message))
            await unit.session.delete(message)
    except Exception as error:
        if number is None:
            raise
        logger.warning("Message %s was not delivered", number, exc_info=error)
        await postpone(number, error)
    return True


async def claim(unit: UnitOfWork[ShopSession]) -> Message | None:
    """Lock the first message that is due; skip messages that other workers have locked."""
    due = select(Message).where(Message.due_at <= func.now()).order_by(Message.due_at, Message.id)
    message: Message | None = await unit.session.scalar(due.limit(1).with_for_update(skip_locked=True))
    return message


async def order_of(unit: UnitOfWork[ShopSession], message: Message) -> Order:
    """Load the order of a message, with its lines and their titles."""
    lines = selectinload(Order.lines).selectinload(OrderLine.book)
    return await unit.session.get_one(Order, message.order_id, options=[lines])


@shop.transactional
async def postpone(number: MessageId, error: Exception) -> None:
    """Postpone a failed message, longer each time; the admin shows the error."""
    pause = func.power(2, func.least(Message.attempts + 1, LONGEST_PAUSE))
    await shop.session.execute(
        update(Message)
        .where(Message.id == number)
        .values(
            attempts=Message.attempts + 1,
            due_at=func.now() + pause * timedelta(seconds=1),
            last_error=f"{type(error).__name__}: {error}",
        )
    )
