"""What Zensical's strict mode leaves out: images, links to other files, and what comes from other hosts."""

import re
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from typing_extensions import override

FETCHED = {"src", "srcset", "poster", "data"}
"""Attributes whose address a browser fetches by itself; those of <link> too, but for a few relations."""
NOT_FETCHED = {"canonical", "next", "prev", "alternate", "edit"}


class Document(HTMLParser):
    """The anchors and addresses of an HTML file."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(file.read_text("utf-8"))

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        self.fetched += [values[name] for name in FETCHED & values.keys()]
        if "href" in values:
            loaded = tag == "link" and not NOT_FETCHED & set(values.get("rel", "").split())
            (self.fetched if loaded else self.links).append(values["href"])


read = cache(Document)


def mistakes(site: Path, repository: str, root: Path) -> list[str]:
    """Return the mistakes in a built site, a sentence each; ``root`` has the files of the repository."""
    read.cache_clear()
    return [
        f"{file.relative_to(site).as_posix()} {wrong}"
        for file in sorted(site.rglob("*.html"))
        for wrong in (*_mistakes(site, file), *_absent(read(file).links, repository, root))
    ]


def _absent(links: list[str], repository: str, root: Path) -> Iterator[str]:
    """Find links to files and folders that the repository does not have."""
    kinds = {"blob": Path.is_file, "tree": Path.is_dir}
    target = re.compile(re.escape(repository) + r"/(blob|tree)/main/([^#?]*)")
    for address in links:
        found = target.match(address)
        if found and not kinds[found[1]](root / unquote(found[2])):
            yield f"links to {address}, which the repository does not have"


def _mistakes(site: Path, file: Path) -> Iterator[str]:
    document = read(file)
    for address in document.fetched:
        if urlsplit(address).netloc:
            yield f"fetches {address} from another host"
    for address in document.links + document.fetched:
        parts = urlsplit(address)
        if parts.scheme or parts.netloc:
            continue
        target = file
        if parts.path:
            base = site if parts.path.startswith("/") else file.parent  # the page for 404 is served anywhere
            target = (base / unquote(parts.path).lstrip("/")).resolve()
            target = target / "index.html" if target.is_dir() else target
        if not target.is_file():
            yield f"links to {address}, which does not exist"
        elif target.suffix == ".html" and unquote(parts.fragment) not in read(target).anchors | {""}:
            yield f"links to {address}, which has no such anchor"
