"""The migrations of the bookshop, up and down; and its settings, which say what is wrong with them."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import URL, make_url

pytest.importorskip("alembic", reason="requirements/guides.in is not in the lowest row")

from alembic import command

from examples.bookshop.databases import shop
from examples.bookshop.migrating import Database, config_of, head, upgrade
from examples.bookshop.settings import Settings, SettingsError
from tests.support.bookshop import environment, fill, migrated
from tests.support.databases import Judge

TABLES = "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public' ORDER BY 1"


@pytest.fixture
def settings(postgresql_server: URL, tmp_path: Path) -> Iterator[Settings]:
    """The settings of a shop that is there."""
    with migrated(postgresql_server, tmp_path) as settings:
        yield settings


@pytest.mark.parametrize("database", ["shop", "reporting"])
def test_models_and_migrations_agree(settings: Settings, database: Database) -> None:
    """Alembic finds nothing that a further migration would have to do."""
    url = {"shop": settings.shop_url, "reporting": settings.reporting_url}[database]
    command.check(config_of(database, url))
