"""The documentation reads easily: short sentences, few commas, none of the turns that the house avoids."""

import re
import tomllib
from pathlib import Path

import pytest

from tests.support.pages import PAGES, ROOT
from tests.support.prose import prose, sentences

WORDS, COMMAS = 17, 1.2
"""How many a sentence of a page may have on average."""
COMMAS_OVERALL = 0.9
"""How many a sentence of all pages may have on average."""
AVOIDED = re.compile(
    r"\b(?:whoever|likewise|in vain|belongs? into|had best|of yours|of ours|by hand|by and by|as ever|"
    r"all the same|of (?:its|their|your|our) own(?=[.,;:)]|$| (?:in|and|for|to|that|which|is|by|as)\b))",
    re.IGNORECASE,
)

NOT_THE_FIELDS = re.compile(
    r"(?<![^\W_])(?:doom(?:s|ed)?|told|gone|lent|heard|(?:let|lets|letting)[ _]go|"
    r"(?:take|takes|taken|taking|took)[ _]away)(?![^\W_])",
    re.IGNORECASE,
)
"""Words that the field does not use; in code an underscore is a gap between words."""
CODE = [
    path
    for folder in ("src", "typings", "examples", "website")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in {".py", ".pyi", ".html", ".md"}
]


def page_id(page: Path) -> str:
    """Name a page in the test run."""
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_sentences_are_short(page: Path) -> None:
    """On average, a page's sentences have 17 words and little more than one comma at most."""
    found = list(sentences(page))
    assert sum(sentence.words for sentence in found) / len(found) <= WORDS
    assert sum(sentence.commas for sentence in found) / len(found) <= COMMAS


def test_commas_are_few() -> None:
    """Over all pages a sentence has less than one comma on average."""
    found = [sentence for page in PAGES for sentence in sentences(page)]
    assert sum(sentence.commas for sentence in found) / len(found) <= COMMAS_OVERALL


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_no_avoided_turns(page: Path) -> None:
    """The prose has none of the turns that CONTRIBUTING asks writers to avoid."""
    assert [found[0] for found in AVOIDED.finditer(prose(page))] == []


def test_words_are_the_fields() -> None:
    """Pages, names, docstrings, comments and messages have none of the words that the field does not use."""
    wrong = [
        f"{page_id(path)}:{number}: {line}"
        for path in [*PAGES, ROOT / "CONTRIBUTING.md", *CODE]
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if NOT_THE_FIELDS.search(line)
    ]
    assert wrong == []


def test_version_policy_names_the_lower_bounds() -> None:
    """The lowest versions on the page are those of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    requirements = [*project["dependencies"], *extras]
    bounds = dict(re.findall(r"^([\w-]+)(?:\[\w+\])?>=([\d.]+)$", "\n".join(requirements), re.MULTILINE))
    page = (ROOT / "docs/version-policy.md").read_text("utf-8")
    for name, version in re.findall(r"^\| (\w+) \| ([\d.]+)", page, re.MULTILINE):
        assert bounds[name.lower()] == version, name
