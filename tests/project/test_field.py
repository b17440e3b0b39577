"""The pages that compare packages show what `python -m benchmarks.field` measured, and it is still so."""

import json
from contextlib import ExitStack

import pytest
from sqlalchemy import URL

from benchmarks.field.child import play_all
from benchmarks.field.contenders import CONTENDERS, Results
from benchmarks.field.tables import DOCS, rewritten
from tests.support.databases import fresh_database
from tests.support.dependency import needs_function_scope
from tests.support.versions import survives_cancellation


def measured() -> Results:
    """Return what the pages were made from."""
    results: Results = json.loads((DOCS / "compared-with.json").read_text("utf-8"))["contenders"]
    return results


def test_tables_show_what_was_measured() -> None:
    """Each measured table of a page is made from docs/compared-with.json, and there are some."""
    pages = rewritten(measured())
    assert pages
    for page, text in pages.items():
        assert page.read_text("utf-8") == text, f"run python -m benchmarks.field --docs: {page}"


@pytest.mark.parametrize(
    "name",
    [
        "package",
        pytest.param("function", marks=needs_function_scope),
        pytest.param("dependency", marks=needs_function_scope),
        "alchemy",
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # asyncpg's, of what is leaked
@survives_cancellation
def test_measured_again(name: str, postgresql_server: URL, databases: ExitStack) -> None:
    """What is installed here does what the table says of it; which error two tasks get, others may decide."""
    if name == "alchemy":
        pytest.importorskip("advanced_alchemy", reason="requirements/guides.in is not in the lowest row")
    found = play_all(CONTENDERS[name], lambda: fresh_database(postgresql_server))
    expected = {key: value for key, value in measured()[name]["found"].items() if key in found}
    if name != "package":
        del found["pair"], expected["pair"]
    assert found == expected
