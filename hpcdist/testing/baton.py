"""The threads of a simulation, and the baton: who holds it runs, all others stand still.

A thread gives the baton away where it would block, and at other points where the seed says so. Who
gets it next is chosen by chance, and the seed makes the chance the same each time. When nobody can
run, the clock jumps to the next event.

Two kinds of candidates wait for the baton: threads that can go on, and wait loops with something to
do, which name the thread that does it.
"""

from __future__ import annotations

import enum
import heapq
import importlib
import pkgutil
import random
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Protocol

from hpcdist.testing.records import Trace

BEGINNING = 1000.0  # the time at which a simulation begins: 0.0 often means "never"
_STACK = 1 << 20  # bytes of address space for a thread
# Choices in a row at one moment, from which on nothing will ever be done; and more for each thread,
# as a large cluster has much to do at a moment.
_RESTLESS, _RESTLESS_EACH = 100_000, 100
_GIVES_WAY = 0.25  # how often a thread gives the baton away where it need not
_HOUSE = f"{Path(__file__).parents[1]}/"
_WATCHED = {"_transport", "_runtime", "_remote", "_collective", "_maps", "_cluster", "_worker"}
_KEPT = {"_compiled", "_libc"}  # functions of these rooms whose results the interpreter keeps
_LOOK = 1.0  # seconds, real ones
_PATIENCE = 30.0  # the same
_UNWINDING = 5.0  # seconds, real ones, for a thread to end


@cache
def _is_watched(code: CodeType) -> bool:
    """Tell whether a thread may lose the baton in this function: one of a process's own state.

    What the interpreter keeps, and not a process, is left out: it would differ from run to run.
    """
    room = code.co_filename.removeprefix(_HOUSE).partition("/")[0]
    is_ours = code.co_filename.startswith(_HOUSE) and room in _WATCHED
    return is_ours and code.co_name not in _KEPT


@cache
def _import_watched() -> None:
    """Import what is watched: a run must not see whether one before it has imported a module."""
    for room in sorted(_WATCHED):
        package = importlib.import_module(f"hpcdist.{room}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")


class Unwind(BaseException):
    """Ends a thread of a simulation that is over."""


class State(enum.Enum):
    """What a thread does."""

    READY = "ready"  # it waits for the baton
    RUNNING = "running"
    ASLEEP = "asleep"  # it waits for something to happen
    ENDED = "ended"


class Candidate(Protocol):
    """Who may get the baton next."""

    @property
    def owner(self) -> Owner: ...
    def chosen(self) -> SimThread | None:
        """Return the thread that is to run; None if there is no reason any more."""


class Owner(Protocol):
    """The process that a candidate belongs to."""

    pid: int
    slowness: float  # virtual seconds until it goes on, at the most
    is_stopped: bool
    is_dead: bool
    halted: list[Candidate]  # its candidates, while it is stopped

    def enter(self) -> None:
        """Make this thread one of the process's."""

    def die(self) -> None:
        """Let nothing in it run ever again."""


class SimThread:
    """A thread of a simulated process."""

    def __init__(self, baton: Baton, owner: Owner, name: str, work: Callable[[], None]) -> None:
        self.name = name
        self.owner = owner
        self.state = State.READY
        self.naps = 0  # how often it has slept: says whether an alarm is still meant for it
        self.signals: deque[Callable[[], None]] = deque()  # what is to be run on it
        self.error: type[BaseException] | None = None  # what is to be raised in it
        self.locks = 0  # how many it holds
        self.is_doomed = False
        self.go = threading.Lock()  # released by the thread that hands the baton over
        self.go.acquire()
        self._baton = baton
        self._work = work
        usual = threading.stack_size(_STACK)
        try:
            self.thread = threading.Thread(target=self._run, name=f"sim-{name}", daemon=True)
            self.thread.start()
        finally:
            threading.stack_size(usual)

    @property
    def ident(self) -> int:
        """What `threading.get_ident` says in it."""
        return self.thread.ident or 0

    def chosen(self) -> SimThread:
        """Return this thread: it is always worth its turn."""
        return self

    def _run(self) -> None:
        self.go.acquire()
        try:
            if not self.is_doomed:
                self._baton.begin(self)
                self.owner.enter()
                self._baton.watch()
                self._work()
        except Unwind:
            pass
        except BaseException:
            sys.excepthook(*sys.exc_info())
        sys.setprofile(None)
        self.state = State.ENDED
        if not self.is_doomed:
            self._baton.pass_on()


