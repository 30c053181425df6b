"""`hpcdist checkpoint FILE`: what a checkpoint holds, without unpickling any of it."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime

from hpcdist._checkpoints.belonging import CheckpointMismatch
from hpcdist._checkpoints.reading import Summary, summary
from hpcdist._cli.schedulers import print_line


def main(options: argparse.Namespace) -> int:
    """Print what is in the file; 1 if it is no checkpoint."""
    try:
        facts = summary(options.file)
    except OSError as exc:
        print_line(f"hpcdist checkpoint: {options.file}: {exc.strerror}")
        return 1
    except CheckpointMismatch as exc:
        print_line(f"hpcdist checkpoint: {exc}")
        return 1
    for name, value in _lines(facts):
        print(f"{name:<10}{value}")
    return 0


def _lines(facts: Summary) -> list[tuple[str, str]]:
    whose, of = facts.belonging, ""
    if whose is not None and whose.items is not None:
        of = f" of {whose.items}"
    lines = [
        ("map", "unknown" if whose is None else f"{whose}"),
        ("finished", f"{facts.items}{of} items"),
        ("size", f"{facts.nbytes:,} bytes"),
        ("first", _when(facts.first)),
        ("last", _when(facts.last)),
    ]
    if facts.owner is not None:
        lines.append(("writer", f"{facts.owner}, last heard of {_when(facts.owner.time)}"))
    if facts.torn:
        lines.append(("torn", f"{facts.torn:,} bytes at the end, which the next map writes over"))
    return lines


def _when(time: float | None) -> str:
    return "-" if time is None else f"{datetime.fromtimestamp(time, UTC).astimezone():%F %T}"
