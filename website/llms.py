"""Texts for language models: each page as Markdown, `llms.txt` with a line of each, `llms-full.txt`."""

import re
from typing import cast

from website.pages import ROOT, SITE, SOURCES, navigation

ENTRY = re.compile(r"^- \[[^\]]+\]\((?P<page>[\w/-]+\.md)\):? (?P<line>.+)$", re.MULTILINE)
WHOLE = "[llms-full.txt](llms-full.txt) has all of these pages in one file.\n"
DIRECTIVE = re.compile(r"^::: (?P<module>[\w.]+)$", re.MULTILINE)


def write_llms(settings: dict[str, object]) -> None:
    """Write them into the built site."""
    described = dict(ENTRY.findall((SOURCES / "index.md").read_text("utf-8")))
    described["index.md"] = str(settings["site_description"]) + "."
    index = [f"# {settings['site_name']}\n", f"> {settings['site_description']}.\n", WHOLE]
    full: list[str] = []
    for section in cast("list[dict[str, object]]", settings["nav"]):
        for name, entries in section.items():
            index.append(f"## {name}\n")
            for title, page in navigation(entries):
                text = DIRECTIVE.sub(stub, (SOURCES / page).read_text("utf-8"))
                (SITE / page).write_text(text, "utf-8")
                index.append(f"- [{title}]({page}): {described.get(page) or first_sentence(text)}")
                full.append(f"<!-- {page} -->\n\n{text}")
        index.append("")
    (SITE / "llms.txt").write_text("\n".join(index), "utf-8")
    (SITE / "llms-full.txt").write_text("\n".join(full), "utf-8")


def first_sentence(text: str) -> str:
    """Return a page's first line of prose, without its links."""
    line = next(line for line in text.splitlines()[1:] if re.match(r"[A-Z`*]", line))
    return re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", line)


def stub(found: re.Match[str]) -> str:
    """Return what a module's stub declares, for the directive that stands for its documentation."""
    module = ROOT / "typings" / found["module"].replace(".", "/")
    file = module / "__init__.pyi" if module.is_dir() else module.with_suffix(".pyi")
    return f"```python\n{file.read_text('utf-8')}```"
