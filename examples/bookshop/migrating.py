"""Migrations from Python: `python -m examples.bookshop.migrating` upgrades both databases to their heads."""

import sys
from pathlib import Path
from typing import Literal

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import URL

from examples.bookshop.settings import Settings, SettingsError

Database = Literal["shop", "reporting"]
INI = Path(__file__).parent / "migrations/alembic.ini"


def config_of(database: Database, url: URL | None = None) -> Config:
    """Return Alembic's configuration for a database, with this URL or the one in the environment."""
    config = Config(INI, ini_section=database)
    config.attributes["url"] = url
    return config


def head(database: Database) -> str | None:
    """Return the revision that this code was written for."""
    return ScriptDirectory.from_config(config_of(database)).get_current_head()


def upgrade(settings: Settings) -> None:
    """Upgrade both databases to their heads; this runs a separate event loop."""
    command.upgrade(config_of("shop", settings.shop_url), "head")
    command.upgrade(config_of("reporting", settings.reporting_url), "head")


if __name__ == "__main__":
    try:
        upgrade(Settings.from_environment())
    except SettingsError as error:
        sys.exit(str(error))
