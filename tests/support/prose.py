"""How the documentation reads, in numbers; `python -m tests.support.prose` prints them for each page."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

from tests.support.pages import PAGES, ROOT

NO_PROSE = re.compile(
    r"^(?P<fence>```|~~~)[\s\S]*?^(?P=fence)$|^\|.*$|^ *#+ .*$|<!--[\s\S]*?-->|^\s*!\[.*$|^(?:!!!|\?\?\?).*$",
    re.MULTILINE,
)
MARKUP = re.compile(r"^\s*(?:[-*] |\d+\. |> )|\*\*|(?<!\w)[*_](?=\w)|(?<=\w)[*_](?!\w)", re.MULTILINE)
CODE = re.compile(r"`[^`]*`")
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\([^)]*\)")
END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!vs)[.!?:](?=\s|$)|\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )")


@frozen
class Sentence:
    """A sentence of a page, its code shortened to one word each."""

    text: str

    @property
    def words(self) -> int:
        """How many words it has."""
        return len(self.text.split())

    @property
    def commas(self) -> int:
        """How many commas it has; those inside code are not counted."""
        return self.text.count(",")


def prose(page: Path) -> str:
    """Return a page without code blocks, tables and headings; code in a sentence is one word."""
    text = NO_PROSE.sub("\n\n", page.read_text("utf-8"))
    return LINK.sub(lambda found: found["text"], CODE.sub("code", text))


def sentences(page: Path) -> Iterator[Sentence]:
    """Yield the sentences of a page's prose."""
    for part in END.split(prose(page)):
        text = " ".join(MARKUP.sub(" ", part).split())
        if len(text.split()) > 1:
            yield Sentence(text)


def main(pages: list[Path]) -> None:
    """Print words and commas a sentence, the longest sentence, for each page and for all."""
    whole: list[Sentence] = []
    for page in pages:
        found = list(sentences(page))
        whole += found
        _print_row(page.resolve().relative_to(ROOT).as_posix(), found)
    _print_row("all", whole)


def _print_row(name: str, found: list[Sentence]) -> None:
    words, commas = sum(s.words for s in found), sum(s.commas for s in found)
    longest = max(found, key=lambda s: s.words)
    print(  # noqa: T201  # a program prints
        f"{name:48} {len(found):5} sentences, {words / len(found):5.1f} words and"
        f" {commas / len(found):.2f} commas each, the longest {longest.words}"
    )


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]] or PAGES)
