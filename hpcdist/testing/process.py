"""A simulated process: its machine, its wait loop, its node, and its main thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress

from hpcdist._managers.driver import DRIVER
from hpcdist._runtime.node import Mail, Node, here
from hpcdist._transport.contracts import Slot
from hpcdist._transport.router import Peer
from hpcdist._wire.messages import Welcome
from hpcdist._worker.dialling import Links
from hpcdist._worker.life import Life
from hpcdist._worker.services import EVERY_PROCESS
from hpcdist.testing.baton import Baton, Candidate, SimThread
from hpcdist.testing.records import Trace
from hpcdist.testing.simulated_loop import SimLoop
from hpcdist.testing.simulated_machine import SimMachine
from hpcdist.testing.ways import End, SimLink, SimPlane
from hpcdist.testing.worlds import SimKeeper


class SimProcess:
    """A process of a simulation."""

    def __init__(
        self,
        pid: int,
        host: str,
        baton: Baton,
        trace: Trace,
        exited: Callable[[SimProcess, int], None],
    ) -> None:
        self.pid = pid
        self.slowness = 0.0
        self.is_stopped = False
        self.is_dead = False
        self.halted: list[Candidate] = []
        self._baton = baton
        self._users = 0
        self.machine = SimMachine(baton, self, host, lambda code: exited(self, code))
        self.main_thread: SimThread = baton.make(self, "main", self._main)
        self.machine.main_thread = self.main_thread
        self.machine.main = self.main_thread.ident
        self.loop = SimLoop(baton, self, self.machine, trace)
        self.node = Node(self.machine, self.loop)
        self.node.serve(EVERY_PROCESS)
        self.links: list[SimLink] = []
        self.end = End(pid, self.loop, self.node.deliver, self.links)

    def enter(self) -> None:
        """Make this thread one of the process's."""
        here.node = self.node

    def begin(self) -> None:
        """Let its main thread run."""
        self._baton.offer(self.main_thread)

    def give(self, job: Callable[[], None]) -> None:
        """Run something in this process."""
        raise NotImplementedError

    def give_beside(self, job: Callable[[], None]) -> None:
        """Run something on a thread of its own."""
        self._users += 1
        self._baton.spawn(self, f"user-{self._users}", lambda: self._do(job))

    def _main(self) -> None:
        """Run on the main thread."""
        raise NotImplementedError

    def _do(self, job: Callable[[], None]) -> None:
        job()
        self.loop.rest()

    # What is done to it

    def stop(self) -> None:
        """Let nothing in it run."""
        self.is_stopped = True

    def go_on(self) -> None:
        """Let it run again."""
        self.is_stopped = False
        halted, self.halted = self.halted, []
        for candidate in halted:
            self._baton.offer(candidate)

    def die(self) -> None:
        """Let nothing in it run ever again; its connections end."""
        self.is_dead = True
        for link in list(self.links):
            link.close()


class SimDriver(SimProcess):
    """Process 1: its main thread runs what a test gives it."""

    def __init__(
        self,
        pid: int,
        host: str,
        baton: Baton,
        trace: Trace,
        exited: Callable[[SimProcess, int], None],
    ) -> None:
        self._jobs: deque[Callable[[], None]] = deque()
        super().__init__(pid, host, baton, trace, exited)
        self.node.serve(DRIVER)

    def give(self, job: Callable[[], None]) -> None:
        """Run something on the main thread, after what it was given before."""
        self._jobs.append(job)
        self._baton.wake(self.main_thread)

    def _main(self) -> None:
        self.node.start()
        while True:
            while self._jobs:
                self._do(self._jobs.popleft())
            with suppress(KeyboardInterrupt):  # as at a prompt
                self._baton.sleep()


class SimWorker(SimProcess):
    """A worker: its main thread runs calls."""

    keeper: SimKeeper
    rank: int
    plane: SimPlane | None = None

    def prepare(self, dial: Callable[[], SimLink], timeout: float) -> None:
        """Say how it is to dial process 1, and in what time it is to be welcomed."""
        self._dial = dial
        self._timeout = timeout
        self._welcome = Slot()
        self._life = self.node.service(Life)
        self._links = self.node.service(Links)

    def give(self, job: Callable[[], None]) -> None:
        """Run something on a thread of its own."""
        self.give_beside(job)

    def _main(self) -> None:
        node = self.node
        node.turns.serving = True
        node.turns.expect_main()
        node.start()
        link = self._dial()
        link.ended = self._life.lost_master
        master = node.peers[1] = Peer(1, self.loop)
        master.link, link.peer = link, master
        node.on(Welcome)(self._on_welcome)
        link.begin()
        self.loop.wait(self._welcome, self.machine.now() + self._timeout)
        self.machine.set_sigint(node.turns.on_sigint)
        node.turns.serve()
        self._life.say_goodbye()
        self.machine.exit(0, lambda: None)

    def _on_welcome(self, said: Welcome, mail: Mail) -> None:
        node = self.node
        node.me = said.me
        node.topology = said.topology
        node.turns.set_limit(said.concurrency)
        if self.plane is not None:
            self.plane.open({rank: said.first + rank for rank in range(self.plane.size)}, self.peer)
        if said.topology != "all_to_all":
            node.forbidden = self._life.forbidden
        self._life.meet(said.me, said.member)
        node.tune()
        self.loop.complete(self._welcome)

    def peer(self, pid: int) -> Peer:
        """Find the peer behind a rank, or make it."""
        return self._links.known(pid)
