"""Play the matrix, or a part of it, and print a table of what was found.

python -m benchmarks.crashes [--only TEXT] [--ways mpi,process] [--sample N] [--seed N] [-o FILE]

It runs with the MPI of the environment it is called in. The exit code is 1 if a cell is wrong.
"""

import argparse
import datetime
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.crashes.driver import SAID
from benchmarks.crashes.in_jobs import Jobs
from benchmarks.crashes.matrix import AT_START, CAUSES, MOMENTS, WAYS, Cell, cells, drawn
from benchmarks.statistics import median
from tests.helpers import mpi_flavour

_LIMIT = 400.0  # seconds for one cell, with all the waits in it that may be lost
_BATCH = 34  # cells that share a driver
_BOUNDS = {"mpi": 0.5, "process": 0.5, "slurm": 2.0}


def main() -> int:
    """Play what was asked for; 1 if anything is wrong."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and clean up
    options = _options()
    todo = [c for c in cells(options.ways) if all(w in str(c).split("/") for w in options.only)]
    if options.sample is not None:
        todo = drawn(todo, options.sample, options.date)
    if not todo:
        names = ", ".join((*WAYS, *CAUSES, *MOMENTS))
        sys.exit(f"no cell has all of {options.only}; the words are: {names}")
    print(f"{len(todo)} cells with {mpi_flavour()}, seed {options.seed}", flush=True)
    begin = time.monotonic()
    results = []
    for result in play(todo, options.seed):
        results.append(result)
        print(_line(result), flush=True)
    summary = _summary(results, time.monotonic() - begin)
    print("\n" + _table(results) + "\n\n" + summary)
    if options.output:
        lines = [_line(result) for result in results]
        Path(options.output).write_text(
            f"{_heading(options.seed)}\n\n{_table(results)}\n\n{summary}\n\n"
            + "\n".join(lines)
            + "\n"
        )
    return int(any(result["faults"] for result in results))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crashes", description=__doc__)
    parser.add_argument(
        "--only",
        metavar="WORD",
        nargs="+",
        default=[],
        help="cells with these words in their names, as in: --only SIGKILL bcast",
    )
    parser.add_argument(
        "--ways",
        type=lambda text: text.split(","),
        default=["mpi", "process"],
        help="mpi, process, slurm: kinds of workers (slurm takes root, and a Slurm installed)",
    )
    parser.add_argument("--sample", type=int, metavar="N", help="N cells only, drawn by the date")
    parser.add_argument(
        "--date", default=datetime.date.today().isoformat(), help="draw as on another day"
    )
    parser.add_argument("--seed", type=int, default=1, help="decides the moments within moments")
    parser.add_argument("-o", "--output", metavar="FILE", help="keep the table there")
    options = parser.parse_args()
    if unknown := set(options.ways) - set(WAYS):
        parser.error(f"--ways knows {', '.join(WAYS)}, not {', '.join(sorted(unknown))}")
    return options


def play(todo: Sequence[Cell], seed: int) -> Iterator[dict[str, Any]]:
    """Play cells, those of one way in one driver after the other; yield what was found of each."""
    for way in dict.fromkeys(cell.way for cell in todo):
        rest = [cell for cell in todo if cell.way == way]
        with Jobs() if way == "slurm" else _Here() as place:
            while rest:
                batch, rest = rest[:_BATCH], rest[_BATCH:]
                done = 0
                for result in _play_batch(place, batch, seed):
                    done += 1
                    yield result
                rest = batch[done:] + rest  # a driver that hung took the cells behind with it


class _Here:
    """Drivers on this machine."""

    def __enter__(self) -> "_Here":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, args: Sequence[str], log: Path) -> "subprocess.Popen[str]":
        with log.open("w") as err:
            return subprocess.Popen(
                [sys.executable, "-m", "benchmarks.crashes.driver", *args],
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
                start_new_session=True,
            )

    def end(self, process: "subprocess.Popen[str]") -> None:
        """Ask a driver that hangs for its stacks, and kill it."""
        if process.poll() is None:
            os.kill(process.pid, signal.SIGUSR1)
            time.sleep(1.0)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _play_batch(place: Any, batch: Sequence[Cell], seed: int) -> Iterator[dict[str, Any]]:
    log = Path(os.environ.get("TMPDIR", "/tmp"), f"crashes-{os.getpid()}.err")
    process = place.start([str(seed), *map(str, batch)], log)
    waiting = list(batch)
    try:
        for said in _said(process):
            if "cell" in said:
                waiting.pop(0)
                yield said
        if waiting:
            place.end(process)
            tail = log.read_text(errors="replace")[-6000:]
            faults = [f"the driver hung, or ended with {process.returncode}: {tail}"]
            yield {"cell": str(waiting[0]), "faults": faults, "seconds": None}
    finally:
        place.end(process)
        process.stdout.close()
        log.unlink(missing_ok=True)


def _said(process: "subprocess.Popen[str]") -> Iterator[dict[str, Any]]:
    """Yield what a driver says, until it ends or has said nothing for too long."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while selector.select(_LIMIT):
            line = process.stdout.readline()
            if not line:
                return
            if line.startswith(SAID):
                yield json.loads(line.removeprefix(SAID))


