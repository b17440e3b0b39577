"""Run the whole shop: PostgreSQL, Redis, migrations, a worker and the web server; Ctrl-C stops them all.

It needs the development requirements, and a redis-server on the PATH. With --replica a standby serves the
reads. All data is temporary; README.md has the commands for a deployment.
"""

import argparse
import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import uvicorn

from examples.bookshop.app import from_environment
from examples.bookshop.databases import shop
from examples.bookshop.migrating import upgrade
from examples.bookshop.models import Book, Isbn
from examples.bookshop.settings import Settings, SettingsError
from examples.quickstart import listen
from tests.support.databases import Judge
from tests.support.redis import RedisMissingError, own_redis
from tests.support.replication import hot_standby, primary_server

BOOKS = (
    Book(isbn=Isbn("9780141439518"), title="Pride and Prejudice", cents=799, stock=100),
    Book(isbn=Isbn("9780141439600"), title="A Tale of Two Cities", cents=899, stock=1),
)
GUIDE = """
Open  {url}/docs
Open  {url}/admin  (any user name, and the password: {password})

examples/bookshop/README.md has commands to try. Confirmations are in {mail_folder}.
Ctrl-C ends the shop.
"""
WORKER = (
    *("-m", "taskiq", "worker", "examples.bookshop.worker:create_worker"),
    *("--workers", "1", "--max-async-tasks", "5"),
)


@contextmanager
def servers(folder: Path, *, with_replica: bool) -> Generator[dict[str, str]]:
    """Start the databases and Redis, and yield the environment variables for the programs."""
    with ExitStack() as exits:
        redis_url = exits.enter_context(own_redis())
        primary = exits.enter_context(primary_server())
        asyncio.run(create_databases(primary.url))
        shop_url = f"{primary.url.removesuffix('postgres')}shop"
        environment = {
            "BOOKSHOP_SHOP_URL": shop_url,
            "BOOKSHOP_REPORTING_URL": f"{primary.url.removesuffix('postgres')}reporting",
            "BOOKSHOP_REDIS_URL": redis_url,
            "BOOKSHOP_MAIL_FOLDER": str(folder / "mail"),
            "BOOKSHOP_ADMIN_HTTPS": "off",
            "BOOKSHOP_ADMIN_PASSWORD": "only on this machine",
            "BOOKSHOP_ADMIN_SECRET": os.urandom(16).hex(),
        }
        if with_replica:
            standby = exits.enter_context(hot_standby(primary))
            environment["BOOKSHOP_REPLICA_URL"] = f"{standby.url.removesuffix('postgres')}shop"
        yield environment


async def create_databases(url: str) -> None:
    """Create the two databases."""
    async with Judge(url) as server:
        await server.execute("CREATE DATABASE shop")
        await server.execute("CREATE DATABASE reporting")


async def stock(settings: Settings) -> None:
    """Add some books."""
    async with shop.connect(settings.shop_url), shop() as unit:
        unit.session.add_all(BOOKS)


@contextmanager
def worker() -> Generator[int]:
    """Run a worker, and yield its process id; on exit it finishes its current tasks."""
    process = subprocess.Popen(  # noqa: S603  # the command of README.md
        [sys.executable, *WORKER], start_new_session=True
    )
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    """Serve until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m examples.bookshop", description="Run the bookshop.")
    parser.add_argument("--replica", action="store_true", help="start a standby, and read from it")
    with_replica = parser.parse_args().replica
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt), TemporaryDirectory(prefix="bookshop-") as folder, ExitStack() as exits:
        try:
            environment = exits.enter_context(servers(Path(folder), with_replica=with_replica))
            os.environ.update(environment)
            settings = Settings.from_environment()
        except (RedisMissingError, SettingsError) as error:
            sys.exit(str(error))
        upgrade(settings)
        asyncio.run(stock(settings))
        exits.enter_context(worker())
        listener = exits.enter_context(listen(int(os.environ.get("PORT", "8000"))))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        password = environment["BOOKSHOP_ADMIN_PASSWORD"]
        print(GUIDE.format(url=url, password=password, mail_folder=settings.mail_folder), flush=True)
        config = uvicorn.Config(from_environment(), timeout_graceful_shutdown=10)
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
