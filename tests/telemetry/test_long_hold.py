"""A WARNING for a unit that holds its connection too long."""

import asyncio
import logging

import pytest
from sqlalchemy import select

from fastapi_async_sqlalchemy import ConfigurationError, LongHoldWarning
from tests.support.databases import JudgeFor
from tests.support.observing import open_observed
from tests.support.site import complaints
from tests.support.tables import Note


class Heard(logging.Handler):
    """Says when something is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.event = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        """Say so."""
        self.event.set()


@pytest.mark.parametrize("debug", [False, True])
async def test_long_hold(
    sqlite_url: str, judge_for: JudgeFor, caplog: pytest.LogCaptureFixture, *, debug: bool
) -> None:
    """The WARNING comes while the connection is held, once, and names the task; in debug mode much more."""
    asyncio.get_running_loop().set_debug(debug)
    logger, heard = logging.getLogger("fastapi_async_sqlalchemy"), Heard()
    logger.addHandler(heard)
    try:
        async with open_observed(sqlite_url, judge_for, LongHoldWarning(0.3)) as site, site.db() as unit:
            await unit.session.scalar(select(Note.text).where(Note.text == "secret"))
            await heard.event.wait()
            [complaint] = complaints(caplog)
    finally:
        logger.removeHandler(heard)
    task = asyncio.current_task()
    assert task
    assert f": task {task.get_name()!r} has held a connection for 0.3 seconds" in complaint
    assert ("test_long_hold.py:" in complaint) is debug
    assert ("last statement 'SELECT note.text" in complaint) is debug
    assert "secret" not in complaint
    [record] = [record for record in caplog.records if record.name == logger.name]
    assert vars(record)["statements"] == 1
    assert len(complaints(caplog)) == 1


async def test_short_hold(sqlite_url: str, judge_for: JudgeFor, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is logged of transactions that end in time, and no timer is left."""
    warning = LongHoldWarning(0.5)
    async with open_observed(sqlite_url, judge_for, warning) as site, site.db() as unit:
        for _ in range(2):
            await unit.session.scalar(select(Note.text))
            await unit.commit()
        late = asyncio.Event()
        asyncio.get_running_loop().call_later(0.7, late.set)
        await late.wait()
    assert complaints(caplog) == []


@pytest.mark.parametrize("wrong", [0, -1, "5", None])
def test_wrong_number_is_refused(wrong: float) -> None:
    """The seconds are a number above 0."""
    with pytest.raises(ConfigurationError, match="seconds must be a finite number above 0"):
        LongHoldWarning(wrong)