def _heading(seed: int) -> str:
    when = datetime.datetime.now().isoformat(timespec="minutes")
    return f"{when}, {mpi_flavour()}, seed {seed}, {len(os.sched_getaffinity(0))} cores"


def _line(result: dict[str, Any]) -> str:
    seconds = result.get("seconds")
    figure = "skipped" if result.get("skipped") else f"{seconds:.3f} s" if seconds else "-"
    lines = [f"{result['cell']:32}{figure:>10}  {'WRONG' if result['faults'] else 'ok'}"]
    return "\n".join([*lines, *(f"    {fault}" for fault in result["faults"])])


def _table(results: Sequence[dict[str, Any]]) -> str:
    """One line a moment, one column a cause: milliseconds until the last of the waiters knew."""
    found = {result["cell"]: result for result in results}
    lines = []
    for way in WAYS:
        mine = [r for r in results if r["cell"].startswith(f"{way}/")]
        if not mine:
            continue
        lines.append(f"{way:12}" + "".join(f"{cause:>10}" for cause in CAUSES))
        for moment in MOMENTS:
            row = [_figure(found.get(str(Cell(way, cause, moment)))) for cause in CAUSES]
            lines.append(f"{moment:12}" + "".join(f"{cell:>10}" for cell in row))
        lines.append("")
    return "\n".join(lines).rstrip()


def _figure(result: dict[str, Any] | None) -> str:
    if result is None:
        return ""
    if result["faults"]:
        return "WRONG"
    if result.get("skipped"):
        return "skipped"
    seconds = result["seconds"]
    return "ok" if seconds is None else f"{seconds * 1000:.0f}"


def _summary(results: Sequence[dict[str, Any]], took: float) -> str:
    wrong = [r for r in results if r["faults"]]
    lines = [f"{len(results)} cells in {took:.0f} s, {len(wrong)} wrong"]
    for way, bound in _BOUNDS.items():
        ended = [
            (r["seconds"], r["cell"])
            for r in results
            if r["cell"].startswith(f"{way}/")
            and r.get("dead")
            and r["seconds"] is not None
            and not {"spmd", "rmprocs", *AT_START} & set(r["cell"].split("/"))
        ]
        if not ended:
            continue
        over = [cell for seconds, cell in ended if seconds > bound]
        middle = 1000 * median([seconds for seconds, _ in ended])
        lines.append(
            f"{way}: {len(ended)} deaths known to all after {middle:.0f} ms in the median,"
            f" {max(ended)[0]:.2f} s at the most ({max(ended)[1]});"
            f" {len(over)} later than {bound:g} s"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
