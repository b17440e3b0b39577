"""The documentation is true: its programs run, its commands answer as shown, its links lead somewhere.

A page is one test, because its blocks share a namespace. Sybil (10.1) makes each block a test, and
pytest-xdist gives the blocks of one page to different processes. A failure names the line here, too.
"""

import asyncio
import importlib
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import pytest

import fastapi_async_sqlalchemy
from fastapi_async_sqlalchemy import db
from tests.support.commands import replay
from tests.support.databases import fresh_database
from tests.support.pages import PAGES, ROOT, Block, blocks, headless, quoted_parts
from tests.support.versions import survives_cancellation

CUTTING_OFF = {"many-tasks"}
"""Pages on which an error cancels tasks in the middle of their statements."""
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")

UrlFor = Callable[[re.Match[str]], str]


def page_id(page: Path) -> str:
    """Name a page in the test run."""
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def with_test_databases(
    request: pytest.FixtureRequest, tmp_path: Path, databases: ExitStack
) -> Callable[[str], str]:
    """Return what puts this test's databases in place of those that a page names, the same for the same."""
    known: dict[str, str] = {}

    def url_for(found: re.Match[str]) -> str:
        url = found[0]
        if url not in known:
            if url.startswith("sqlite"):
                known[url] = f"sqlite+aiosqlite:///{tmp_path / found['file']}"
            else:
                kind = "postgresql" if url.startswith("postgresql") else "mariadb"
                server = request.getfixturevalue(f"{kind}_server")
                known[url] = databases.enter_context(fresh_database(server))
        return known[url]

    documented = re.compile(
        r"sqlite\+aiosqlite:///(?P<file>\w+\.db)|(?:postgresql\+asyncpg|mysql\+aiomysql)://[\w:@./]+"
    )
    return lambda text: documented.sub(url_for, text)


@pytest.fixture
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The program in which a page's blocks run in turn; afterwards pair and logger are as they were."""
    module = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    handlers = logging.getLogger("fastapi_async_sqlalchemy").handlers
    before = handlers[:]
    yield module
    handlers[:] = before
    db.unbind()


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=survives_cancellation) if page.stem in CUTTING_OFF else page for page in PAGES],
    ids=page_id,
)
@pytest.mark.filterwarnings("ignore:(?s).*session.exec:DeprecationWarning")  # SQLModel, of its own execute()
@pytest.mark.filterwarnings("ignore:The declarative_mixin decorator:DeprecationWarning")  # advanced-alchemy's
def test_page_does_what_it_says(
    page: Path, module: ModuleType, with_test_databases: Callable[[str], str], subtests: pytest.Subtests
) -> None:
    """The page's Python runs from top to bottom, its tests too; each curl command gets the answer shown."""
    for block in blocks(page):
        if block.quoted is not None:
            continue
        reason = block.reason or no_test_client(block)
        if reason is not None:
            with subtests.test(f"{page_id(page)}:{block.line}"):
                pytest.skip(reason)
        elif block.language == "python":
            source = "\n" * (block.line - 1) + with_test_databases(block.text)
            exec(compile(source, str(page), "exec"), vars(module))  # noqa: S102  # that is the test
            for name in [name for name in vars(module) if name.startswith("test_")]:
                vars(module).pop(name)()
        elif block.language == "console" and "$ curl" in block.text:
            asyncio.run(replay(block, vars(module)["app"]))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_quotes_are_true(page: Path) -> None:
    """A block titled with an example is part of that file, and shows no body without its `def` line."""
    for block in blocks(page):
        if block.quoted is not None:
            where = f"{page_id(page)}:{block.line}"
            assert quoted_parts(block), f"{where} is not in the file"
            if block.quoted.suffix == ".py":
                assert list(headless(block)) == [], f"{where} leaves out a `def`, a `class` or a decorator"


def no_test_client(block: Block) -> str | None:
    """Say why a block that uses the TestClient cannot: an old Starlette's needs the httpx of its time."""
    if "TestClient" not in block.text:
        return None
    try:
        importlib.import_module("fastapi.testclient")
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link is a file, and its fragment a heading of that file."""
    prose = re.sub(r"^```[\s\S]*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE)
    for found in LINK.finditer(prose):
        path, _, fragment = found["target"].partition("#")
        if "://" in path:
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page_id(page)} links to {found['target']}"
        if fragment:
            headings = re.findall(r"^#+ (.+)$", target.read_text("utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert fragment in anchors, f"{page_id(page)} links to {found['target']}"


def test_reference_has_every_public_name() -> None:
    """Each name of `__all__` has a heading in the reference, and each heading of code is a public name."""
    reference = (ROOT / "docs/reference.md").read_text("utf-8")
    assert sorted(re.findall(r"^### `(\w+)", reference, re.MULTILINE)) == sorted(
        fastapi_async_sqlalchemy.__all__
    )


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_one_sentence_a_line(page: Path) -> None:
    """A line of prose ends where its sentence ends."""
    no_prose = r"^```[\s\S]*?^```$|^\|.*$|^\d+\. |`[^`]*`"
    prose = re.sub(no_prose, "", page.read_text("utf-8"), flags=re.MULTILINE)
    for line in prose.splitlines():
        assert not re.search(r"(?<!e\.g)(?<!i\.e)[.!?] +[A-Z]", line), f"{page_id(page)}: {line}"
