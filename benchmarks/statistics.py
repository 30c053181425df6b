"""From rounds of measured pairs to one figure.

A machine with neighbours adds to every time and takes from none, so the better third of the
rounds says what the code costs. The third is chosen for ours and for the floor apart: chosen by
their ratio, the rounds in which a neighbour disturbed the floor would win.
"""

from collections.abc import Sequence
from dataclasses import dataclass


def quantile(times: Sequence[float], q: float) -> float:
    """Return a quantile of measured times."""
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def median(times: Sequence[float]) -> float:
    """Return the middle one of measured times."""
    return quantile(times, 0.5)


@dataclass(frozen=True)
class Pair:
    """A value of ours and the floor of the same round."""

    ours: float
    floor: float


def best_third(pairs: Sequence[Pair], more_is_better: bool = False) -> Pair:
    """Average the better third of ours, and that of the floors."""

    def mean(values: list[float]) -> float:
        chosen = sorted(values, reverse=more_is_better)[: max(1, len(values) // 3)]
        return sum(chosen) / len(chosen)

    return Pair(mean([p.ours for p in pairs]), mean([p.floor for p in pairs]))
