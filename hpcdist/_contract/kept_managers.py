"""Managers whose workers a keeper starts, and what they see of a launch and its worlds."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from hpcdist._contract.managers import ClusterManager, Settings
from hpcdist._contract.phases import Phase
from hpcdist._keeper.keeper_link import KeeperLink, RemoteKeeper
from hpcdist._keeper.leash import Leash
from hpcdist._runtime.node import Node
from hpcdist._wire.member import JobEnd


@dataclass(frozen=True)
class Plan:
    """What a launch is to be: its manager makes it once, before anything else, and it is kept.

    Attributes:
        settings: What was asked for.
        sizes: How many workers each world is to have; None: that is not known yet.
        interface: By which interface of this host others are to reach it; None: by any.
        walltime: For how many seconds its jobs may run, if its options say so.
        linger: For how many seconds its jobs wait for another driver; None: they end with this one.
        each: How many workers one job has, where there are as many as are called for.
    """

    settings: Settings
    sizes: tuple[int | None, ...] = (None,)
    interface: str | None = None
    walltime: float | None = None
    linger: float | None = None
    each: int = 0


class LaunchView(Protocol):
    """A launch, as its manager and its worlds see it."""

    node: Node  # the process that it is for
    plan: Plan
    settings: Settings
    reason: str | None  # why its jobs wait, in the scheduler's words
    estimated_start: datetime.datetime | None
    leash: Leash  # what runs for it in the background
    jobs_of: JobManager | None  # its manager, where that asks a scheduler
    on_network: bool
    hosts_apart: bool

    @property
    def is_renewed(self) -> bool:
        """Whether workers that it loses are replaced."""

    @property
    def goes_on(self) -> bool:
        """Whether workers are to come, or are there."""

    @property
    def walltime(self) -> float | None:
        """For how long its jobs may run, if its options say so."""

    @property
    def manager(self) -> ClusterManager: ...
    @property
    def worlds(self) -> Sequence[WorldView]: ...
    @property
    def pids(self) -> list[int]: ...
    @property
    def jobs(self) -> list[str]: ...
    @property
    def error(self) -> Exception | None: ...
    @property
    def pending(self) -> bool:
        """Whether workers are still to come."""

    def background(self, fn: Callable[[], object]) -> None:
        """Run something that may block on a thread of its own; its error fails the launch."""

    def every(self, fn: Callable[[], float]) -> None:
        """Call something on a background thread again and again, until the launch is over.

        It returns in how many seconds it is to be called again.
        """

    def fail(
        self,
        what: BaseException | str,
        phase: str = "",
        tail: Sequence[str] = (),
        world: Any = None,
    ) -> None:
        """Give the launch up, or one of its worlds where it can do without."""

    def changed(self) -> None:
        """Wake all who wait for this launch: its state may have changed."""


class WorldView(Protocol):
    """One world of a launch, as managers see it. They say how it is started, and how far it is."""

    number: int
    expected: int | None  # how many workers are to come; None: not known yet
    first: int  # the pid of its rank 0
    keeper: KeeperLink | RemoteKeeper | None
    has_keeper: bool
    ranks_may_leave: bool
    command: str
    label: str  # what tells it from the launch's other worlds
    job: Any  # the scheduler's id
    verdict: Any  # and what it last said of the job
    up: bool
    stays: bool  # its job is to outlive it: `linger=`
    renews: bool  # it takes the place of workers that were lost, or are about to be
    end: JobEnd | None  # of the job, where that is known
    submitted_at: float
    folder: str
    seats: Sequence[int]  # which of the launch's workers, counted from 0, they are
    join: dict[str, Any]
    door: Any  # the `Listener` that its workers dial; None: there is none any more
    mpi: bool
    env: dict[str, str]

    @property
    def launch(self) -> LaunchView: ...
    @property
    def settings(self) -> Settings: ...
    @property
    def join_file(self) -> str: ...
    @property
    def closed(self) -> bool: ...
    @property
    def phase(self) -> Phase: ...
    def reach(self, phase: Phase) -> None:
        """Note that its start has come so far."""

    @property
    def has_arrived(self) -> bool:
        """Whether all of its workers have greeted, or no more will come."""

    def log(self, n: int = 20) -> list[str]:
        """Return the last lines that it has printed."""

    def set_clock(self) -> None:
        """Give its workers so much time, from now on, to register."""

    def set_end(self, end: JobEnd | None) -> None:
        """Note when its job ends."""

    def save_join(self, **changes: Any) -> None:
        """Write the join file, which is the cluster's secret."""

    def move_to(self, folder: str, job: Any) -> bool:
        """Run in another job's folder; False: its keeper has come, to the folder it has."""

    def take(self, keeper: KeeperLink | RemoteKeeper) -> bool:
        """Take charge of a keeper that is being started; False if the world has ended."""

    def watch(self, keeper: KeeperLink | RemoteKeeper) -> None:
        """Listen to a keeper that works for this world."""


