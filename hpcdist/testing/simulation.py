"""A cluster in one process: real nodes on a simulated network, a virtual clock and a seed."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Generic, ParamSpec, TypeVar

from hpcdist._runtime.node import Node, here
from hpcdist.testing.baton import BEGINNING, Baton, SimThread, SimulationError
from hpcdist.testing.membership import Cluster
from hpcdist.testing.network import Network, Traffic
from hpcdist.testing.process import SimProcess
from hpcdist.testing.records import Trace
from hpcdist.testing.simulated_machine import SimMachine

P = ParamSpec("P")
T = TypeVar("T")
_FOREVER = float("inf")
_ACQUAINTED = 1.0  # seconds until all workers have heard of each other


def compute(seconds: float) -> None:
    """Take so much virtual time, as a computation would: the call that is in it keeps its turn."""
    machine = here.node.machine
    if not isinstance(machine, SimMachine):
        raise RuntimeError("compute() is for functions that run in a simulation")
    machine.compute(seconds)


class Deadlock(SimulationError):
    """Every thread waits, and nothing is left that could end a wait."""


class Task(Generic[T]):
    """Something that runs on a simulated process."""

    def __init__(
        self, simulation: Simulation, process: SimProcess, name: str, work: Callable[[], T]
    ) -> None:
        self.name = name
        self.process = process
        self._simulation = simulation
        self._work = work
        self._value: T | None = None
        self._error: BaseException | None = None
        self._is_done = False
        self._waiting: list[SimThread] = []
        self.ends_run = False

    def __call__(self) -> None:
        baton = self._simulation.baton
        try:
            self._value = self._work()
        except Exception as exc:
            self._error = exc
        except KeyboardInterrupt as exc:
            self._error = exc
        self._is_done = True
        for thread in self._waiting:
            baton.wake(thread)
        if self.ends_run:
            baton.stop()

    def done(self) -> bool:
        """Tell whether it has ended."""
        return self._is_done

    def result(self) -> T:
        """Let the simulation run until it has ended; return what it returned, or raise."""
        if not self._is_done:
            self._simulation.await_task(self)
        if self._error is not None:
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error  # or its frames, this one among them, would keep what they have
        return self._value  # type: ignore[return-value]

    def wait_inside(self) -> None:
        """Wait on a simulated thread."""
        baton = self._simulation.baton
        me = baton.running()
        self._waiting.append(me)
        try:
            while not self._is_done:
                baton.sleep()
        finally:
            self._waiting.remove(me)


class SimNode:
    """One process of a simulation, as tests see it."""

    def __init__(self, simulation: Simulation, process: SimProcess) -> None:
        self.pid = process.pid
        self._simulation = simulation
        self._process = process

    @property
    def node(self) -> Node:
        """The real node inside."""
        return self._process.node

    def run(self, f: Callable[P, T], /, *args: P.args, **kw: P.kwargs) -> T:
        """Run `f(*args, **kw)` in this process and return its result.

        In process 1 it runs on the main thread, elsewhere on a thread of its own. The simulation
        runs until it has ended.
        """
        return self.start(f, *args, **kw).result()

    def start(self, f: Callable[P, T], /, *args: P.args, **kw: P.kwargs) -> Task[T]:
        """Have `f(*args, **kw)` run in this process as soon as the simulation runs."""
        return self._start(self._process.give, f, args, kw)

    def _start(
        self,
        give: Callable[[Callable[[], None]], None],
        f: Callable[..., T],
        args: tuple[Any, ...],
        kw: dict[str, Any],
    ) -> Task[T]:
        if self._process.is_dead:
            raise SimulationError(f"process {self.pid} has ended")
        name = getattr(f, "__qualname__", "the task")
        task = Task(self._simulation, self._process, name, lambda: f(*args, **kw))
        give(task)
        return task

    def start_beside(self, f: Callable[P, T], /, *args: P.args, **kw: P.kwargs) -> Task[T]:
        """Have `f(*args, **kw)` run in this process on a thread of its own."""
        return self._start(self._process.give_beside, f, args, kw)

    def __repr__(self) -> str:
        return f"<simulated process {self.pid}>"


def _shares(count: int, worlds: int) -> list[int]:
    """Divide workers among worlds."""
    return [count * (k + 1) // worlds - count * k // worlds for k in range(worlds)]


class Simulation:
    """A cluster of real nodes in this process: process 1 and `nodes - 1` workers.

    Args:
        nodes: How many processes there are.
        seed: Decides who goes on when several could, and how long messages take. The same seed
            gives the same run, message by message.
        worlds: How many worlds the workers are in: sets that were started together, and have MPI
            between them. With `isolation="process"` they have only links.
        per_host: How many workers share a host.
        unrest: How often a thread loses the processor within hpcdist's own functions, at the points
            where CPython may take it away, rather than where it waits: 0.01 is once in a hundred.
        **params: As of `addprocs`: `topology`, `concurrency`, `isolation`, `renew` and so on.

    Example:
        >>> import hpcdist
        >>> from hpcdist.testing import Simulation
        >>> with Simulation(nodes=3, seed=1) as sim:
        ...     sim.node(1).run(lambda: hpcdist.remotecall_fetch(pow, 2, 2, 10))
        1024
    """

    def __init__(
        self,
        nodes: int = 4,
        seed: int = 0,
        *,
        worlds: int = 1,
        per_host: int = 1,
        unrest: float = 0.0,
        **params: Any,
    ) -> None:
        if nodes < 1:
            raise ValueError(f"a simulation has at least process 1, not {nodes} processes")
        self.seed = seed
        self.trace = Trace(BEGINNING)
        self.baton = Baton(seed, self.trace, unrest)
        self.network = Network(self.baton, self.trace)
        self.faults: list[BaseException] = []
        self._ended = False
        self.cluster = Cluster(self.baton, self.network, per_host)
        if nodes > 1:
            self.node(1).run(self.cluster.add, _shares(nodes - 1, worlds), params)
            self.advance(_ACQUAINTED)

    # Looking

    def node(self, pid: int) -> SimNode:
        """Return a process by its number."""
        return SimNode(self, self.cluster.process(pid))

    @property
    def now(self) -> float:
        """Seconds since the beginning, by the virtual clock."""
        return self.baton.now - BEGINNING

    def traffic(self, sender: int, receiver: int) -> Traffic:
        """Tell how many messages and bytes one process has sent to another."""
        return self.network.traffic.get((sender, receiver), Traffic())

    @property
    def pids(self) -> list[int]:
        """The processes that there are, and that there were."""
        return self.cluster.pids()

    def has_ended(self, pid: int) -> bool:
        """Tell whether a process has ended."""
        return self.cluster.process(pid).is_dead

    # Running

    def advance(self, seconds: float) -> None:
        """Let so much virtual time pass."""
        self._run(self.baton.now + seconds)

    def collect(self) -> None:
        """Collect garbage, which the simulation does at no other time; processes act on it."""
        gc.collect()
        self.cluster.rest()

    def await_task(self, task: Task[Any]) -> None:
        """Run until a task has ended."""
        if self.baton.current is not None:
            task.wait_inside()
            return
        task.ends_run = True
        self._run(_FOREVER)
        if task.process.is_dead and not task.done():
            raise SimulationError(f"process {task.process.pid} ended while it ran {task.name}")
        if not task.done():
            raise Deadlock(
                f"{task.name} waits for something that will never happen (seed {self.seed}, "
                f"after {self.now:.3f} s):\n{self.baton.stacks()}"
            )

    def _run(self, until: float) -> None:
        if self._ended:
            raise SimulationError("the simulation has ended")
        with self._quietly():
            self.baton.run(until)
        if self.faults:
            faults, self.faults = self.faults, []
            raise faults[0]

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """Let nothing come between that is not the seed's: no garbage collection, no printing."""
        collects, hook = gc.isenabled(), sys.excepthook
        gc.disable()
        sys.excepthook = lambda kind, error, trace: self.faults.append(error)
        try:
            yield
        finally:
            sys.excepthook = hook
            if collects:
                gc.enable()

    # Doing harm

    def kill(self, *pids: int) -> None:
        """End processes at once, as by SIGKILL."""
        for pid in pids:
            self.cluster.kill(self.cluster.process(pid))

    def lose_world(self, number: int) -> None:
        """End all workers of a world at once, as with its host or its job; the first is 1."""
        self.cluster.lose_world(number)

    def stop(self, *pids: int) -> None:
        """Stop processes, as by SIGSTOP: their connections stay, and nothing in them runs."""
        for pid in pids:
            self.cluster.process(pid).stop()

    def go_on(self, *pids: int) -> None:
        """Let stopped processes go on."""
        for pid in pids:
            self.cluster.process(pid).go_on()

    def slow(self, pid: int, seconds: float) -> None:
        """Let a process take up to so many seconds for each of its steps; 0: none."""
        self.cluster.process(pid).slowness = seconds

    def press_ctrl_c(self, pid: int = 1) -> None:
        """Press Ctrl-C at a process's terminal."""
        process = self.cluster.process(pid)
        self.trace.add(self.baton.now, pid, "ctrl-c", "")
        process.machine.interrupt_main()

    def jump(self, pid: int, seconds: float) -> None:
        """Let a process's clock jump."""
        process = self.cluster.process(pid)
        process.machine.skew += seconds
        process.loop.clock_has_jumped()

    def delay(
        self, low: float, high: float | None = None, *, between: Collection[int] | None = None
    ) -> None:
        """Let messages take `low` to `high` seconds from now on.

        Args:
            low: The least.
            high: The most; as much as the least, if it is not given.
            between: Only messages between these processes; all, if it is not given.
        """
        pids = sorted(between) if between is not None else []
        pairs = [(a, b) for a in pids for b in pids if a != b]
        self.network.delay(low, low if high is None else high, pairs)

    def partition(self, *groups: Collection[int]) -> None:
        """Let nothing through between groups of processes, until `heal`.

        Messages wait meanwhile; nothing is lost, and no connection ends.
        """
        for one in groups:
            for other in groups:
                if one is not other:
                    self.network.cut([(a, b) for a in sorted(one) for b in sorted(other)])

    def heal(self) -> None:
        """Join what `partition` has parted."""
        self.network.heal()

    # Ending

    def close(self) -> None:
        """End all processes, without a word."""
        if not self._ended:
            self._ended = True
            with self._quietly():
                self.baton.end()
            self.cluster.forget()

    def __enter__(self) -> Simulation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
