"""What the installed SQLAlchemy can be held to."""

import re
from importlib.metadata import version

import pytest

_INSTALLED = version("sqlalchemy")
_RELEASE = tuple(int(part) for part in re.findall(r"\d+", _INSTALLED)[:3])

survives_cancellation = pytest.mark.skipif(
    _RELEASE < (2, 0, 58),
    reason=f"SQLAlchemy {_INSTALLED} itself loses pooled connections that are cut off; "
    "2.0.58, the oldest release that this was tried with, does not",
)
"""For tests that cancel a task, or end a unit, in the middle of a statement."""
