"""Fuzz for as long as is wanted, and print figures.

python -m tests.fuzz [--minutes N] [--only NAME] [--seed N]

What fails is made as small as it gets, printed, and put into the corpus, from where the tests try
it for ever after.
"""

import argparse
import hashlib
import resource
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz import all_targets
from tests.fuzz.inputs import inputs
from tests.fuzz.target import CORPUS, Target

_ROUND = 400  # inputs of one target, before the next one has its turn
_LONGEST = 10  # seconds that one input may take
_ADDRESS_SPACE = 8 << 30  # bytes: an input that wants more memory gets MemoryError


@dataclass
class Tally:
    """What was tried of one target."""

    inputs: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)


def main() -> int:
    """Fuzz; 1 if something was found."""
    options = _options()
    chosen = [target for target in all_targets() if options.only in (None, target.name)]
    if not chosen:
        sys.exit(f"no target is called {options.only!r}")
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    signal.signal(signal.SIGALRM, _too_long)
    print(f"{len(chosen)} targets, seed {options.seed}", flush=True)
    tallies = {target.name: Tally() for target in chosen}
    end = time.monotonic() + 60 * options.minutes
    number = options.seed
    while time.monotonic() < end:
        for target in chosen:
            if time.monotonic() >= end:
                break
            _one_round(target, number, tallies[target.name])
        number += 1
    return _report(tallies)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--only", metavar="NAME", help="one target alone")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    return parser.parse_args()


def _too_long(number: int, frame: FrameType | None) -> None:
    raise AssertionError(f"one input took longer than {_LONGEST} s")


def _one_round(target: Target, number: int, tally: Tally) -> None:
    smallest = b""

    @seed(number)
    @settings(
        max_examples=_ROUND,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(data=inputs(target))
    def attempt(data: bytes) -> None:
        nonlocal smallest
        begin = time.perf_counter()
        signal.alarm(_LONGEST)
        try:
            tally.refused += not target.accepts(data)
        except BaseException:
            smallest = data
            raise
        finally:
            signal.alarm(0)
            taken = time.perf_counter() - begin
            tally.inputs += 1
            tally.seconds += taken
            tally.slowest = max(tally.slowest, taken)

    try:
        attempt()
    except KeyboardInterrupt:
        raise
    except BaseException as exc:  # whatever the reader has raised
        kind = f"{type(exc).__name__}: {exc}"[:100]
        tally.faults[kind] += 1
        if tally.faults[kind] == 1:
            path = _keep(target, smallest)
            print(f"{target.name}: {kind}\n  by {smallest[:200]!r}, kept in {path}", flush=True)


def _keep(target: Target, data: bytes) -> str:
    folder = CORPUS / target.folder
    folder.mkdir(exist_ok=True)
    path = folder / f"failed-{hashlib.sha256(data).hexdigest()[:10]}"
    path.write_bytes(data)
    return str(path.relative_to(CORPUS.parent.parent.parent))


def _report(tallies: dict[str, Tally]) -> int:
    print(f"\n{'':26}{'inputs':>10}{'refused':>10}{'a second':>10}{'slowest':>10}{'faults':>8}")
    for name, tally in tallies.items():
        rate = tally.inputs / tally.seconds if tally.seconds else 0
        print(
            f"{name:26}{tally.inputs:>10,}{tally.refused:>10,}{rate:>10,.0f}"
            f"{tally.slowest * 1e3:>7.0f} ms{len(tally.faults):>8}"
        )
    total = sum(tally.inputs for tally in tallies.values())
    faults = sum(len(tally.faults) for tally in tallies.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"\n{total:,} inputs, {faults} faults, at most {peak:.0f} MB")
    return int(faults > 0)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
