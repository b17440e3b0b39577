"""Chromium without a window, which may speak to this machine only."""

import os
import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
from playwright.async_api import Browser, async_playwright, expect

ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run", "--disable-dev-shm-usage"),  # a container's /dev/shm is small
)


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
"""The programs that will do, as in .ci/run."""


def chromium_path() -> str:
    """Return where Chromium is; without it the test is skipped, but not where CI is set."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        reason = f"none of {', '.join(BROWSERS)} is on the PATH"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@asynccontextmanager
async def open_browser() -> AsyncGenerator[Browser]:
    """Start Chromium, and end it with the block."""
    path = chromium_path()
    expect.set_options(timeout=30_000)  # a machine at work; nothing that is true waits for it
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=[*ARGUMENTS])
        try:
            yield browser
        finally:
            await browser.close()
