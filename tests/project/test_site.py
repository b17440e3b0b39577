"""The site: it builds strictly, each link leads somewhere, and a browser shows it without a network."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncGenerator, Generator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import cast

import pytest

for needed in ("zensical", "mkdocstrings_handlers", "playwright"):
    pytest.importorskip(needed, reason="requirements/guides.in is not in the lowest row")

from playwright.async_api import Browser, Page, expect
from typing_extensions import override

import fastapi_async_sqlalchemy
from tests.support.browser import open_browser
from website.pages import ROOT, adapt, navigation, read_settings, sources

PAGES_IN_BROWSER = ("index.html", "how-to/hooks/", "concepts/", "reference/", "api/")


def project_in(folder: Path) -> Path:
    """Copy the repository, so that a build writes there and mistakes can be made."""
    left_out = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "results")
    return shutil.copytree(ROOT, folder, ignore=left_out, dirs_exist_ok=True)


def build(project: Path) -> tuple[int, str]:
    """Build a project's site; return the exit status, and what it says."""
    ended = subprocess.run(
        [sys.executable, "-m", "website"], cwd=project, capture_output=True, text=True, check=False
    )
    return ended.returncode, re.sub(r"\x1b\[[\d;]*m", "", ended.stdout + ended.stderr)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's own site, which has no mistakes; built once for all processes of a test run."""
    temporary = tmp_path_factory.getbasetemp()
    project = (temporary.parent if "PYTEST_XDIST_WORKER" in os.environ else temporary) / "site"
    with project.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (project / "build/site/llms.txt").exists():
            status, said = build(project_in(project))
            assert status == 0, said
    return project / "build/site"


class Quiet(SimpleHTTPRequestHandler):
    """A file server that logs nothing."""

    @override
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Generator[str]:
    """Where the site is served."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site)) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture
async def browser() -> AsyncGenerator[Browser]:
    """A headless Chromium."""
    async with open_browser() as chromium:
        yield chromium


def complaints(page: Page, address: str) -> list[str]:
    """Return a list that grows by each error of a page, and each request to another host."""
    found: list[str] = []
    page.on("console", lambda message: found.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on(
        "request",
        lambda request: None if request.url.startswith((address, "data:")) else found.append(request.url),
    )
    return found


def test_each_page_is_in_the_navigation_once() -> None:
    """The nav of mkdocs.yml has each page of docs/, and those beside it, exactly once."""
    pages = [page for _, page in navigation(read_settings()["nav"])]
    assert sorted(pages) == sorted(sources())
    assert {page.relative_to(ROOT / "docs").as_posix() for page in ROOT.glob("docs/**/*.md")} <= set(pages)


def test_titles_in_the_navigation_differ() -> None:
    """No page or section of the nav has the title of another one, such as the section's around it."""
    _, _, nav = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")
    titles = re.findall(r"^ *- (.+?):", nav, re.MULTILINE)
    assert [title for title in titles if titles.count(title) > 1] == []


@pytest.mark.parametrize("picture", sorted(ROOT.glob("docs/**/*.svg")), ids=lambda path: path.name)
def test_pictures_can_be_read_in_the_dark(picture: Path) -> None:
    """A picture has a title, a ground under all of it, and other colours for a dark mode."""
    drawn = picture.read_text("utf-8")
    width, height = re.findall(r'viewBox="0 0 (\d+) (\d+)"', drawn)[0]
    assert "<title>" in drawn
    assert "@media (prefers-color-scheme: dark)" in drawn
    assert re.search(rf'<rect (class="\w+" )?width="{width}" height="{height}"', drawn)


def test_links_that_leave_the_documentation() -> None:
    """On the site they open the page that the file has become, or the file in the repository."""
    text = "[a](../../CHANGELOG.md#unreleased) [b](../../examples/quickstart.py) [c](hooks.md)\n"
    adapted = adapt(text, ROOT / "docs/how-to/page.md", "how-to/page.md", "https://host/project")
    in_repository = "https://host/project/blob/main/examples/quickstart.py"
    assert adapted == f"[a](../changelog.md#unreleased) [b]({in_repository}) [c](hooks.md)\n"


