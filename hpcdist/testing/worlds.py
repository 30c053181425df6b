"""Simulated worlds: what `addprocs` starts in a simulation, and their keepers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from hpcdist._cluster.world import World
from hpcdist._contract.kept_managers import KeptManager, LaunchView, Plan, WorldView
from hpcdist._contract.managers import Settings
from hpcdist._keeper.keeper_link import RemoteKeeper
from hpcdist._keeper.processes import Op
from hpcdist._transport.contracts import Way
from hpcdist._wire.greeting import Hello
from hpcdist._wire.member import JobEnd
from hpcdist.testing.ways import MpiWorld, SimLink

_GRACE = 1.0  # seconds that ranks have to leave when their world ends


class Computer(Protocol):
    """What starts and ends the processes of a simulation."""

    def start_worker(self, world: SimWorld, rank: int) -> None:
        """Start a worker."""

    def signal(self, pid: int, number: int) -> None:
        """Send a signal to a process."""

    def lose_world(self, number: int) -> None:
        """End all workers of a world at once."""

    def tell_driver(self, delay: float, act: Any) -> None:
        """Have process 1 hear of something."""


class SimKeeper(RemoteKeeper):
    """The keeper of a simulated world: ends its ranks, and says how they ended."""

    gone = "its keeper was killed"

    def __init__(self, computer: Computer, world: SimWorld) -> None:
        self.host = "simulated"
        self._computer = computer
        self._world = world
        self._living: dict[int, int] = {}  # pids by rank
        self._is_gone = False

    @property
    def world_number(self) -> int:
        """The number of its world."""
        return self._world.number

    def started(self, rank: int, pid: int) -> None:
        """Note that a rank has started."""
        self._living[rank] = pid
        self._tell({"ev": "started", "rank": rank})

    def ended(self, rank: int, status: int) -> None:
        """Note that a rank has ended."""
        self._living.pop(rank, None)
        self._tell({"ev": "exit", "rank": rank, "status": status, "abort": [], "launcher": None})

    def _tell(self, event: Op) -> None:
        if not self._is_gone:
            self._computer.tell_driver(0.0, lambda: self._world.hear(event))

    def send(self, op: Op) -> None:
        """Do what process 1 wants."""
        if self._is_gone:
            raise OSError("the keeper has ended")
        if op["op"] == "kill":
            pid = self._living.get(op["rank"])
            if pid is not None:
                self._computer.signal(pid, op["signal"])
        elif op["op"] == "end":
            self._computer.tell_driver(_GRACE, self._end)

    def _end(self) -> None:
        for pid in list(self._living.values()):
            self._computer.signal(pid, 9)
        self._tell({"ev": "ended"})

    def lose(self) -> list[int]:
        """End at once, as with the host; return the pids of the ranks that go with it."""
        self._tell({"ev": "ended"})
        self._is_gone = True
        return list(self._living.values())

    def fileno(self) -> int:
        """Return no descriptor: a simulation watches none."""
        return -1

    def close(self) -> None:
        """Take note that process 1 listens no more."""
        self._is_gone = True


class SimWorld(World):
    """A world of simulated workers."""

    def __init__(self, launch: LaunchView, size: int | None, computer: Computer) -> None:
        super().__init__(launch, size)
        self._computer = computer
        self.watcher = SimKeeper(computer, self)
        self.shared = MpiWorld()

    def prepare(self) -> None:
        """Do nothing: simulated workers need no door and no folder."""

    def begin(self) -> None:
        """Start the workers."""
        assert self.expected is not None
        self.mpi = self.settings.isolation != "process"
        if self.take(self.watcher):
            self.up = True
            self.has_keeper = True
            for rank in range(self.expected):
                self._computer.start_worker(self, rank)

    def hear(self, event: Op) -> None:
        """Take note of what the keeper says."""
        if self.keeper is not None:
            self._on_event(event)

    def greet(self, link: SimLink, hello: Hello) -> None:
        """Take in a worker that has dialled."""
        for greeted in self._admitted(link, hello):  # type: ignore[arg-type]  # its World._link knows
            self._register(*greeted, None)

    def _link(self, sock: Any) -> Way:
        link: SimLink = sock
        link.ended = self._roster.lost_link
        return link


class SimManager(KeptManager):
    """Starts simulated workers.

    Args:
        computer: Starts their processes.
        sizes: How many workers each world has.
    """

    can_renew = True

    def __init__(self, computer: Computer, sizes: Sequence[int]) -> None:
        self._computer = computer
        self._sizes = sizes

    def prepare(self, settings: Settings) -> Plan:
        """Plan the worlds."""
        return Plan(settings, tuple(self._sizes))

    def make_world(self, launch: LaunchView, size: int | None) -> SimWorld:
        """Make a world."""
        return SimWorld(launch, size, self._computer)

    def start(self, launch: LaunchView) -> None:
        """Start all worlds of a launch."""
        for world in launch.worlds:
            launch.background(lambda world=world: self.start_world(launch, world))  # type: ignore[misc]

    def start_world(self, launch: LaunchView, world: WorldView) -> None:
        """Start one world."""
        assert isinstance(world, SimWorld)
        world.begin()


class SimJobWorld(SimWorld):
    """A world whose workers are started by a job, which may have to wait."""

    def set_clock(self) -> None:
        """Give its workers so much time to register, once the job runs."""
        if self.up:
            super().set_clock()


class SimJobs(SimManager):
    """Starts simulated workers as a batch scheduler does: each world is a job, which waits first.

    Args:
        computer: Starts their processes.
        n: How many workers there are in a job.
        wait: Tells how many seconds the next job is to wait.
        walltime: After how many seconds a job is ended.
    """

    can_adapt = True

    def __init__(
        self,
        computer: Computer,
        n: int,
        wait: Callable[[], float],
        walltime: float | None = None,
    ) -> None:
        super().__init__(computer, [n])
        self._wait = wait
        self._walltime = walltime
        self._ids = itertools.count(1)

    def prepare(self, settings: Settings) -> Plan:
        """Plan the jobs."""
        (n,) = self._sizes
        adapt = settings.adapt
        jobs = 1 if adapt is None else min(adapt.lo, adapt.max_queued)
        return Plan(settings, (n,) * jobs, walltime=self._walltime, each=n)

    def make_world(self, launch: LaunchView, size: int | None) -> SimWorld:
        """Make the world of a job."""
        return SimJobWorld(launch, size, self._computer)

    def start_world(self, launch: LaunchView, world: WorldView) -> None:
        """Submit the job of one world."""
        assert isinstance(world, SimWorld)
        world.job = SimJob(str(next(self._ids)))
        world.submitted_at = launch.node.machine.now()
        launch.changed()
        self._computer.tell_driver(self._wait(), lambda: self._run(world))

    def _run(self, world: SimWorld) -> None:
        if world.closed:  # it was taken out of the queue
            return
        world.begin()
        world.set_clock()
        world.up_at = world.launch.node.machine.now()
        if self._walltime is not None:
            end = world.launch.node.machine.time() + self._walltime
            world.set_end(JobEnd(end, self._walltime))
            lose = lambda: self._computer.lose_world(world.number)
            self._computer.tell_driver(self._walltime, lose)


class SimJob(str):
    """The id of a simulated job."""

    cluster = None
