"""Build the site, or serve it: `python -m website [--serve]`."""

import subprocess
import sys
import threading
from contextlib import suppress

from website.check import mistakes
from website.llms import write_llms
from website.pages import CONFIGURATION, ROOT, SITE, navigation, prepare, read_settings, sources

SECONDS = 0.5
"""How often a server looks whether a page has changed."""


def build() -> list[str]:
    """Build the site; return what is wrong with it."""
    settings = read_settings()
    wrong = wrong_in_nav([page for _, page in navigation(settings["nav"])])
    prepare(settings)
    if zensical("build", "--strict", "--clean"):
        wrong.append("zensical refused what it says above")
    wrong += mistakes(SITE, str(settings["repo_url"]), ROOT)
    if not wrong:
        write_llms(settings)
    return wrong


def wrong_in_nav(listed: list[str]) -> list[str]:
    """Compare the pages that a nav lists with those that there are."""
    pages = set(sources())
    return [
        *(f"mkdocs.yml: the nav names {page}, which does not exist" for page in sorted(set(listed) - pages)),
        *(f"mkdocs.yml: the nav does not name {page}" for page in sorted(pages - set(listed))),
        *(f"mkdocs.yml: the nav names {page} twice" for page in sorted(pages) if listed.count(page) > 1),
    ]


def zensical(*arguments: str) -> int:
    """Run zensical as a module, so that it finds this package, and return its exit status."""
    command = [sys.executable, "-m", "zensical", *arguments, "--config-file", str(CONFIGURATION)]
    return subprocess.run(command, cwd=ROOT, check=False).returncode  # noqa: S603  # of our own making


def serve() -> int:
    """Serve the site and build it anew whenever a page changes; Ctrl+C ends it."""
    settings = read_settings()
    prepare(settings)
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(SECONDS):
            with suppress(OSError):  # a page is being saved
                prepare(settings)

    threading.Thread(target=follow, daemon=True).start()
    try:
        return zensical("serve")
    except KeyboardInterrupt:
        return 0
    finally:
        ended.set()


if __name__ == "__main__":
    if "--serve" in sys.argv:
        sys.exit(serve())
    found = build()
    print("\n".join(found), file=sys.stderr)
    sys.exit(bool(found))
