"""Measure, and print one table: every figure with the floor of the same run.

python -m benchmarks [--quick] [--only NAME] [--json FILE] [--against FOLDER]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.driver import MARK
from benchmarks.rows import Row, Scenario, scenarios
from benchmarks.statistics import median
from tests.helpers import mpi_environment, mpi_flavour, mpiexec

_TIME_LIMIT = 300
_QUICK = 0.3
_PAIRS = 3
_SLACK = 1.05  # a figure is worse where every pair of runs says so by more than this


@dataclass(frozen=True)
class Result:
    """A row with what was measured."""

    name: str
    row: Row
    value: float
    floor: float

    @property
    def ratio(self) -> float | None:
        return self.value / self.floor if self.floor else None

    @property
    def holds(self) -> bool | None:
        """Whether the bound holds; None where there is none."""
        row = self.row
        if row.bound is None:
            return None
        if row.against == "value":
            if row.more:
                return self.value >= row.bound
            limit = max(row.bound, (row.or_floors or 0) * self.floor)
            return self.value <= limit
        assert self.ratio is not None
        return self.ratio >= row.bound if row.more else self.ratio <= row.bound


def main() -> int:
    """Run the drivers and print the table; 1 if a bound does not hold."""
    options = _options()
    mpi = mpi_flavour()
    todo = [s for s in scenarios(mpi) if options.only in (None, s.name)]
    if not todo:
        names = ", ".join(s.name for s in scenarios(mpi))
        sys.exit(f"no scenario is called {options.only!r}; there are: {names}")
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    print(f"hpcdist with {mpi}, {cores} cores, load {load:.1f} before\n")
    if load > 0.5:
        print("This machine is busy: ratios of what spins and p99 say little.\n")
    scale = _QUICK if options.quick else 1.0
    if options.against:
        return _compare(todo, os.path.abspath(options.against), scale)
    print(_line("", "value", "floor", "ratio", "bound", "aim", "holds"))
    results, broken = [], False
    for scenario in todo:
        try:
            figures = _run(scenario, scale)
        except RuntimeError as exc:
            print(f"{scenario.name}: {exc}")
            broken = True
            continue
        for row in scenario.rows:
            result = Result(scenario.name, row, *figures[row.key])
            results.append(result)
            print(_row(result), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(_as_json(mpi, results), indent=1))
    return int(broken or any(r.holds is False for r in results))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a third of the rounds")
    parser.add_argument("--only", metavar="NAME", help="one scenario only")
    parser.add_argument("--json", metavar="FILE", help="write the results there, too")
    parser.add_argument(
        "--against",
        metavar="FOLDER",
        help="another checkout of hpcdist: run both by turns, and print how they compare",
    )
    return parser.parse_args()


def _compare(todo: list[Scenario], folder: str, scale: float) -> int:
    """Run each scenario here and in another checkout by turns; 1 if a figure is worse here."""
    print(f"{'':37}{'here':>11}{'there':>11}{'pairs, below 1 is better here':>34}")
    worse = False
    for scenario in todo:
        try:
            pairs = [(_run(scenario, scale), _run(scenario, scale, folder)) for _ in range(_PAIRS)]
        except RuntimeError as exc:
            print(f"{scenario.name}: {exc}")
            worse = True
            continue
        for row in scenario.rows:
            if not all(row.key in run for pair in pairs for run in pair):
                print(f"{row.text:37}  one of the two does not measure this")
                continue
            here, there = ([run[row.key][0] for run in side] for side in zip(*pairs, strict=True))
            costs = [t / h if row.more else h / t for h, t in zip(here, there, strict=True)]
            is_worse = min(costs) > _SLACK
            worse |= is_worse
            print(
                f"{row.text:37}{median(here):>11.3g}{median(there):>11.3g}"
                f"{'  '.join(f'{cost:.2f}' for cost in costs):>34} {row.unit}"
                f"{'  WORSE' if is_worse else ''}",
                flush=True,
            )
    return int(worse)


def _run(scenario: Scenario, scale: float, folder: str | None = None) -> dict[str, list[float]]:
    """Run a driver, of another checkout if one is named."""
    argv = [sys.executable, "-m", "benchmarks.driver", scenario.name, str(scale)]
    one_thread = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(one_thread, "1")}  # as the workers have it
    if folder is not None:
        environment["PYTHONPATH"] = folder
    if scenario.ranks is not None:
        argv = [*mpiexec(scenario.ranks), *argv]
        environment.update(mpi_environment())
    try:
        done = subprocess.run(
            argv,
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_TIME_LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no end within {_TIME_LIMIT} s: {argv}") from None
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            figures: dict[str, list[float]] = json.loads(line.removeprefix(MARK))
            return figures
    raise RuntimeError(f"ended with {done.returncode} and no figures:\n{done.stderr[-2000:]}")


def _row(result: Result) -> str:
    row = result.row
    sign = ">=" if row.more else "<="
    unit = " F" if row.against == "floor" else f" {row.unit}"
    bound = f"{sign} {row.bound:g}{unit}" if row.bound is not None else ""
    if row.or_floors is not None:
        bound += f" or {row.or_floors:g} F"
    return _line(
        row.text,
        f"{result.value:.3g} {row.unit}",
        f"{result.floor:.3g}" if result.floor else "",
        f"{result.ratio:.2f}" if result.ratio is not None else "",
        bound,
        f"{row.aim:g}" if row.aim is not None else "",
        {True: "yes", False: "NO", None: ""}[result.holds],
    )


def _line(text: str, *cells: str) -> str:
    widths = (11, 7, 6, 17, 5, 6)
    return f"{text:37}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))


def _as_json(mpi: str, results: list[Result]) -> dict[str, Any]:
    return {
        "mpi": mpi,
        "cores": len(os.sched_getaffinity(0)),
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "rows": [{**asdict(r), "ratio": r.ratio, "holds": r.holds} for r in results],
    }


if __name__ == "__main__":
    sys.exit(main())
