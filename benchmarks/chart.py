"""The charts of the documentation: what each costs beside `handwritten`, and its round trips."""

from collections.abc import Iterable, Iterator

from benchmarks.contenders import HANDWRITTEN, LEAN, OURS
from benchmarks.measuring import Row

_SHOWN = (LEAN, OURS)
_KEYS = frozenset("ABCDEGH")
_LEFT, _UNIT, _BAR, _GAP, _TOP = 330, 240, 12, 12, 50
_WIDEST = 1.75
_SVG = 'xmlns="http://www.w3.org/2000/svg" role="img" font-family="sans-serif" font-size="12"'
_STYLE = """<style>
text { fill: #1f2328; stroke: #ffffff; stroke-width: 3px; paint-order: stroke; }
line { stroke: #59636e; stroke-dasharray: 3 3; }
.ground { fill: #ffffff; }
.lean { fill: #8c959f; }
.ours { fill: #0969da; }
.on_first_write { fill: #1a7f37; }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3; stroke: #0d1117; }
line { stroke: #9198a1; }
.ground { fill: #0d1117; }
.lean { fill: #7d8590; }
.ours { fill: #4493f8; }
.on_first_write { fill: #3fb950; }
}
</style>"""
"""A reader's dark mode has light letters; an edge of the ground's colour lets a line pass behind them."""
_TRIPS = ("lean", "ours", "on_first_write")
_TRIP = 90


def chart(rows: list[Row]) -> str:
    """Draw the bars of the measures on Starlette, and of those without a framework."""
    shown = [row for row in rows if row.key in _KEYS and row.framework in {"", "Starlette"} and _drawn(row)]
    step = len(_SHOWN) * _BAR + _GAP
    width, height = _LEFT + round(_UNIT * _WIDEST) + 60, _TOP + len(shown) * step + 10
    line = _LEFT + _UNIT
    return "\n".join(
        [
            f'<svg {_SVG} viewBox="0 0 {width} {height}">',
            "<title>What each measure costs beside a middleware written by hand: less is better</title>",
            _STYLE,
            f'<rect class="ground" width="{width}" height="{height}"/>',
            *_legend(_SHOWN),
            f'<text x="{line}" y="{_TOP - 14}" text-anchor="middle">{HANDWRITTEN} = 1</text>',
            f'<line x1="{line}" x2="{line}" y1="{_TOP - 8}" y2="{height - 10}"/>',
            *(part for at, row in enumerate(shown) for part in _bars(row, _TOP + at * step)),
            "</svg>\n",
        ]
    )


def _drawn(row: Row) -> bool:
    return row.unit in {"us over bare", "ns", "ratio"} or (row.key, row.unit) == ("G", "us") or row.key == "H"


def _legend(shown: Iterable[str]) -> Iterator[str]:
    for at, name in enumerate(shown):
        x = _LEFT + at * 80
        yield f'<rect x="{x}" y="10" width="{_BAR}" height="{_BAR}" class="{name}"/>'
        yield f'<text x="{x + 16}" y="20">{name}</text>'


def _bars(row: Row, top: int) -> Iterator[str]:
    what = row.what.replace("`", "")
    yield f'<text x="{_LEFT - 10}" y="{top + 15}" text-anchor="end">{row.key} {what}</text>'
    for at, name in enumerate(_SHOWN):
        value = row.figures[name].median / row.figures[HANDWRITTEN].median
        length = round(_UNIT * max(0.0, min(value, _WIDEST)))
        y = top + at * _BAR
        yield f'<rect x="{_LEFT}" y="{y}" width="{length}" height="{_BAR - 1}" class="{name}"/>'
        yield f'<text x="{_LEFT + length + 5}" y="{y + 9}" font-size="11">{value:.2f}</text>'


def trips_chart(found: list[tuple[str, ...]], columns: tuple[str, ...]) -> str:
    """Draw the round trips of what the floors can do, too."""
    rows = [(f"{driver}: {what}", dict(zip(columns, cells, strict=True))) for driver, what, *cells in found]
    rows = [(what, cells) for what, cells in rows if cells[LEAN]]
    step = len(_TRIPS) * _BAR + _GAP
    width, height = _LEFT + 5 * _TRIP, _TOP + len(rows) * step + 10
    return "\n".join(
        [
            f'<svg {_SVG} viewBox="0 0 {width} {height}">',
            "<title>Round trips of a unit: less is better</title>",
            _STYLE,
            f'<rect class="ground" width="{width}" height="{height}"/>',
            *_legend(_TRIPS),
            *(part for at, row in enumerate(rows) for part in _trips(*row, _TOP + at * step)),
            "</svg>\n",
        ]
    )


def _trips(what: str, cells: dict[str, str], top: int) -> Iterator[str]:
    yield f'<text x="{_LEFT - 10}" y="{top + 20}" text-anchor="end">{what}</text>'
    for at, name in enumerate(_TRIPS):
        count = cells[name].partition(" ")[0]
        if count:
            length, y = int(count) * _TRIP, top + at * _BAR
            yield f'<rect x="{_LEFT}" y="{y}" width="{length}" height="{_BAR - 1}" class="{name}"/>'
            yield f'<text x="{_LEFT + length + 5}" y="{y + 9}" font-size="11">{count}</text>'
