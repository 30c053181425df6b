"""What the victim is at when it happens: a function for each moment of a worker that serves."""

import operator
from collections.abc import Callable
from typing import Any

import hpcdist
from benchmarks.crashes import victim
from benchmarks.crashes.stage import Stage
from benchmarks.crashes.victim import MB, Part
from hpcdist import remotecall, remotecall_fetch

LARGE = 200 * MB
_TO_ALL = 20 * MB


def idle(stage: Stage) -> None:
    """It does nothing; what it owes has been asked for before."""


def receiving(stage: Stage) -> None:
    """200 MB are on their way to it, from process 1 and from a worker beside it."""
    load = Part(bytes(LARGE))
    near = stage.near[0]
    right = LARGE.__eq__
    stage.repeat(
        "a large argument", lambda: remotecall_fetch(victim.length, stage.victim, load), right
    )
    stage.repeat(
        "a large argument from beside",
        lambda: remotecall_fetch(_send_large, near, stage.victim),
        right,
        [near],
    )
    stage.a_moment(0.3)


def _send_large(pid: int) -> int:
    return remotecall_fetch(victim.length, pid, Part(bytes(LARGE)))


def unpickling(stage: Stage) -> None:
    """It reads an argument."""
    call = remotecall(victim.never, stage.victim, victim.SlowToRead())
    stage.wait("a call with an argument", call.fetch)
    stage.until_here()


def python(stage: Stage) -> None:
    """It computes in Python, with a call in the queue behind."""
    stage.wait("a call", remotecall(victim.busy, stage.victim).fetch)
    stage.until_here()
    if stage.cell.cause in ("SIGKILL", "SIGSEGV", "SIGTERM", "os._exit", "MPI_Abort", "keeper"):
        stage.wait("a call in the queue", remotecall(victim.busy, stage.victim).fetch)


def c(stage: Stage) -> None:
    """It computes in C, and holds the interpreter's lock."""
    stage.wait("a call", remotecall(victim.stuck_in_c, stage.victim).fetch)
    stage.until_here()


def pickling(stage: Stage) -> None:
    """It writes a result."""
    call = remotecall(victim.slow_to_pickle, stage.victim)
    stage.wait("a call with a result", call.fetch)
    stage.until_here()


def sending(stage: Stage) -> None:
    """200 MB are on their way from it, to process 1 and to a worker beside it."""
    near = stage.near[0]
    stage.repeat(
        "a large result",
        lambda: victim.length(remotecall_fetch(victim.make, stage.victim, LARGE)),
        LARGE.__eq__,
    )
    stage.repeat(
        "a large result for one beside",
        lambda: remotecall_fetch(_fetch_large, near, stage.victim),
        LARGE.__eq__,
        [near],
    )
    stage.a_moment(0.3)


def _fetch_large(pid: int) -> int:
    return victim.length(remotecall_fetch(victim.make, pid, LARGE))


def channel(stage: Stage) -> None:
    """It owns a channel; process 1 and three workers take from it."""
    stage.channel = hpcdist.RemoteChannel(4, stage.victim)
    for pid in (*stage.near, stage.far):
        taking = remotecall(hpcdist.take, pid, stage.channel)
        stage.wait(f"a taker, worker {pid}", taking.fetch, [pid])
    stage.wait("a taker, process 1", stage.channel.take)
    if stage.cell.cause in ("memory", "import", "disk"):
        stage.wait("a call meanwhile", remotecall(victim.busy, stage.victim).fetch)


def bcast(stage: Stage) -> None:
    """A value is on its way to it and those beside it."""
    pids = [stage.victim, *stage.near]
    load = Part(bytes(_TO_ALL))

    def operation() -> int:
        with hpcdist.bcast(load, pids=pids) as value:
            return remotecall_fetch(victim.length, stage.victim, value)

    stage.repeat("a broadcast", operation, _TO_ALL.__eq__)
    stage.a_moment(0.1)


def scatter(stage: Stage) -> None:
    """Parts are on their way to it and those beside it."""
    pids = [stage.victim, *stage.near]
    parts = [Part(bytes(_TO_ALL)) for _ in pids]

    def operation() -> int:
        values = hpcdist.scatter(parts, pids=pids)
        try:
            return remotecall_fetch(_length_of_first, stage.victim, values[0])
        finally:
            for value in values:
                value.free()

    stage.repeat("parts for all", operation, _TO_ALL.__eq__)
    stage.a_moment(0.1)


def _length_of_first(parts: list[Part]) -> int:
    return victim.length(parts[0])


def gather(stage: Stage) -> None:
    """Parts are on their way from it and those beside it."""
    pids = [stage.victim, *stage.near]

    def operation() -> list[int]:
        made = [remotecall(victim.make, pid, _TO_ALL) for pid in pids]
        return [victim.length(part) for part in hpcdist.gather(made)]

    stage.repeat("parts of all", operation, ([_TO_ALL] * len(pids)).__eq__)
    stage.a_moment(0.1)


def reduce(stage: Stage) -> None:
    """A sum over it and others is under way."""
    pids = [stage.victim, *stage.near, stage.far]
    stage.repeat(
        "a sum",
        lambda: victim.first(hpcdist.reduce(operator.add, victim.piece, pids=pids)),
        float(len(pids)).__eq__,
    )
    stage.a_moment(0.1)


def spmd(stage: Stage) -> None:
    """It is in a collective operation of MPI with those beside it."""
    stage.may_go |= set(stage.near)  # where MPI has no other way to free them
    section = hpcdist.spmd.submit(victim.section, pids=[stage.victim, *stage.near], grace=1)
    stage.wait("a section", section.fetch)
    stage.until_here()


def rmprocs(stage: Stage) -> None:
    """It is busy, and is to leave."""
    call = remotecall(victim.busy, stage.victim)
    stage.wait("a call", call.fetch)
    stage.until_here()
    stage.wait("its removal", lambda: hpcdist.rmprocs(stage.victim))
    stage.a_moment(0.3)


def called(stage: Stage) -> None:
    """Two workers wait for it, one beside and one elsewhere."""
    for pid in (stage.near[0], stage.far):
        call = remotecall(remotecall_fetch, pid, victim.busy, stage.victim)
        stage.wait(f"a call by worker {pid}", call.fetch, [pid])
    stage.until_here()


SCENES: dict[str, Callable[[Stage], Any]] = {
    scene.__name__: scene
    for scene in (
        idle,
        receiving,
        unpickling,
        python,
        c,
        pickling,
        sending,
        channel,
        bcast,
        scatter,
        gather,
        reduce,
        spmd,
        rmprocs,
        called,
    )
}