class KeptManager(ClusterManager):
    """A manager whose workers a keeper starts and watches."""

    own_params: Iterable[str] | None = ()
    # Whether its workers are on other hosts, and come in over the network.
    on_network = False
    # Whether each of its worlds is a host by itself, with folders of its own: it fails alone.
    hosts_apart = False
    # Whether the folders that its workers see may be none of this host.
    elsewhere = False
    # Whether it has `start_world`, and so can replace what a launch has lost: `renew=True`.
    can_renew = False
    # Whether it starts jobs of one size, as many as are called for: `adapt=`.
    can_adapt = False

    @property
    def inside(self) -> bool:
        """Whether its workers are the other ranks of the MPI launch that this process is in."""
        return False

    def enter(self, settings: Settings | None = None) -> None:
        """Make workers of the other ranks, for good."""
        raise NotImplementedError

    def block(self, settings: Settings) -> AbstractContextManager[list[int] | None]:
        """Make workers of the other ranks for the length of a block; these get None."""
        raise NotImplementedError

    def reuse(self, settings: Settings) -> LaunchView | None:
        """Return the launch that is open already, with these settings from now on, if one is."""
        return None

    def make_world(self, launch: LaunchView, size: int | None) -> Any:
        """Make a world of a kind of its own; None: the usual one."""
        return None

    def prepare(self, settings: Settings) -> Plan:
        """Refuse what is wrong with the settings, before anything is made; plan the launch."""
        return Plan(settings)

    def start(self, launch: LaunchView) -> None:
        """See to it that the keepers of a launch's worlds are started.

        What may take its time, or fail, belongs into `launch.background`.
        """
        raise NotImplementedError

    def start_world(self, launch: LaunchView, world: WorldView) -> None:
        """Start the keeper of one world, which may replace what the launch has lost.

        It runs in the background and may take a while; an exception is the failure of this world.
        """
        raise NotImplementedError


class JobManager(KeptManager):
    """A manager whose worlds are jobs of a scheduler, on hosts and at a time of its choice."""

    own_params = None
    on_network = True

    def make_folder(self, plan: Plan) -> str:
        """Make a folder for one job, which all hosts see."""
        raise NotImplementedError

    def forget_folder(self, world: WorldView) -> None:
        """Remove the folder of a job that has ended, unless it is to be kept."""
        raise NotImplementedError

    def note(self, launch: LaunchView) -> str:
        """Return how a launch stands, as one line for people."""
        raise NotImplementedError

    def log_of(self, world: WorldView, n: int) -> list[str]:
        """Return the last lines of what the job of a world has written."""
        raise NotImplementedError

    def end_of(self, world: WorldView) -> str | None:
        """Ask how the job of a world ended. May take a while."""
        raise NotImplementedError

    def cancel_jobs(self, launch: LaunchView) -> None:
        """End the jobs of a launch's closed worlds, also one being submitted. May take a while."""
        raise NotImplementedError
