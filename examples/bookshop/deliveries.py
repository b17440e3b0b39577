"""The worker's tasks for an order: a confirmation for the customer, and a copy for the reports."""

import asyncio
import os
from email.message import EmailMessage
from pathlib import Path

from attrs import frozen
from sqlalchemy.dialects.postgresql import insert

from examples.bookshop.databases import reporting
from examples.bookshop.models import Message, Order, Sale


@frozen
class Deliveries:
    """Delivers messages from the outbox; a repeated delivery has no second effect."""

    mail_folder: Path

    async def deliver(self, message: Message, order: Order) -> None:
        """Do the work for a message."""
        match message.kind:
            case "confirmation":
                await asyncio.to_thread(post, confirmation(order), self.mail_folder)
            case "sale":
                await report(order)


def confirmation(order: Order) -> EmailMessage:
    """Write the confirmation; its Message-ID depends on the order, so duplicates can be recognised."""
    mail = EmailMessage()
    mail["Message-ID"] = f"<order-{order.id}@bookshop.example>"
    mail["From"] = "orders@bookshop.example"
    mail["To"] = order.customer
    mail["Subject"] = f"Your order {order.id}"
    lines = [
        f"{line.quantity} x {line.book.title}: {line.quantity * line.cents / 100:.2f}" for line in order.lines
    ]
    mail.set_content("\n".join(["We have received your order:", *lines]))
    return mail


def post(mail: EmailMessage, folder: Path) -> None:
    """Write a mail atomically to the mail server's pickup folder, one file for each Message-ID."""
    folder.mkdir(parents=True, exist_ok=True)
    name = mail["Message-ID"].strip("<>").partition("@")[0]
    unfinished = folder / f".{name}.{os.getpid()}"
    unfinished.write_bytes(mail.as_bytes())
    unfinished.replace(folder / f"{name}.eml")


async def report(order: Order) -> None:
    """Copy an order to the reporting database, unless it is already there.

    This commits before the message is deleted. After a crash between the two it is called again, and
    changes nothing.
    """
    sales = [
        {
            "order_id": order.id,
            "isbn": line.isbn,
            "title": line.book.title,
            "quantity": line.quantity,
            "cents": line.cents,
            "sold_at": order.placed_at,
        }
        for line in order.lines
    ]
    async with reporting.begin() as unit:
        await unit.session.execute(insert(Sale).values(sales).on_conflict_do_nothing())