@pytest.mark.slow
def test_what_is_broken_fails_the_build(tmp_path: Path) -> None:
    """Each kind of mistake is named, and the exit status says that there is one."""
    project = project_in(tmp_path)
    repository = read_settings()["repo_url"]
    shutil.rmtree(project / "docs/how-to")
    for page in project.glob("docs/*.md"):
        page.unlink()
    (project / "docs/index.md").write_text(
        "# Start\n\n"
        "[a](no-page.md) [b](#no-anchor) [c](no-file.json) ![d](no-image.svg)\n\n"
        "[e](../CHANGELOG.md#no-change) [g](../no-program.py) [f][fastapi_async_sqlalchemy.no_name]\n\n"
        f"[h]({repository}/blob/main/no-file.py#L1) [i]({repository}/tree/main/LICENSE)\n\n"
        f"[j]({repository}/blob/main/pyproject.toml) [k]({repository}/tree/main/examples)\n\n"
        '<img src="https://elsewhere.example/image.svg">\n'
    )
    (project / "docs/forgotten.md").write_text("# Forgotten\n")
    settings, _, _ = (project / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")
    start = settings + "\nnav:\n  - Start: index.md\n  - Project:\n"
    pages = ("changelog", "contributing", "security", "code-of-conduct", "gone", "security")
    (project / "mkdocs.yml").write_text(start + "".join(f"      - {page}: {page}.md\n" for page in pages))
    status, said = build(project)
    assert status != 0
    for mistake in (
        "[a](no-page.md)",
        "[b](#no-anchor)",
        "no-file.json, which does not exist",
        "no-image.svg, which does not exist",
        "no-program.py, which does not exist",
        "blob/main/no-file.py#L1, which the repository does not have",
        "tree/main/LICENSE, which the repository does not have",
        "changelog/#no-change, which has no such anchor",
        "unresolved autoref",
        "fetches https://elsewhere.example/image.svg from another host",
        "the nav does not name forgotten.md",
        "the nav names gone.md, which does not exist",
        "the nav names security.md twice",
    ):
        assert mistake in said, said
    assert "pyproject.toml, which" not in said
    assert "main/examples, which" not in said
    (project / "docs/index.md").write_text("# Start\n\n::: fastapi_async_sqlalchemy.no_name\n")
    status, said = build(project)
    assert status != 0
    assert "Could not collect 'fastapi_async_sqlalchemy.no_name'" in said


@pytest.mark.slow
def test_api_has_every_public_name_and_no_other(site: Path) -> None:
    """The API page has the names of `__all__` in order, with docstrings, and none with an underscore."""
    page = (site / "api/index.html").read_text("utf-8")
    names = re.findall(r'<h\d id="fastapi_async_sqlalchemy\.([\w.]+)"', page)
    tops = [name for name in names if "." not in name]
    assert tops == fastapi_async_sqlalchemy.__all__
    assert {"SessionProxy.gather", "SessionProxy.begin", "testing.SandboxedApp"} <= set(names)
    assert "opentelemetry.OpenTelemetryObserver" in names
    assert not [name for name in names if re.search(r"(^|\.)_", name) and not name.endswith(".__call__")]
    assert "Run each coroutine in a separate task and unit" in page
    assert "made_by_the_library" not in page


@pytest.mark.slow
def test_texts_for_language_models(site: Path) -> None:
    """`llms.txt` has a line for each page, and names `llms-full.txt`; each page is there as Markdown."""
    index = (site / "llms.txt").read_text("utf-8")
    full = (site / "llms-full.txt").read_text("utf-8")
    assert "[llms-full.txt](llms-full.txt)" in index
    listed = re.findall(r"^- \[[^\]]+\]\(([\w/.-]+)\): \S.*$", index, re.MULTILINE)
    assert sorted(listed) == sorted(sources())
    for page in listed:
        text = (site / page).read_text("utf-8")
        assert text.startswith("# ")
        assert text in full


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_pages_in_a_browser(site: Path, address: str, browser: Browser, scheme: str) -> None:
    """No page logs an error, asks another host, or is wider than a telephone; the scheme is the system's."""
    context = await browser.new_context(
        color_scheme="dark" if scheme == "dark" else "light", viewport={"width": 400, "height": 800}
    )
    for path in PAGES_IN_BROWSER:
        page = await context.new_page()
        found = complaints(page, address)
        await page.goto(address + path, wait_until="networkidle")
        assert found == [], path
        shown = await page.evaluate("document.body.dataset.mdColorScheme")
        assert shown == ("slate" if scheme == "dark" else "default"), path
        assert await page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), path


@pytest.mark.slow
async def test_navigation_opens_each_page(site: Path, address: str, browser: Browser) -> None:
    """From the start page, tabs and sidebar open each page by its title; no error, no other host."""
    settings = read_settings()
    page = await browser.new_page(viewport={"width": 1280, "height": 800})  # below 1220 the nav is a drawer
    found = complaints(page, address)
    await page.goto(address)
    tabs, sidebar = page.locator(".md-tabs"), page.locator(".md-sidebar--primary")
    for section in cast("list[dict[str, object]]", settings["nav"]):
        for name, entries in section.items():
            links = [tabs.get_by_role("link", name=name, exact=True)]  # opens the section's first page
            titles = [title for title, _ in navigation(entries)]
            links += [sidebar.get_by_role("link", name=title, exact=True) for title in titles[1:]]
            for link, title in zip(links, titles, strict=True):
                await link.click()
                await expect(page).to_have_title(f"{title} - {settings['site_name']}")
                await page.wait_for_load_state()
    assert found == []


@pytest.mark.slow
async def test_search_finds_a_page(site: Path, address: str, browser: Browser) -> None:
    """A search without a network leads to the page that tells of its word."""
    title = (ROOT / "docs/how-to/propagation.md").read_text("utf-8").partition("\n")[0].removeprefix("# ")
    page = await browser.new_page()
    found = complaints(page, address)
    await page.goto(address)
    await page.get_by_role("button", name="Search").click()
    await page.get_by_role("combobox").fill("savepoint propagation")
    linked = page.locator('a[href*="how-to/propagation/"]')
    await linked.filter(has_text="savepoint").first.click()  # what was found, and not the menu
    await expect(page).to_have_url(re.compile("/how-to/propagation/"))
    await expect(page.get_by_role("heading", level=1)).to_contain_text(title)
    assert found == []
