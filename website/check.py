"""What Zensical's strict mode leaves out: images, links to other files, and what comes from other hosts."""

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


def mistakes(site: Path) -> list[str]:
    """Return the mistakes in a built site, a sentence each."""
    read.cache_clear()
    return [wrong for file in sorted(site.rglob("*.html")) for wrong in _mistakes(site, file)]


def _mistakes(site: Path, file: Path) -> Iterator[str]:
    page = file.relative_to(site).as_posix()
    document = read(file)
    for address in document.fetched:
        if urlsplit(address).netloc:
            yield f"{page} fetches {address} from another host"
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
            yield f"{page} links to {address}, which does not exist"
        elif target.suffix == ".html" and unquote(parts.fragment) not in read(target).anchors | {""}:
            yield f"{page} links to {address}, which has no such anchor"
