"""`python -m hpcdist.testing swarm --seeds 0..299`: random programs on simulated clusters."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from hpcdist.testing.scale import HEADING, costs, table
from hpcdist.testing.swarm.play import Failure, play
from hpcdist.testing.swarm.program import Program, random_program
from hpcdist.testing.swarm.shrinking import shrunk

_TAIL = 60  # records of a failing run that are printed
_MOST = 10  # failures after which a swarm ends


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m hpcdist.testing", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    swarm = commands.add_parser("swarm", help="play the programs of many seeds")
    swarm.add_argument("--seeds", default="0..299", help="the first and the last, as in 0..299")
    rough = "interrupt in series, and let processes be slow"
    swarm.add_argument("--rough", action="store_true", help=rough)
    swarm.add_argument("--no-shrink", action="store_true", help="do not look for shorter programs")
    replay = commands.add_parser("replay", help="play the program of one seed, and print all of it")
    replay.add_argument("seed", type=int)
    replay.add_argument("--rough", action="store_true", help=rough)
    replay.add_argument("--shrink", action="store_true", help="look for a shorter program first")
    scale = commands.add_parser("scale", help="tell what process 1 sends and receives")
    scale.add_argument("--workers", type=int, default=256)
    scale.add_argument("--worlds", type=int, default=8)
    scale.add_argument("--items", type=int, default=10_000, help="of a map and a loop")
    scale.add_argument(
        "--table", nargs="+", metavar="WORKERS/WORLDS", help="print a table of several sizes"
    )
    args = parser.parse_args(argv)
    if args.command == "scale":
        return _scale(args)
    if args.command == "replay":
        return _replay(random_program(args.seed, rough=args.rough), shrink=args.shrink)
    try:
        first, last = map(int, args.seeds.split(".."))
    except ValueError:
        parser.error(f"--seeds takes the first and the last, as in 0..299, not {args.seeds!r}")
    return _swarm(first, last, rough=args.rough, shrink=not args.no_shrink)


def _scale(args: argparse.Namespace) -> int:
    if not args.table:
        print(HEADING)
        for cost in costs(args.workers, args.worlds, args.items):
            print(cost, flush=True)
        return 0
    found = {}
    for size in args.table:
        workers, _, worlds = size.partition("/")
        found[f"{workers} in {worlds}"] = [*costs(int(workers), int(worlds), args.items)]
    print(table(found))
    return 0


def _swarm(first: int, last: int, *, rough: bool, shrink: bool) -> int:
    begin, failed = time.monotonic(), list[int]()
    for seed in range(first, last + 1):
        program = random_program(seed, rough=rough)
        failure = play(program)
        if failure is not None:
            failed.append(seed)
            _show(program, failure, shrink=shrink)
            if len(failed) == _MOST:
                break
    seconds = time.monotonic() - begin
    count = seed - first + 1 if last >= first else 0
    print(f"{count} seeds in {seconds:.1f} s, {len(failed)} failed{_named(failed)}")
    return 1 if failed else 0


def _named(failed: Sequence[int]) -> str:
    return ": " + ", ".join(map(str, failed)) if failed else ""


def _show(program: Program, failure: Failure, *, shrink: bool) -> None:
    print(failure)
    if shrink:
        program, failure = shrunk(program, failure)
        print(f"shorter: {failure.what}")
    print(program)
    for record in failure.trace[-_TAIL:]:
        print(record)
    rough = " --rough" * program.rough
    print(f"again: python -m hpcdist.testing replay{rough} {program.seed}\n", flush=True)


def _replay(program: Program, *, shrink: bool) -> int:
    failure = play(program)
    if failure is not None and shrink:
        program, failure = shrunk(program, failure)
    print(program)
    if failure is None:
        print("all is well")
        return 0
    for record in failure.trace:
        print(record)
    print(failure)
    return 1


if __name__ == "__main__":
    sys.exit(main())
