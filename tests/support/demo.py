"""The demo's page in a browser; `make demo-screenshot` writes docs/demo.png and docs/demo-dark.png by it."""

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from attrs import define, field
from playwright.async_api import Browser, Page, expect

from examples.demo.app import create_app
from tests.support.browser import open_browser
from tests.support.serving import serve

DOCS = Path(__file__).parents[2] / "docs"


@define
class DemoPage:
    """The page, and what it has asked for and complained of."""

    page: Page
    url: str
    requested: list[str] = field(factory=list[str])
    complaints: list[str] = field(factory=list[str])

    async def click(self, button: str, timelines: int = 1) -> None:
        """Press a button and wait for the timelines of its requests."""
        before = await self.page.locator("[data-number]").count()
        await self.page.click(f"#{button}")
        await expect(self.page.locator("[data-number]")).to_have_count(before + timelines)
        await expect(self.page.locator("[data-number] svg")).to_have_count(before + timelines)

    async def marks(self, position: int = 0) -> list[str]:
        """Return the marks of a timeline, from top to bottom; the first one is the newest."""
        timeline = self.page.locator("[data-number]").nth(position)
        drawn = timeline.locator("[data-mark]")
        return [(await drawn.nth(n).get_attribute("class") or "") for n in range(await drawn.count())]

    async def has_balances(self, *expected: int) -> None:
        """Wait until the page says so much of alice, bob and carol: it asks after each request."""
        shown = [re.compile(rf"^\s*{amount}\b") for amount in expected]
        await expect(self.page.locator(".accounts dd")).to_have_text(shown)


@asynccontextmanager
async def open_demo(
    browser: Browser, url: str, width: int = 1200, scheme: Literal["light", "dark"] = "light"
) -> AsyncGenerator[DemoPage]:
    """Open the page of a demo."""
    context = await browser.new_context(
        viewport={"width": width, "height": 850}, color_scheme=scheme, reduced_motion="reduce"
    )
    demo = DemoPage(await context.new_page(), url)
    demo.page.on("request", lambda request: demo.requested.append(request.url))
    demo.page.on("pageerror", lambda error: demo.complaints.append(str(error)))
    demo.page.on("console", lambda message: demo.complaints.append(message.text))
    await demo.page.goto(url)
    await expect(demo.page.locator(".accounts dd")).to_have_count(3)
    yield demo
    await context.close()


async def take_screenshots() -> None:
    """Press three buttons, and store how the page looks by day and by night."""
    with TemporaryDirectory() as folder:
        async with (
            serve(create_app(f"sqlite+aiosqlite:///{folder}/bank.db")) as address,
            open_browser() as browser,
        ):
            async with open_demo(browser, address.url) as demo:
                for button in ("payday", "statement-fails", "transfer", "leave", "transfer", "commit-fails"):
                    await demo.click(button)
                await demo.page.screenshot(path=DOCS / "demo.png")
            async with open_demo(browser, address.url, scheme="dark") as demo:
                await expect(demo.page.locator("[data-number] svg")).to_have_count(6)
                await demo.page.screenshot(path=DOCS / "demo-dark.png")


if __name__ == "__main__":
    asyncio.run(take_screenshots())
