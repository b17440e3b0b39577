"""How it is measured: contenders take turns in one run, and a claim compares what lay side by side."""

import statistics
from collections.abc import Awaitable, Callable, Iterable, Mapping

from attrs import frozen

from benchmarks.contenders import BARE, HANDWRITTEN, OURS

Measurement = Callable[[], Awaitable[float]]
Samples = Mapping[str, list[float]]


@frozen
class Plan:
    """How long to measure: so many rounds, each with this share of the usual requests."""

    rounds: int
    share: float

    def times(self, usual: int) -> int:
        """Return how often to do something in one round."""
        return max(2, round(usual * self.share))


FULL = Plan(25, 1)
QUICK = Plan(7, 0.25)


@frozen
class Figure:
    """The middle of all rounds, and the two ends."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Figure":
        """Summarise the rounds."""
        values = sorted(values)
        return cls(statistics.median(values), values[0], values[-1])


@frozen(kw_only=True, eq=False)
class Row:
    """One line of the table: what was measured, for whom, and what the target was."""

    key: str
    what: str
    unit: str
    figures: dict[str, Figure]
    framework: str = ""
    target: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether this package meets the target; None where there is none."""
        return None if self.target is None else self.figures[OURS].median <= self.target


async def in_turn(measurements: Mapping[str, Measurement], rounds: int) -> Samples:
    """Measure each once per round; who begins moves on from round to round. The first round is not kept."""
    names = list(measurements)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            value = await measurements[name]()
            if turn:
                samples[name].append(value)
    return samples


def plain(samples: Samples) -> dict[str, Figure]:
    """Take the values as they are."""
    return {name: Figure.of(values) for name, values in samples.items()}


def over_bare(samples: Samples) -> dict[str, Figure]:
    """Take what each adds to the bare application in the same round; the bare one stays as it is."""
    return {BARE: Figure.of(samples[BARE])} | {
        name: Figure.of(value - bare for value, bare in zip(values, samples[BARE], strict=True))
        for name, values in samples.items()
        if name != BARE
    }


def ratio(samples: Samples, reference: str = HANDWRITTEN) -> dict[str, Figure]:
    """Take the quotient with the reference of the same round."""
    return {
        name: Figure.of(value / unit for value, unit in zip(values, samples[reference], strict=True))
        for name, values in samples.items()
    }
