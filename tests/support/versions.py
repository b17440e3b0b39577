"""What the installed SQLAlchemy can be held to."""

import re
from importlib.metadata import version

import pytest

_INSTALLED = version("sqlalchemy")
_RELEASE = tuple(int(part) for part in re.findall(r"\d+", _INSTALLED)[:3])

survives_cancellation = pytest.mark.skipif(
    _RELEASE < (2, 0, 58),
    reason=f"not promised on SQLAlchemy {_INSTALLED}: a plain session loses pooled connections there when "
    "cut off (on MariaDB and SQLite); 2.0.58 is the oldest release on which these tests were seen to pass",
)
"""For tests that cancel a task, or end a unit, in the middle of a statement."""

asyncpg_asks_server = [int(part) for part in version("asyncpg").split(".")[:2]] >= [0, 32]
"""Whether asyncpg's cursors look for a transaction at the server, not among its own."""

knows_aioodbc = _RELEASE >= (2, 0, 23)
"""Whether SQLAlchemy knows an asyncio driver that the tests do not install."""

sessions_have_options = pytest.mark.skipif(
    _RELEASE < (2, 1),
    reason=f"sessions have execution_options from SQLAlchemy 2.1 on; this is {_INSTALLED}",
)
options_after_a_savepoint = pytest.mark.skipif(
    _RELEASE < (2, 1),
    reason=f"connection() takes options after begin_nested() from SQLAlchemy 2.1 on; this is {_INSTALLED}",
)


def require_settings_of_derived_engines() -> None:
    """Skip a test where an engine that is derived from a derived one takes no listener."""
    if _RELEASE < (2, 0, 58):
        pytest.skip(f"SQLAlchemy {_INSTALLED} has no events for an engine derived twice; 2.0.58 was seen to")
