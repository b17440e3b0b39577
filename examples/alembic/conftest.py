"""Fixtures for the tests of the shop: the databases are migrated once, before the first sandbox."""

import os

import pytest
from alembic import command
from alembic.config import Config
from fastapi import FastAPI
from sqlalchemy.ext.asyncio import AsyncSession

from examples.alembic.app import ALEMBIC_INI, audit, create_app, shop
from fastapi_async_sqlalchemy import SessionProxy


@pytest.fixture(scope="session")
def sandbox_template() -> str:
    """The shop's database with its tables; each pytest-xdist process copies it."""
    for database in ("shop", "audit"):
        command.upgrade(Config(ALEMBIC_INI, ini_section=database), "head")
    return os.environ["SHOP_URL"]


@pytest.fixture
def sandbox_app(sandbox_url: str) -> FastAPI:
    """The application on this process's database."""
    return create_app(sandbox_url, os.environ["AUDIT_URL"])


@pytest.fixture
def sandbox_databases() -> tuple[SessionProxy[AsyncSession], ...]:
    """Both databases; a test's writes to either are undone."""
    return shop, audit
