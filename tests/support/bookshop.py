"""What the tests of the bookshop start: its databases, migrated, and its worker."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from uuid import UUID, uuid4

from httpx2 import AsyncClient, Response
from pydantic import SecretStr
from sqlalchemy import URL, make_url

from examples.bookshop.__main__ import WORKER
from examples.bookshop.databases import shop
from examples.bookshop.migrating import upgrade
from examples.bookshop.models import Book, Isbn
from examples.bookshop.settings import PREFIX, Settings
from tests.support.databases import fresh_database

ROOT = Path(__file__).parent.parent.parent
ISBN, OTHER = Isbn("9780141439518"), Isbn("9780141439600")
PATIENCE = 30
"""Seconds that a worker has to do as told; it imports much before it begins."""


@contextmanager
def migrated(server: URL, mail_folder: Path, redis_url: str = "redis://127.0.0.1:1") -> Generator[Settings]:
    """Make both databases, migrate them, and yield the settings of a shop that is there."""
    with fresh_database(server) as shop_url, fresh_database(server) as reporting_url:
        settings = Settings(
            shop_url=make_url(shop_url),
            reporting_url=make_url(reporting_url),
            redis_url=redis_url,
            mail_folder=mail_folder,
            admin_password=SecretStr("a password for tests"),
            admin_secret=SecretStr("a secret for the tests"),
            admin_https=False,
            sweep_seconds=600,
        )
        upgrade(settings)
        yield settings


async def fill(stock: int) -> None:
    """Have two titles, and so many copies of each; a unit of the application's own pair adds them."""
    async with shop() as unit:
        unit.session.add(Book(isbn=ISBN, title="Pride and Prejudice", cents=799, stock=stock))
        unit.session.add(Book(isbn=OTHER, title="A Tale of Two Cities", cents=899, stock=stock))


async def order(
    client: AsyncClient,
    copies: dict[Isbn, int],
    *,
    key: UUID | None = None,
    customer: str = "ann@example.com",
) -> Response:
    """Order by a key, or by a new one."""
    return await client.post(
        "/orders",
        json={"customer": customer, "copies": copies},
        headers={"Idempotency-Key": str(key or uuid4())},
    )


async def stock_of(client: AsyncClient, isbn: Isbn) -> int:
    """Read from the catalogue how many copies are left."""
    books = (await client.get("/books")).json()
    [left] = [book["stock"] for book in books if book["isbn"] == isbn]
    return int(left)


def environment(settings: Settings) -> dict[str, str]:
    """Return the variables that have a process read these settings."""
    values = {
        "SHOP_URL": settings.shop_url.render_as_string(hide_password=False),
        "REPORTING_URL": settings.reporting_url.render_as_string(hide_password=False),
        "REDIS_URL": settings.redis_url,
        "MAIL_FOLDER": str(settings.mail_folder),
        "SWEEP_SECONDS": str(settings.sweep_seconds),
    }
    return {PREFIX + name: value for name, value in values.items()}


@asynccontextmanager
async def worker(settings: Settings) -> AsyncGenerator[asyncio.subprocess.Process]:
    """Start a worker as the program does, in a process group of its own; on exit it is gone."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *WORKER),
        cwd=ROOT,
        env={**os.environ, **environment(settings)},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
