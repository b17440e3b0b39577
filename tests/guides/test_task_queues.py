"""The guide to task queues is true: its workers run, and are killed at the worst moments."""

import pytest

REASON = "requirements/guides.in is not in the lowest row"
pytest.importorskip("taskiq", reason=REASON)

import asyncio
