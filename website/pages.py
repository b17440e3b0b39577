"""The pages of the site, made of the repository's Markdown, which stays readable where it is."""

import re
from collections.abc import Iterator
from os.path import relpath
from pathlib import Path
from typing import cast

import yaml  # type: ignore[import-untyped]  # its types are a package apart

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "build/site-source"
"""The `docs_dir` of mkdocs.yml."""
SITE = ROOT / "build/site"
"""Its `site_dir`."""
CONFIGURATION = ROOT / "mkdocs.yml"
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CODE_OF_CONDUCT.md": "code-of-conduct.md",
    "examples/README.md": "examples.md",
}
"""Files beside `docs/`, and the pages that a link to them opens; all but the first are pages themselves."""
LINK = re.compile(r"(?<=\]\()(?P<path>[^)\s#:]+)(?P<rest>#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^(```.*?^```)$", re.MULTILINE | re.DOTALL)


def sources() -> dict[str, Path]:
    """Return the file that each page of the site is made of."""
    docs = {path.relative_to(ROOT / "docs").as_posix(): path for path in sorted(ROOT.glob("docs/**/*.md"))}
    return docs | {page: ROOT / file for file, page in OUTSIDE.items() if page not in docs}


def prepare(settings: dict[str, object]) -> None:
    """Write the pages and pictures to `SOURCES`; what has not changed keeps its time."""
    pages = sources()
    repository = str(settings["repo_url"])
    for page, file in pages.items():
        write(SOURCES / page, adapt(file.read_text("utf-8"), file, page, repository).encode())
    others = {path.relative_to(ROOT / "docs").as_posix(): path for path in ROOT.glob("docs/**/*.[jps]*")}
    for name, file in others.items():
        write(SOURCES / name, file.read_bytes())
    for path in SOURCES.rglob("*.*"):
        if path.relative_to(SOURCES).as_posix() not in pages | others:
            path.unlink()


def write(path: Path, content: bytes) -> None:
    """Write a file unless it has this content already, so that a server rebuilds nothing for it."""
    if not path.exists() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def adapt(text: str, file: Path, page: str, repository: str) -> str:
    """Let each link that leaves `docs/` open its page, or the file in the repository."""

    def link(found: re.Match[str]) -> str:
        target = (file.parent / found["path"]).resolve()
        if not target.is_relative_to(ROOT) or not target.exists():
            return found[0]  # the check of the built site finds it
        name = target.relative_to(ROOT).as_posix()
        rest = found["rest"] or ""
        if name in OUTSIDE:
            return relpath(OUTSIDE[name], Path(page).parent) + rest
        if name.startswith("docs/"):
            return relpath(name.removeprefix("docs/"), Path(page).parent) + rest
        return f"{repository}/{'tree' if target.is_dir() else 'blob'}/main/{name}{rest}"

    parts = FENCE.split(text)
    parts[::2] = [LINK.sub(link, part) for part in parts[::2]]
    return "".join(parts)


def navigation(entries: object) -> Iterator[tuple[str, str]]:
    """Return title and path of each page of a nav, in order."""
    if isinstance(entries, list):
        for entry in cast("list[dict[str, object]]", entries):
            for title, inner in entry.items():
                if isinstance(inner, str):
                    yield title, inner
                else:
                    yield from navigation(inner)


def read_settings() -> dict[str, object]:
    """Read mkdocs.yml."""
    settings: dict[str, object] = yaml.safe_load(CONFIGURATION.read_text("utf-8"))
    return settings
