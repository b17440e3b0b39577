"""Instructions a request, counted by Valgrind's Callgrind: they tell small differences that time hides.

`python -m benchmarks.instructions URL SHARE FOLDER` runs under it, in a process of its own, and switches the
counting on for the requests alone. Where Valgrind is not installed, the rows are left out and the reason is
told.
"""

import asyncio
import gc
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from sqlalchemy import URL, make_url

from benchmarks.contenders import BARE
from benchmarks.measuring import Figure, Plan, Row
from benchmarks.sites import Site, stands

UNIT = "1,000 instructions"
TOOLS = {name: shutil.which(name) or "" for name in ("valgrind", "callgrind_control")}
_KINDS = (
    ("A", "untouched request", "/untouched", 100),
    ("B", "session taken, no SQL", "/taken", 50),
    ("D", "one SELECT on PostgreSQL", "/selected", 40),
    ("E", "one INSERT and COMMIT on PostgreSQL", "/inserted", 30),
)
_TOTAL = re.compile(r"^(?:summary|totals): (\d+)$", re.MULTILINE)


async def instructions(url: str | URL, plan: Plan) -> list[Row]:
    """Thousands of instructions of one request on Starlette, the bare application's included.

    Raises FileNotFoundError where Valgrind is not installed.
    """
    for name, path in TOOLS.items():
        if not path:
            message = f"{name} is not installed"
            raise FileNotFoundError(message)
    with TemporaryDirectory() as folder:
        process = await asyncio.create_subprocess_exec(
            *(TOOLS["valgrind"], "--quiet", "--tool=callgrind", "--instr-atstart=no"),
            f"--callgrind-out-file={folder}/counted",
            *(sys.executable, "-W", "ignore", "-m", "benchmarks.instructions"),
            make_url(url).render_as_string(hide_password=False),
            *(str(plan.share), folder),
            env={**os.environ, "PYTHONHASHSEED": "0"},
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
        )
        output, _ = await process.communicate()
    if process.returncode != 0:
        message = f"counting instructions ended with {process.returncode}"
        raise RuntimeError(message)
    counted: list[dict[str, float]] = json.loads(output)
    return [
        Row(
            key=key,
            what=what,
            unit=UNIT,
            framework="Starlette",
            figures={name: Figure.of([number]) for name, number in numbers.items()},
        )
        for (key, what, *_), numbers in zip(_KINDS, counted, strict=True)
    ]


async def _count_all(url: str, plan: Plan, folder: Path) -> list[dict[str, float]]:
    async with stands(url) as (starlette, *_):
        gc.collect()
        gc.disable()  # on whom a collection falls is chance
        counting = await _count(starlette.sites[BARE], "", 0, folder)
        return [
            {
                name: (await _count(site, "/untouched" if name == BARE else path, times, folder) - counting)
                / (times * 1e3)
                for name, site in (starlette.sites if key in "AB" else starlette.with_session).items()
            }
            for key, _, path, usual in _KINDS
            for times in [plan.times(usual)]
        ]


async def _count(site: Site, path: str, times: int, folder: Path) -> int:
    """Count the instructions of some requests, and of the counting itself, after as many to warm up."""
    for _ in range(2 * times):
        await site.get(path)
    _control("--instr=on")
    _control("--zero")
    for _ in range(times):
        await site.get(path)
    _control("--dump")
    _control("--instr=off")
    return _dumped(folder)


def _dumped(folder: Path) -> int:
    (dump,) = folder.glob("counted.*")
    found = _TOTAL.search(dump.read_text())
    dump.unlink()
    assert found is not None
    return int(found[1])


def _control(command: str) -> None:
    subprocess.run(  # noqa: S603  # this very process is told what to count
        [TOOLS["callgrind_control"], command, str(os.getpid())], check=True, capture_output=True
    )


if __name__ == "__main__":
    url, share, folder = sys.argv[1:]
    print(json.dumps(asyncio.run(_count_all(url, Plan(1, float(share)), Path(folder)))))
