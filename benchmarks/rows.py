"""The rows of the table: what is measured by which driver, and what is asked of it."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Row:
    """A figure. Bounds are ratios to the floor where `against` is "floor", else values.

    Attributes:
        key: Its name in the driver's answer.
        text: Its name in the table.
        unit: Of the value and the floor.
        bound: What has to hold; None: a figure that is only reported.
        aim: What we would like to see.
        more: Whether more is better.
    """

    key: str
    text: str
    unit: str
    bound: float | None = None
    aim: float | None = None
    against: Literal["floor", "value"] = "floor"
    more: bool = False
    # Holds also if the value is below this many floors ("0.5 ms, or twice a bare wake-up").
    or_floors: float | None = None


@dataclass(frozen=True)
class Scenario:
    """A driver and the rows it fills. With `ranks` it runs under mpiexec."""

    name: str
    rows: tuple[Row, ...]
    ranks: int | None = None


_VALUE_MORE: Any = {"against": "value", "more": True}

# Seconds from addprocs(4) to the first result of all four.
START_BOUND = {"mpich": 0.5, "openmpi": 0.8}


def scenarios(mpi: str) -> list[Scenario]:
    """All of them, for an MPI."""
    return [
        Scenario(
            "calls",
            (
                Row("p50", "no-op call, mpirun, p50", "us", 5, 4),
                Row("p99", "no-op call, mpirun, p99", "us", 25, 15),
                Row("outstanding", "20,000 outstanding, each", "us", 3, 1.5),
                Row("channel", "put + take, remote channel, p50", "us", 8),
            ),
            ranks=2,
        ),
        Scenario(
            "between",
            (
                Row("p50", "worker to worker, p50", "us", 5, 4),
                Row("p99", "worker to worker, p99", "us", 25, 15),
            ),
            ranks=3,
        ),
        Scenario("echo", (Row("echo", "64 MB there and back, mpirun", "GB/s", 0.6, more=True),), 2),
        Scenario(
            "outside",
            (
                Row("p50", "no-op call, addprocs(2), p50", "us", 8),
                Row("p99", "no-op call, addprocs(2), p99", "us"),
                Row("echo", "64 MB there and back, addprocs(2)", "GB/s", 0.4, more=True),
                Row("rss", "memory of an idle worker, RSS", "MB", 45, against="value"),
            ),
        ),
        Scenario(
            "idle",
            (
                Row("cpu", "CPU of an idle process, mpirun", "%", 0.5, against="value"),
                Row("wake", "call after 1 s of idleness, p50", "us", 500, None, "value", False, 2),
            ),
            ranks=2,
        ),
        Scenario(
            "idle_outside",
            (
                Row("cpu", "CPU of an idle process, addprocs(2)", "%", 0.5, against="value"),
                Row("wake", "the same call, addprocs(2)", "us", 500, None, "value", False, 2),
            ),
        ),
        Scenario(
            "crowd",
            (
                Row("p50", "no-op call, mpirun, 8 workers, p50", "us"),
                Row("p99", "no-op call, mpirun, 8 workers, p99", "us"),
            ),
            ranks=9,
        ),
        Scenario(
            "crowd_outside",
            (
                Row("p50", "no-op call, addprocs(8), p50", "us"),
                Row("p99", "no-op call, addprocs(8), p99", "us"),
            ),
        ),
        Scenario(
            "start",
            (
                Row(
                    "start",
                    "addprocs(4) to all four results",
                    "s",
                    START_BOUND.get(mpi),
                    against="value",
                ),
            ),
        ),
        Scenario(
            "links",
            (
                Row("time", "256 workers by TLS, time of each to come", "ms"),
                Row("memory", "memory of process 1 for each", "KB"),
                Row("files", "descriptors of process 1 for each", ""),
            ),
        ),
        *_parallel(),
    ]


def _parallel() -> list[Scenario]:
    """Four workers by `addprocs` unless the row says otherwise."""
    spread = [
        Scenario(
            f"everywhere_{n}",
            (
                Row("messages", f"everywhere, {n} workers, messages of pid 1", ""),
                Row("time", f"everywhere, {n} workers", "ms"),
            ),
        )
        for n in (2, 8, 32, 64)
    ]
    return [
        Scenario(
            "maps",
            (
                Row("auto", "pmap of 10,000 no-ops (floor: pool.map)", "M/s", 5, **_VALUE_MORE),
                Row("single", "the same, batch_size=1", "k/s", 100, **_VALUE_MORE),
                Row("checkpoint", "1,000,000 no-ops with checkpoint= (floor: without)", "ms", 1.5),
                Row("calls", "1,000 outstanding calls", "k/s", 150, **_VALUE_MORE),
                Row("closure", "16 MB closure over 200 items", "ms", 100, against="value"),
            ),
        ),
        Scenario(
            "ranks",
            (
                Row(
                    "submit", "500 tasks of 4 ranks on 8 workers, submit", "/s", 300, **_VALUE_MORE
                ),
                Row("map", "the same, pmap", "/s", **_VALUE_MORE),
            ),
        ),
        Scenario(
            "habits",
            (
                Row("pool", "Pool.map of 100,000 no-ops (floor: its model's)", "M/s", 1, more=True),
                Row("object", "method of a RemoteObject (floor: a call)", "us", 1.2),
            ),
        ),
        Scenario(
            "loops",
            (
                Row("loop", "distributed(range(1000), add) (bare)", "us", 60, against="value"),
                Row(
                    "everywhere",
                    'everywhere("1") (bare messages)',
                    "us",
                    80,
                    against="value",
                ),
            ),
        ),
        Scenario(
            "loops_world",
            (
                Row("loop", "the loop, mpirun (bare)", "us", 60, against="value"),
                Row(
                    "everywhere",
                    "everywhere, mpirun (bare messages)",
                    "us",
                    80,
                    against="value",
                ),
            ),
            ranks=5,
        ),
        Scenario(
            "values",
            (
                Row("bcast", "64 MB on 4 workers (floor: MPI_Bcast)", "ms", 20, against="value"),
                Row("sum", "sum of 8 MB arrays (floor: MPI_Reduce)", "ms", 8, against="value"),
            ),
        ),
        Scenario(
            "speedups",
            (
                Row("pi", "Leibniz on 2 workers (floor: two forks)", "x", 1.9, **_VALUE_MORE),
                Row("svd", "sixty SVDs on 2 workers (the same)", "x", 1.8, **_VALUE_MORE),
            ),
        ),
        Scenario(
            "death", (Row("death", "200 items, one worker killed", "s", 0.7, against="value"),)
        ),
        *spread,
    ]