class Baton:
    """The right to run, and the clock."""

    def __init__(self, seed: int, trace: Trace, unrest: float = 0.0) -> None:
        if unrest:
            _import_watched()
        self.now = BEGINNING
        self.unrest = unrest
        self.chance = random.Random(f"hpcdist {seed}").random
        self.threads: list[SimThread] = []
        self.current: SimThread | None = None  # None: the thread that runs the simulation
        self.failure: Exception | None = None
        self._trace = trace
        self._candidates: list[Candidate] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0
        self._choices = 0  # at this moment
        self._until = BEGINNING
        self._is_choosing = False
        self._steps = 0
        self._is_over = False  # the outside wants the baton back
        self._outside = threading.Lock()
        self._outside.acquire()
        self._last: SimThread | None = None

    # Threads

    def make(self, owner: Owner, name: str, work: Callable[[], None]) -> SimThread:
        """Make a thread, which runs once it is offered the baton."""
        thread = SimThread(self, owner, f"{owner.pid}/{name}", work)
        self.threads.append(thread)
        return thread

    def spawn(self, owner: Owner, name: str, work: Callable[[], None]) -> SimThread:
        """Start a thread: it runs when the baton comes to it."""
        thread = self.make(owner, name, work)
        self.offer(thread)
        return thread

    def offer(self, candidate: Candidate) -> None:
        """Let somebody have the baton one day."""
        owner = candidate.owner
        if owner.is_dead:
            return
        if owner.is_stopped:
            owner.halted.append(candidate)
        elif owner.slowness:
            self.at(
                self.now + owner.slowness * self.chance(),
                lambda: self._candidates.append(candidate),
            )
        else:
            self._candidates.append(candidate)

    def wake(self, thread: SimThread) -> None:
        """End a thread's sleep."""
        if thread.state is State.ASLEEP:
            thread.state = State.READY
            self.offer(thread)

    def running(self) -> SimThread:
        """Return the thread that this is."""
        current = self.current
        if current is None:
            raise RuntimeError("only a thread of a simulated process may wait; see `SimNode.run`")
        return current

    # Where threads give the baton away

    def watch(self) -> None:
        """See every call that this thread makes in the house, and give the baton away at some."""
        if self.unrest:
            sys.setprofile(self._see)

    def _see(self, frame: FrameType, event: str, arg: object) -> None:
        """Act as CPython does: it looks for signals, and for other threads, at these points."""
        if (event == "call" or event == "c_return") and not self._is_choosing:
            if not _is_watched(frame.f_code) or self.chance() >= self.unrest:
                return
            me = self.current
            if me is not None and not me.is_doomed:
                try:
                    self._give_way(me)
                finally:  # an error that is raised here makes CPython forget us
                    sys.setprofile(self._see)

    def sleep(self, until: float | None = None) -> None:
        """Give the baton away until this thread is woken, or until a time."""
        me = self.running()
        if me.is_doomed:
            raise Unwind
        me.naps += 1
        nap = me.naps
        me.state = State.ASLEEP
        if until is not None:
            self.at(until, lambda: self.wake(me) if me.naps == nap else None)
        self._hand_on(me)
        self.settle()

    def pause(self) -> None:
        """Give the baton away for a moment, now and then."""
        me = self.current
        if me is None:
            return
        self.settle()
        self._choices += 1
        if self._never_rests():
            self.fail(self._no_rest([me]))
            self.never()
        if self._candidates and self.chance() < _GIVES_WAY:
            self._give_way(me)

    def _give_way(self, me: SimThread) -> None:
        me.state = State.READY
        self.offer(me)
        self._hand_on(me)
        self.settle()

    def settle(self) -> None:
        """Run signal handlers of this thread, and raise what others have raised in it."""
        me = self.current
        if me is None:
            return
        if me.is_doomed:
            raise Unwind
        while me.signals:
            me.signals.popleft()()
        error = me.error
        if error is not None:
            me.error = None
            raise error

    def never(self) -> None:
        """Give the baton away for good."""
        me = self.running()
        me.state = State.ASLEEP
        self._hand_on(me)
        raise Unwind

    def _hand_on(self, me: SimThread) -> None:
        """Let the next one run, and stand still until it is this thread's turn again."""
        following = self._chosen()
        if following is me:
            self.begin(me)
            return
        self._give(following)
        me.go.acquire()
        if not me.is_doomed:
            self.begin(me)

    def pass_on(self) -> None:
        """Let the next one run, as this thread has ended."""
        self.threads.remove(self.running())
        self._give(self._chosen())

    def _give(self, following: SimThread | None) -> None:
        if following is None:
            self.current = None
            self._outside.release()
        else:
            following.go.release()

    def begin(self, thread: SimThread) -> None:
        """Take note who has the baton."""
        self._steps += 1
        self.current = thread
        thread.state = State.RUNNING
        if thread is not self._last:
            self._last = thread
            self._trace.add(self.now, thread.owner.pid, "switch", thread.name)

    # Choosing

    def _chosen(self) -> SimThread | None:
        self._is_choosing = True
        try:
            return self._next()
        finally:
            self._is_choosing = False

    def _never_rests(self) -> bool:
        choices = self._choices
        return choices > _RESTLESS and choices > _RESTLESS + _RESTLESS_EACH * len(self.threads)

    def _no_rest(self, threads: Sequence[SimThread] | None = None) -> SimulationError:
        steps = f"{self._choices} steps were made without any time passing"
        return SimulationError(f"{steps}:\n{self.stacks(threads)}")

    def _next(self) -> SimThread | None:
        """Choose who runs next; None: the thread outside."""
        candidates = self._candidates
        while not self._is_over:
            while candidates:
                self._choices += 1
                if self._never_rests():
                    self.fail(self._no_rest())
                    return None
                index = int(self.chance() * len(candidates))
                chosen = candidates[index]
                candidates[index] = candidates[-1]
                candidates.pop()
                owner = chosen.owner
                if owner.is_dead:
                    continue
                if owner.is_stopped:
                    owner.halted.append(chosen)
                    continue
                thread = chosen.chosen()
                if thread is not None:
                    return thread
            if not self._events or self._events[0][0] > self._until:
                return None
            self._jump()
        return None

    def _jump(self) -> None:
        """Let the clock jump to the next event."""
        due, _, act = heapq.heappop(self._events)
        if due > self.now:
            self.now = due
            self._choices = 0
        act()

    def at(self, due: float, act: Callable[[], None]) -> None:
        """Have something done at a time. It is done between two threads, and may not wait."""
        self._serial += 1
        heapq.heappush(self._events, (max(due, self.now), self._serial, act))

    # From outside

    def run(self, until: float) -> None:
        """Let the threads run until `stop` is called, a time comes, or nothing is left to do."""
        self._is_over = False
        self._until = until
        following = self._chosen()
        if following is not None:
            following.go.release()
            try:
                self._await_outside()
            except BaseException:
                self._is_over = True
                self._outside.acquire(timeout=_UNWINDING)
                raise
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        if not self._is_over and until != float("inf"):
            self.now = max(self.now, until)

    def _await_outside(self) -> None:
        """Wait for the baton; notice a thread that keeps it because it really blocks."""
        seen, quiet = self._steps, 0.0
        while not self._outside.acquire(timeout=_LOOK):  # no longer: Ctrl-C wants to be heard
            quiet = quiet + _LOOK if seen == self._steps else 0.0
            seen = self._steps
            if quiet >= _PATIENCE and self.current is not None:
                raise SimulationError(
                    f"{self.current.name} has not given the baton away for {quiet:.0f} real "
                    f"seconds: it computes, or waits for what is not simulated:\n"
                    f"{self.stacks([self.current])}"
                )

    def stop(self) -> None:
        """Give the baton back to the thread outside, soon."""
        self._is_over = True

    @property
    def is_over(self) -> bool:
        """Whether `run` has ended because of `stop`."""
        return self._is_over

    def fail(self, error: Exception) -> None:
        """End the run with an error."""
        self.failure = self.failure or error
        self._is_over = True

    def end(self) -> None:
        """End all threads, one after the other."""
        self._events.clear()
        for thread in self.threads:
            thread.is_doomed = True
            self.current = thread
            if thread.state is not State.ENDED:
                thread.go.release()
                thread.thread.join(_UNWINDING)
        self.current = None
        self.threads.clear()
        self._candidates.clear()

    def stacks(self, threads: Sequence[SimThread] | None = None) -> str:
        """Show where every thread stands, or some."""
        frames = sys._current_frames()
        parts = []
        for thread in self.threads if threads is None else threads:
            frame = frames.get(thread.ident)
            if frame is not None and not thread.owner.is_dead:
                lines = traceback.format_stack(frame)
                parts.append(
                    f"{thread.name} ({thread.state.value}):\n{''.join(_without_us(lines))}"
                )
        return "\n".join(parts)


def _without_us(lines: list[str]) -> list[str]:
    """Leave out how threads begin and how they wait for the baton."""
    return [line for line in lines if __file__ not in line and threading.__file__ not in line]


class SimulationError(Exception):
    """A simulation cannot go on."""
