"""The migrations of the bookshop, up and down; and its settings, which say what is wrong with them."""

import asyncio
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import URL

pytest.importorskip("alembic", reason="requirements/guides.in is not in the lowest row")

from alembic import command

from examples.bookshop.migrating import Database, config_of, head
from examples.bookshop.settings import Settings, SettingsError
from tests.support.bookshop import ROOT, environment, migrated
from tests.support.databases import Judge

TABLES = "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY tablename"
LOCK = "hashtext('bookshop migrations')"
SHOP = ["alembic_version", "book", "order_line", "orders", "outbox"]


@pytest.fixture
def settings(postgresql_server: URL, tmp_path: Path) -> Iterator[Settings]:
    """The settings of a shop that is there."""
    with migrated(postgresql_server, tmp_path) as settings:
        yield settings


def ask(url: URL, sql: str) -> list[object]:
    """Return the first column; a statement is committed at once."""

    async def asking() -> list[object]:
        async with Judge(url) as judge:
            return [row[0] for row in await judge.rows(sql)]

    return asyncio.run(asking())


@pytest.mark.parametrize("database", ["shop", "reporting"])
def test_models_and_migrations_agree(settings: Settings, database: Database) -> None:
    """Alembic finds nothing that a further migration would have to do."""
    url = {"shop": settings.shop_url, "reporting": settings.reporting_url}[database]
    command.check(config_of(database, url))


def test_up_and_down(settings: Settings) -> None:
    """Each database has its own tables; each step down takes its tables, and up again they are back."""
    assert ask(settings.shop_url, TABLES) == SHOP
    assert ask(settings.reporting_url, TABLES) == ["alembic_version", "sale"]
    config = config_of("shop", settings.shop_url)
    command.downgrade(config, "-1")
    assert ask(settings.shop_url, TABLES) == [name for name in SHOP if name != "outbox"]
    command.downgrade(config, "base")
    assert ask(settings.shop_url, TABLES) == ["alembic_version"]
    command.upgrade(config, "head")
    assert ask(settings.shop_url, TABLES) == SHOP
    assert ask(settings.shop_url, "SELECT version_num FROM alembic_version") == [head("shop")]


def test_outbox_with_messages_is_not_dropped(settings: Settings) -> None:
    """A step down that would lose a confirmation is refused, and changes nothing."""
    placed = "INSERT INTO orders (customer, idempotency_key) VALUES ('ann', gen_random_uuid()) RETURNING id"
    ask(settings.shop_url, placed)
    ask(settings.shop_url, "INSERT INTO outbox (kind, order_id) SELECT 'sale', id FROM orders RETURNING id")
    with pytest.raises(RuntimeError, match="the outbox has 1 messages"):
        command.downgrade(config_of("shop", settings.shop_url), "-1")
    assert ask(settings.shop_url, TABLES) == SHOP


async def migrate_at_once(settings: Settings) -> list[int]:
    """Start two programs that migrate, have both wait for the lock, and return how they ended."""
    async with Judge(settings.shop_url) as judge:
        await judge.execute(f"SELECT pg_advisory_lock({LOCK})")
        programs = [
            await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "examples.bookshop.migrating"),
                cwd=ROOT,
                env={**os.environ, **environment(settings)},
            )
            for _ in range(2)
        ]
        while await judge.scalar("SELECT count(*) FROM pg_locks WHERE NOT granted") != 2:
            assert [program.returncode for program in programs] == [None, None]
        await judge.execute(f"SELECT pg_advisory_unlock({LOCK})")
        return [await program.wait() for program in programs]


def test_migrations_wait_for_each_other(settings: Settings) -> None:
    """Two processes of a deployment migrate at once: one waits for the other, and finds all done."""
    command.downgrade(config_of("shop", settings.shop_url), "base")
    assert asyncio.run(migrate_at_once(settings)) == [0, 0]
    assert ask(settings.shop_url, TABLES) == SHOP


def test_sql_can_be_read_first(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    """`--sql` writes what an upgrade would send, without a database."""
    command.upgrade(config_of("shop", settings.shop_url), "head", sql=True)
    assert "CREATE TABLE outbox" in capsys.readouterr().out


def test_settings_come_from_the_environment(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of the process are read, and no repr() shows a password."""
    variables = {
        **environment(settings),
        "BOOKSHOP_SHOP_URL": "postgresql+asyncpg://app:secret@localhost/shop",
        "BOOKSHOP_TELEMETRY": "on",
        "BOOKSHOP_ADMIN_PASSWORD": "secret, and long enough",
        "BOOKSHOP_ADMIN_SECRET": "secret, and long enough",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    read = Settings.from_environment()
    assert read.shop_url.password == "secret"  # noqa: S105  # as the line above has it
    assert (read.telemetry, read.replica_url, read.sweep_seconds) == (True, None, 600)
    assert "secret, and" not in repr(read)
    assert ":secret@" not in repr(read)


def test_settings_that_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """All missing and invalid values and misspelt names are reported at once, without a password."""
    variables = {
        "BOOKSHOP_SHOP_URL": "mysql://app:secret@localhost/shop",
        "BOOKSHOP_REDIS_URL": "localhost",
        "BOOKSHOP_MAIL_FOLDER": "/var/spool/bookshop",
        "BOOKSHOP_POOL_SIZE": "0",
        "BOOKSHOP_SWEEP_SECONDS": "soon",
        "BOOKSHOP_ADMIN_PASSWORD": "secret",
        "BOOKSHOP_REPLICA": "secret",
        "bookshop_colour": "secret",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as raised:
        Settings.from_environment()
    lines = dict(line.split(": ", 1) for line in str(raised.value).splitlines())
    assert lines == {
        "BOOKSHOP_SHOP_URL": "Value error, it must begin with postgresql+asyncpg://",
        "BOOKSHOP_REPORTING_URL": "Field required",
        "BOOKSHOP_REDIS_URL": "String should match pattern '^rediss?://'",
        "BOOKSHOP_POOL_SIZE": "Input should be greater than 0",
        "BOOKSHOP_SWEEP_SECONDS": "Input should be a valid integer, unable to parse string as an integer",
        "BOOKSHOP_ADMIN_PASSWORD": "Value should have at least 16 items after validation, not 6",
        "BOOKSHOP_REPLICA": "there is no such setting; did you mean BOOKSHOP_REPLICA_URL?",
        "bookshop_colour": "there is no such setting",
    }


def test_name_that_is_wrong(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt name is an error even if all values are right, and names of other programs are not."""
    for name, value in {**environment(settings), "BOOKSHOPS": "2"}.items():
        monkeypatch.setenv(name, value)
    assert Settings.from_environment().pool_size == 10
    monkeypatch.setenv("BOOKSHOP_POOLSIZE", "20")
    with pytest.raises(SettingsError, match=r"^BOOKSHOP_POOLSIZE: .*did you mean BOOKSHOP_POOL_SIZE"):
        Settings.from_environment()
