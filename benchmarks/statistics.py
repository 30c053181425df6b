"""From rounds of measured pairs to one figure.

A machine with neighbours adds to every time and takes from none, so the better third of the
rounds says what the code costs. Rounds are ordered by the ratio of ours to the floor beside it.
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
    """Average the third of the rounds that did best against their floor."""
    ordered = sorted(pairs, key=lambda p: p.ours / p.floor, reverse=more_is_better)
    chosen = ordered[: max(1, len(ordered) // 3)]
    return Pair(
        sum(p.ours for p in chosen) / len(chosen), sum(p.floor for p in chosen) / len(chosen)
    )
