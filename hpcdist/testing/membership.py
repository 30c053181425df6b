"""The processes of a simulated cluster: how they start, find each other, and end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hpcdist._cluster.begin import Launches
from hpcdist._managers.lifecycle import addprocs
from hpcdist._transport.router import Peer
from hpcdist._wire.greeting import Hello
from hpcdist._worker.dialling import Links
from hpcdist.testing.baton import Baton
from hpcdist.testing.network import Network
from hpcdist.testing.process import SimDriver, SimProcess, SimWorker
from hpcdist.testing.ways import SimLink, SimPlane, link
from hpcdist.testing.worlds import SimManager, SimWorld

_STARTING = 0.05  # seconds that a worker takes to start, at the most
_WORD = 0.02  # seconds until the word of a keeper arrives, at the most
_SIGTERM, _SIGKILL = 15, 9


class Cluster:
    """The processes of a simulation."""

    def __init__(self, baton: Baton, network: Network, per_host: int = 1) -> None:
        self._per_host = per_host
        self._baton = baton
        self._network = network
        self._processes: dict[int, SimProcess] = {}
        self.driver = SimDriver(1, "host1", baton, network.trace, self._exited)
        self._processes[1] = self.driver
        self.driver.node.service(Launches).local = lambda n: SimManager(self, [n])
        self.driver.begin()

    def process(self, pid: int) -> SimProcess:
        """Find a process by its number."""
        found = self._processes.get(pid)
        if found is None:
            raise ValueError(f"no process with id {pid} is simulated")
        return found

    def pids(self) -> list[int]:
        """List all processes, those that have ended too."""
        return list(self._processes)

    def rest(self) -> None:
        """Let each process do what finalisers have left to be done."""
        for process in self._processes.values():
            process.loop.rest()

    def add(self, sizes: Sequence[int], params: dict[str, object]) -> list[int]:
        """Add workers, on process 1."""
        return addprocs(SimManager(self, sizes), **params)

    # Starting

    def start_worker(self, world: SimWorld, rank: int) -> None:
        """Start a worker."""
        pid = world.first + rank
        host = f"host{2 + (pid - 2) // self._per_host}"
        worker = SimWorker(pid, host, self._baton, self._network.trace, self._exited)
        worker.keeper, worker.rank = world.watcher, rank
        self._processes[pid] = worker
        if world.mpi:
            worker.plane = SimPlane(self._network, worker.end, world.shared)
        worker.prepare(lambda: self._dial(worker, world), world.settings.timeout)
        worker.node.service(Links).own_way = lambda peer, member: self._reach(worker, peer)
        world.watcher.started(rank, pid)
        worker.begin()

    def _dial(self, worker: SimWorker, world: SimWorld) -> SimLink:
        """Reach process 1. Called on the worker's main thread."""
        self._baton.sleep(self._baton.now + _STARTING * self._baton.chance())
        near, far = link(self._network, worker.end, self.driver.end)
        hello: Hello = {
            "kind": "worker",
            "world": world.number,
            "rank": worker.rank,
            "host": worker.machine.hostname(),
            "os_pid": worker.machine.pid(),
            "address": "simulated",
        }
        greet = lambda: self.driver.node.turns.background(lambda: world.greet(far, hello))
        near.open_with(greet)
        return near

    def _reach(self, process: SimProcess, peer: Peer) -> bool:
        """Dial another worker. Called on a thread of its own."""
        other = self._processes[peer.pid]
        if other.is_dead:
            return True  # process 1 will tell
        near, far = link(self._network, process.end, other.end)
        theirs = other.node.service(Links)
        near.ended = process.node.service(Links).lost
        far.ended = theirs.lost
        near.open_with(lambda: theirs.take(theirs.known(process.pid), far))
        process.node.service(Links).take(peer, near)
        return True

    # Ending

    def kill(self, process: SimProcess) -> None:
        """End a process at once."""
        self._end(process, -_SIGKILL)

    def signal(self, pid: int, number: int) -> None:
        """Send a signal to a process."""
        process = self.process(pid)
        if number in (_SIGTERM, _SIGKILL):
            self._end(process, -number)

    def lose_world(self, number: int) -> None:
        """End all processes of a world at once, its keeper too."""
        keepers = {
            process.keeper: None
            for process in self._processes.values()
            if isinstance(process, SimWorker) and process.keeper.world_number == number
        }
        for keeper in keepers:
            for pid in keeper.lose():
                self._end(self.process(pid), -_SIGKILL)

    def _exited(self, process: SimProcess, code: int) -> None:
        self._end(process, code)

    def _end(self, process: SimProcess, status: int) -> None:
        if process.is_dead:
            return
        how = "exit" if status >= 0 else "kill"
        self._network.trace.add(self._baton.now, process.pid, how, str(abs(status)))
        process.die()
        if isinstance(process, SimWorker):
            process.keeper.ended(process.rank, status)
        current = self._baton.current
        if current is not None and current.owner is process:
            self._baton.never()

    def tell_driver(self, delay: float, act: Callable[[], None]) -> None:
        """Have process 1 hear of something."""
        due = self._baton.now + delay + _WORD * self._baton.chance()
        self._baton.at(due, lambda: self.driver.loop.arrive(act))

    def forget(self) -> None:
        """Drop the processes."""
        for process in self._processes.values():
            process.machine.clear_away()
        self._processes.clear()
