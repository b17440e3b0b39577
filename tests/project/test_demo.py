"""The demo's page, clicked in Chromium: balances, timelines, and what a reader of it needs."""

from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Literal

import pytest
import pytest_asyncio

pytest.importorskip("playwright", reason="requirements/guides.in is not in the lowest row")

from httpx2 import AsyncClient
from playwright.async_api import Browser, expect

from examples.demo.app import create_app
from tests.support.browser import open_browser
from tests.support.demo import open_demo
from tests.support.serving import serve

TRANSFER = ["connection", "statement", "statement", "statement", "commit", "response"]


pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),  # the browser starts once
    pytest.mark.filterwarnings(
        "ignore:(?s).*session.exec:DeprecationWarning"
    ),  # SQLModel's, about its execute()
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    """Chromium."""
    async with open_browser() as browser:
        yield browser


@pytest_asyncio.fixture(loop_scope="module")
async def url(sqlite_url: str) -> AsyncIterator[str]:
    """Where the demo is served."""
    async with serve(create_app(sqlite_url)) as address:
        yield address.url


async def test_each_button_shows_what_happened(browser: Browser, url: str) -> None:
    """Each button changes the balances as it says, and its timeline has its marks in their order."""
    async with open_demo(browser, url) as demo:
        await demo.click("transfer")
        assert await demo.marks() == TRANSFER
        await demo.has_balances(70, 130, 100)
        await demo.click("commit-fails")
        assert await demo.marks() == [*TRANSFER[:4], "commit failed", "rollback", "response"]
        await demo.click("statement-fails")
        assert await demo.marks() == ["connection", "statement", "statement failed", "rollback", "response"]
        await demo.has_balances(70, 130, 100)
        await demo.click("payday")
        assert await demo.marks() == [*TRANSFER, *TRANSFER[:5]]
        await demo.has_balances(50, 140, 110)
        await demo.click("leave")
        assert await demo.marks() == [*TRANSFER, *TRANSFER[:4], "left", "rollback"]
        await demo.has_balances(40, 150, 110)
        await demo.click("two", timelines=2)
        assert [await demo.marks(0), await demo.marks(1)] == [TRANSFER, TRANSFER]
        await demo.has_balances(50, 145, 105)
        assert {address.startswith((url, "data:")) for address in demo.requested} == {True}
        refused = "Failed to load resource: the server responded with a status of 409 (Conflict)"
        assert demo.complaints == [refused, refused]


async def test_commit_ends_before_the_response_starts(browser: Browser, url: str) -> None:
    """In the drawing of a transfer no bar before the response reaches over its start."""
    async with open_demo(browser, url) as demo:
        await demo.click("transfer")
        marks = demo.page.locator("[data-mark] rect")
        boxes = [await marks.nth(n).bounding_box() for n in range(await marks.count())]
        *before, response = [box for box in boxes if box]
        assert len(before) == 5
        assert (
            max(box["x"] + box["width"] for box in before[1:]) <= response["x"] + 3
        )  # a bar is 3 pixels or more
        for one, other in pairwise(before[1:]):
            assert one["x"] <= other["x"]


async def test_result_is_stated_in_words(browser: Browser, url: str) -> None:
    """What the client received stands in a live region, and the drawing has a name that lists its marks."""
    async with open_demo(browser, url) as demo:
        await demo.click("commit-fails")
        await expect(demo.page.get_by_role("status")).to_contain_text("409: FOREIGN KEY constraint failed")
        drawing = demo.page.get_by_role(
            "img", name="POST /transfers: connection, UPDATE account, UPDATE account"
        )
        label = await drawing.get_attribute("aria-label") or ""
        assert label.endswith("INSERT transfer, COMMIT failed, ROLLBACK, response 409")
        await expect(demo.page.get_by_text("COMMIT failed. The route's response was dropped")).to_be_visible()


async def test_requests_of_others_show_too(browser: Browser, url: str) -> None:
    """A transfer that a terminal sends appears on the page, with its balances."""
    async with open_demo(browser, url) as demo, AsyncClient(base_url=url) as client:
        order = {"sender": "carol", "receiver": "bob", "amount": 1}
        assert (await client.post("/transfers", json=order)).status_code == 201
        await expect(demo.page.locator("[data-number] svg")).to_have_count(1)
        await expect(demo.page.locator("#balance-carol")).to_contain_text("99")


CONTRASTS = """
() => [..."h1, h2, h3 span, p, summary, a, dt, dd, button b, button span, svg text".split(", ")]
  .flatMap((names) => [...document.querySelectorAll(names)])
  .filter((element) => element.textContent.trim() && element.getClientRects().length)
  .map((element) => {
    const style = getComputedStyle(element);
    let around = element;
    while (getComputedStyle(around).backgroundColor === "rgba(0, 0, 0, 0)") around = around.parentElement;
    const luminance = (color) => color.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255)
      .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
      .reduce((sum, part, n) => sum + part * [0.2126, 0.7152, 0.0722][n], 0);
    const own = luminance(element instanceof SVGElement ? style.fill : style.color);
    const back = luminance(getComputedStyle(around).backgroundColor);
    const ratio = (Math.max(own, back) + 0.05) / (Math.min(own, back) + 0.05);
    return [element.textContent.trim(), ratio];
  })
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_narrow_page_can_be_read(browser: Browser, url: str, scheme: Literal["light", "dark"]) -> None:
    """At 400 pixels nothing runs over the edge, and each text has a contrast of 4.5 or more."""
    async with open_demo(browser, url, width=400, scheme=scheme) as demo:
        for button in ("commit-fails", "leave"):
            await demo.click(button)
        assert await demo.page.evaluate("document.documentElement.scrollWidth") == 400
        contrasts = await demo.page.evaluate(CONTRASTS)
        assert len(contrasts) > 50
        assert [text for text, ratio in contrasts if ratio < 4.5] == []


async def test_page_may_ask_its_own_server_only(browser: Browser, url: str) -> None:
    """The policy of the page refuses any other address."""
    ask = "address => fetch(address).then(() => 'answered', () => 'refused')"
    async with open_demo(browser, url) as demo:
        assert await demo.page.evaluate(ask, "/accounts") == "answered"
        assert await demo.page.evaluate(ask, "data:,") == "refused"
