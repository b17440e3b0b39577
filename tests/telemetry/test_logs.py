"""Log records: each has the same fields, and they hold no password and no values."""

import asyncio
import logging
from configparser import ConfigParser
from logging.config import fileConfig

import pytest
from sqlalchemy import Connection, event, insert
from starlette.responses import Response

from fastapi_async_sqlalchemy._telemetry.logs import fields
from tests.support.hooks import BoomError
from tests.support.site import MakeSite, Site
from tests.support.tables import Note
from tests.support.versions import survives_cancellation

FIELDS = ("database", "unit", "request", "outcome", "statements")


def facts(record: logging.LogRecord) -> dict[str, object]:
    """Return the fields of a record; each has all of them."""
    return {name: getattr(record, name) for name in FIELDS}


def ours(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    """Return the fields of the package's records, from WARNING on."""
    return [facts(record) for record in caplog.records if record.name == "fastapi_async_sqlalchemy"]


async def test_discarded_writes(
    database_url: str, make_site: MakeSite, caplog: pytest.LogCaptureFixture
) -> None:
    """The WARNING of discarded writes says which request, which unit, and how many statements."""
    site = await make_site(database_url)
    numbers: list[int] = []

    @site.app.post("/notes")
    async def route() -> None:
        await site.db.session.execute(insert(Note).values(text="secret"))
        numbers.append(site.db.session.sync_session.hash_key)

    async with site.client() as client:
        await client.post("/notes?token=secret")
    [record] = ours(caplog)
    assert str(record.pop("database")).startswith("AsyncSession (")
    assert record == {
        "unit": numbers[0],
        "request": "POST /notes",
        "outcome": "rolled back",
        "statements": 1,
    }
    assert "secret" not in caplog.text
    assert "secret" not in str(record)


async def test_failed_hook(worker: Site, caplog: pytest.LogCaptureFixture) -> None:
    """The record of a hook has its unit; outside a request there is none to name."""

    def fail() -> None:
        raise BoomError

    async with worker.db(commit_on_exit=True) as unit:
        unit.on_commit(fail)
        number = unit.session.sync_session.hash_key
    [record] = ours(caplog)
    assert (record["unit"], record["request"], record["outcome"]) == (number, None, None)


@survives_cancellation
async def test_unknown_outcome(worker: Site, caplog: pytest.LogCaptureFixture) -> None:
    """The ERROR of an interrupted COMMIT says so in its fields."""

    async def work() -> None:
        async with worker.db(commit_on_exit=True) as unit:
            await unit.session.execute(insert(Note).values(text="a"))

    task = asyncio.create_task(work())

    def cancel(_: Connection) -> None:
        task.cancel()

    event.listen(worker.engine.sync_engine, "commit", cancel, once=True)
    await asyncio.wait([task])
    [record] = ours(caplog)
    assert (record["outcome"], record["statements"]) == ("unknown", 1)
    assert isinstance(record["unit"], int)


async def test_record_in_a_background_task(
    sqlite_url: str, make_site: MakeSite, caplog: pytest.LogCaptureFixture
) -> None:
    """What a nested block loses is still the request's."""
    site = await make_site(sqlite_url)

    @site.app.get("/nested")
    async def route() -> Response:
        async with site.db():
            await site.db.session.execute(insert(Note).values(text="a"))
        return Response()

    await site.get("/nested")
    [record] = ours(caplog)
    assert record["request"] == "GET /nested"


def test_format_string_finds_every_field() -> None:
    """A formatter may name the fields, whatever the record is about."""
    record = logging.makeLogRecord({"msg": "text", **fields("orders")})
    formatted = logging.Formatter(" ".join(f"%({name})s" for name in FIELDS)).format(record)
    assert formatted == "orders None None None None"


ALEMBICS = """
[loggers]
keys = root
[handlers]
keys = console
[formatters]
keys =
[logger_root]
level = WARNING
handlers = console
[handler_console]
class = NullHandler
args = ()
"""
"""The parts of Alembic's stock configuration that `fileConfig()` reads, without its own loggers."""


@pytest.mark.parametrize("silenced", [True, False])
def test_file_config_may_silence_the_logger(*, silenced: bool) -> None:
    """By default Alembic's `env.py` disables the logger; by one argument it does not."""
    parser = ConfigParser()
    parser.read_string(ALEMBICS)
    root, logger = logging.getLogger(), logging.getLogger("fastapi_async_sqlalchemy")
    loggers = [one for one in logging.Logger.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    before, level, disabled = root.handlers[:], root.level, [one for one in loggers if one.disabled]
    try:
        fileConfig(parser, disable_existing_loggers=silenced)
        assert logger.disabled is silenced
    finally:
        root.handlers[:] = before
        root.setLevel(level)
        for one in loggers:
            one.disabled = one in disabled
