"""Words of a generated corpus, counted by all workers; their dictionaries meet up a tree."""

import random
import zlib

import hpcdist
from hpcdist import distributed

LINES = 20_000
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "then",
    "it",
    "sleeps",
]


def line(number: int) -> str:
    """Make one line of the corpus, the same on every process."""
    chosen = random.Random(zlib.crc32(b"%d" % number))
    return " ".join(chosen.choices(WORDS, k=12))


def count(numbers: range) -> dict[str, int]:
    counts: dict[str, int] = {}
    for number in numbers:
        for word in line(number).split():
            counts[word] = counts.get(word, 0) + 1
    return counts


def merge(left: dict[str, int], right: dict[str, int]) -> dict[str, int]:
    for word, n in right.items():
        left[word] = left.get(word, 0) + n
    return left


def main() -> None:
    hpcdist.init(4)
    counts = distributed(range(LINES), merge, chunked=True)(count)
    assert sum(counts.values()) == 12 * LINES
    for word, n in sorted(counts.items(), key=lambda item: -item[1])[:3]:
        print(f"{word:8}{n:8}")


if __name__ == "__main__":
    main()
