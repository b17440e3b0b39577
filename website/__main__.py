"""Build the site, or serve it: `python -m website [--serve]`."""

import subprocess
import sys
import threading

from website.check import mistakes
from website.llms import write_llms
from website.pages import CONFIGURATION, ROOT, SITE, navigation, prepare, read_settings, sources

SECONDS = 0.5
"""How often a server looks whether a page has changed."""


def build() -> list[str]:
    """Build the site; return what is wrong with it."""
    settings = read_settings()
    listed = [page for _, page in navigation(settings["nav"])]
    wrong = [
        f"mkdocs.yml: the nav names {page}, which does not exist" for page in set(listed) - set(sources())
    ]
    wrong += [f"mkdocs.yml: the nav does not name {page}" for page in set(sources()) - set(listed)]
    wrong += [f"mkdocs.yml: the nav names {page} twice" for page in set(listed) if listed.count(page) > 1]
    prepare(settings)
    if zensical("build", "--strict", "--clean"):
        wrong.append("zensical refused what it says above")
    wrong += mistakes(SITE, str(settings["site_url"]))
    if not wrong:
        write_llms(settings)
    return wrong


def zensical(*arguments: str) -> int:
    """Run zensical as a module, so that it finds this package, and return its exit status."""
    command = [sys.executable, "-m", "zensical", *arguments, "--config-file", str(CONFIGURATION)]
    return subprocess.run(command, cwd=ROOT, check=False).returncode  # noqa: S603  # of our own making


def serve() -> int:
    """Serve the site and build it anew whenever a page changes; Ctrl+C ends it."""
    prepare(read_settings())
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(SECONDS):
            prepare(read_settings())

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
