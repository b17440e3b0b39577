"""What a campaign prints: one table, and what it has found."""

from collections import Counter
from typing import Any, get_args

from campaign.promise import Seen
from campaign.run import QUIET, Result
from campaign.tables import ACCOUNTS, BALANCE


def counts(result: Result) -> Counter[str]:
    """Count what clients saw."""
    return Counter(answer.seen for answer in result.answers)


def by_kind(result: Result) -> Counter[str]:
    """Count what was found, by kind."""
    return Counter(finding.kind for finding in result.findings)


def as_json(result: Result) -> dict[str, Any]:
    """Return everything but the single answers."""
    routes = Counter((answer.route, answer.seen) for answer in result.answers)
    return {
        "server": result.server,
        "seed": result.plan.seed,
        "requests": len(result.answers),
        "seen": dict(counts(result)),
        "routes": {f"{route} {seen}": number for (route, seen), number in sorted(routes.items())},
        "statuses": {str(status): number for status, number in sorted(_statuses(result).items())},
        "in_doubt": sum(bool(answer.doubt) for answer in result.answers),
        "faults": dict(sorted(result.faults.items())),
        "lost": by_kind(result)["lost"],
        "phantom": by_kind(result)["phantom"],
        "torn": by_kind(result)["torn"],
        "leaks": by_kind(result)["leak"],
        "accounts": result.money,
        "transfers": result.transfers,
        "calm": result.calm,
        "left": dict(result.left),
        "longest_recovery": result.recovery,
        "stale": result.stale,
        "memory": result.memory,
        "errors": result.errors,
        "exit_status": result.exit_status,
        "findings": [str(finding) for finding in result.findings],
    }


def _statuses(result: Result) -> Counter[int]:
    return Counter(answer.status for answer in result.answers)


def table(result: Result) -> str:
    """Return the report as text."""
    seen = get_args(Seen)
    routes = Counter((answer.route, answer.seen) for answer in result.answers)
    lines = [f"{result.server}, seed {result.plan.seed}: {len(result.answers)} requests", ""]
    lines.append(f"{'route':24}" + "".join(f"{name:>14}" for name in seen))
    lines += [
        f"{route:24}" + "".join(f"{routes[route, name]:>14}" for name in seen)
        for route in sorted({answer.route for answer in result.answers})
    ]
    lines.append(f"{'all':24}" + "".join(f"{counts(result)[name]:>14}" for name in seen))
    lines += ["", f"{'fault':40}{'times':>8}"]
    lines += [f"{kind:40}{times:>8}" for kind, times in sorted(result.faults.items())]
    found = by_kind(result)
    seconds, kind = result.recovery
    lines += [
        "",
        f"lost {found['lost']}, phantom {found['phantom']}, torn {found['torn']}, leaks {found['leak']}",
        f"refused in doubt (COMMIT cut short, and said so): {sum(bool(a.doubt) for a in result.answers)}",
        f"the accounts hold {result.money} of {ACCOUNTS * BALANCE} after {result.transfers} transfers",
        f"answered as they should be when the faults had stopped: {result.calm} of {QUIET} requests",
        *(f"{kind} at the end: {number}" for kind, number in result.left.items()),
        f"longest recovery {seconds:.3f} s, after: {kind or 'nothing'}",
        f"failed on a connection that broke while idle: {result.stale}",
        f"exit status after SIGTERM: {result.exit_status}",
        *(f"{key} before, half way, after: {values}" for key, values in result.memory.items()),
        f"log records at ERROR: {result.errors}",
        "",
    ]
    if result.findings:
        lines.append(f"GUILTY, seed {result.plan.seed}:")
        lines += [str(finding) for finding in result.findings[:40]]
    else:
        lines.append("nothing lost, nothing that should not be there, nothing left behind")
    return "\n".join(lines)
