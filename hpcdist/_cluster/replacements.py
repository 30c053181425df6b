"""The mechanism of `renew=True` and `adapt=`: has worlds started and retired as they say.

What is to be done says `renewal`, for each berth, and `adaptation`, for how many there are to be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from hpcdist import _log
from hpcdist._cluster import renewal
from hpcdist._cluster.adapting import Adapting
from hpcdist._cluster.berths import Berth, RenewedLaunch
from hpcdist._cluster.launch_errors import launch_error
from hpcdist._cluster.roster import Roster
from hpcdist._cluster.world import World
from hpcdist._monitor import output
from hpcdist._numbers import clock


class Replacements:
    """What a launch with `renew=True` has lost, and what is started in its place.

    `look` may be called whenever something has happened, from any thread: it compares what is
    there with what is to be there, and never blocks.
    """

    def __init__(self, launch: RenewedLaunch) -> None:
        self._launch = launch
        self._node = launch.node
        self._roster = launch.node.service(Roster)
        self.on = False
        self._is_expected = False  # work waits even if there is no worker
        self._is_awaited = False  # whether `members.awaited` counts us
        self._berths: list[Berth] = []
        self._coming: list[World] = []
        self._told: set[int] = set()  # the lost of whom a line on stderr has told
        self._told_of: set[object] = set()  # and the jobs whose ends it has announced
        self._failures = 0  # starts in a row of which no worker came
        self._rests_until = 0.0
        self._looks_at = float("inf")  # when a timer will have it look again
        self._given_back: list[Berth] = []  # of which something is left
        self._grown: set[World] = set()  # on their way as work has called for them
        adapt = launch.settings.adapt
        self._adapting = None
        if adapt is not None:
            self._adapting = Adapting(launch, adapt, launch.plan.each, self.look)
        self.begun = False  # all of the launch's own workers had come

    def expect(self) -> None:
        """Let work wait for the launch's own workers, if it has as many as are called for."""
        with self._roster.lock:
            self._is_expected = self._adapting is not None
            self._count()

    def begin(self, worlds: Sequence[World]) -> None:
        """Keep from now on what the launch has brought."""
        with self._roster.lock:
            self.on = self.begun = True
            self._berths = [Berth.of(self._launch, world) for world in worlds]
            for world in worlds:
                world.renews = world.renews or not world.settled
        if self._adapting is not None:
            self._adapting.begin()
        self.look()

    def end(self) -> None:
        """Start nothing any more."""
        with self._roster.lock:
            self.on = self._is_expected = False
            self._count()
        if self._adapting is not None:
            self._adapting.end()

    def is_full(self) -> bool:
        """Tell whether the launch has all its workers."""
        with self._roster.lock:
            least = 0 if self._adapting is None else self._adapting.adapt.lo
            full = [berth.is_full() for berth in self._berths]
            return all(full) and len(full) >= least

    def expected(self) -> int:
        """Return how many workers there are to be."""
        with self._roster.lock:
            return sum(berth.wanted() for berth in self._berths)

    def look(self) -> None:
        """See what is there, and have done what is to be done."""
        with self._roster.lock:
            if not self.on:
                return
            self._welcome()
            if self._adapting is not None:
                self._adapt(self._adapting)
            for berth in self._berths:
                orders = berth.orders()
                for world in [berth.worlds[k] for k in orders.retire]:
                    berth.retire(world)
                if orders.start and self._may_start(berth):
                    self._start(berth, orders.start)
                self._launch.exchange([], berth.clear())
            self._count()
            self._look_again()

    # As many jobs as are called for

    def _adapt(self, adapting: Adapting) -> None:
        """Make places for jobs, and give others back, as the work calls for."""
        berths = list(self._berths)
        found = adapting.arrange(berths)
        renew = self._launch.settings.renew
        for k, berth in enumerate(berths):
            berth.may_start = renew and k in found.keep
        for berth in [berths[k] for k in found.give_back]:
            self._give_back(berth)
        for berth in [berths[k] for k in found.drop]:
            self._berths.remove(berth)
            self._given_back.append(berth)
        if self._node.machine.now() >= self._rests_until:
            for _ in range(found.start):
                berth = Berth(self._launch, adapting.each)
                self._berths.append(berth)
                self._grown.add(self._start(berth, adapting.each))
                berth.may_start = False
        for berth in [berth for berth in self._given_back if berth.has_ended()]:
            self._given_back.remove(berth)
            self._launch.exchange([], berth.worlds)
            self._roster.forget([pid for world in berth.worlds for pid in world.registered])

    def _give_back(self, berth: Berth) -> None:
        """End the job that waits in a place; where none does, the one that runs."""
        queued = berth.queued()
        for world in queued:
            world.retired = True
            self._later(partial(self._withdraw, world))
        if not queued:
            self._berths.remove(berth)
            self._given_back.append(berth)
            berth.given_back = True
            for world in [world for world in berth.worlds if not world.retired]:
                berth.retire(world)

    def _withdraw(self, world: World) -> None:
        """Take a job that nobody needs out of the queue, or end it if it has just started."""
        world.abandon()
        if world.registered:
            world.retire()
        self._cancel_job(world)

    def _cancel_job(self, world: World) -> None:
        """Let the scheduler forget the job of a world that has been given up."""
        jobs = self._launch.jobs_of
        if jobs is None or world.up:
            return

        def cancel() -> None:
            if world.job is not None:
                jobs.cancel_jobs(self._launch)
            world.forget()

        self._node.turns.background(cancel)

    def _may_start(self, berth: Berth) -> bool:
        """Tell whether another world may be started in a place now."""
        now = self._node.machine.now()
        if not berth.may_start or now < self._rests_until:
            return False
        settling = berth.settles_in(now)
        if settling:
            self._node.progress.call_later(settling + 0.01, self.look)
            return False
        queued = sum(len(other.queued()) for other in self._berths)
        return self._adapting is None or queued < self._adapting.adapt.max_queued

    def _look_again(self) -> None:
        """Look when the next job comes to its end, or needs a successor."""
        moments = [moment for berth in self._berths if (moment := berth.next_look()) is not None]
        if not moments:
            return
        now = self._node.machine.now()
        at = now + min(moments) + 0.01
        if at < self._looks_at or self._looks_at <= now:
            self._looks_at = at
            self._node.progress.call_later(at - now, self.look)

    def _count(self) -> None:
        """Let who finds no worker know whether to wait for some."""
        awaited = self._is_expected or (self.on and self.expected() > 0)
        if awaited != self._is_awaited:
            self._is_awaited = awaited
            self._node.members.await_some(self._launch.settings.tags, 1 if awaited else -1)
            if not awaited:
                self._node.progress.call_later(0.0, self._node.forsaken)

    # Starting

    def _start(self, berth: Berth, count: int) -> World:
        self._tell_lost(berth, count)
        world = self._launch.make_world(count)
        world.seats = berth.free_seats(count)
        world.label = berth.label
        world.renews = True
        berth.worlds.append(world)
        self._coming.append(world)
        self._launch.exchange([world], [])
        self._node.turns.background(lambda: self._bring_up(world))
        return world

    def _bring_up(self, world: World) -> None:
        """Start the keeper of a world. On a thread of its own."""
        kept = self._launch.kept
        assert kept is not None
        try:
            with self._launch.leash.held():
                world.prepare()
                if not self._launch.on_network:  # elsewhere it starts with the keeper
                    world.set_clock()
                kept.start_world(self._launch, world)
        except Exception as exc:  # the edge of a thread
            self._launch.fail(exc, world=world)
        finally:
            world.clear_away()

    def failed(self, world: World, what: BaseException | str) -> None:
        """A world that was to replace others does not come up, or not as a whole."""
        text = what if isinstance(what, str) else f"{type(what).__name__}: {what}"
        with self._roster.lock:
            if world.settled or world.failure is not None:
                return
            world.failure = launch_error(world, text)
            self._failures += not world.registered
            pause = renewal.pause(self._failures, jobs=self._launch.jobs_of is not None)
            self._rests_until = self._node.machine.now() + (pause or 0.0)
        _log.log("info", f"a start in place of lost workers has failed: {text}")
        world.abandon()
        self._cancel_job(world)
        if pause is None:
            self._give_up(world, text)
        else:
            self._node.progress.call_later(pause, self.look)
        self._launch.changed()

    def _give_up(self, world: World, text: str) -> None:
        self.end()
        error = launch_error(
            world,
            f"{renewal.ATTEMPTS} starts in a row have brought no worker in place of those that "
            f"were lost, so nothing is started any more (renew=True). The last: {text}",
        )
        self._launch.end_renewing(error)
        self._say(f"hpcdist: {error}")

    # What is told on stderr

    def _tell_lost(self, berth: Berth, count: int) -> None:
        lost = [pid for pid in berth.lost() if pid not in self._told]
        self._told.update(lost)
        if not lost:
            self._tell_ending(berth, count)  # or it is another try
            return
        why = self._roster.book[lost[0]].why or "its connection ended"
        damaged = [standing for standing in berth.standings() if standing.damaged]
        left = [standing for standing in damaged if standing.living]
        of = " of a world of MPI" if damaged else ""
        what = f"{count} new worker{'s' * (count > 1)} {'are' if count > 1 else 'is'} on the way"
        until = "; the others work on until then, and leave once idle" if left else ""
        self._say(f"hpcdist: lost {named(sorted(lost))}{of} ({why}): {what} (renew=True){until}")

    def _tell_ending(self, berth: Berth, count: int) -> None:
        ending = [w for w in berth.worlds if w.job is not None and not w.retired and w.time_left]
        if ending and ending[0].job not in self._told_of:
            world = ending[0]
            self._told_of.add(world.job)
            left = clock(world.time_left or 0.0)
            self._say(
                f"hpcdist: job {world.job} ends in {left}: another job of {count} "
                f"worker{'s' * (count > 1)} is being submitted (renew=True)"
            )

    def _welcome(self) -> None:
        for world in [world for world in self._coming if world.settled]:
            self._coming.remove(world)
            if world.registered:
                self._failures = 0
            told = world in self._grown  # by the line at the foot of the terminal
            self._grown.discard(world)
            if world.registered and not told:
                are = "are" if len(world.registered) > 1 else "is"
                self._say(f"hpcdist: {named(sorted(world.registered))} {are} there (renew=True)")

    def _say(self, text: str) -> None:
        self._later(lambda: output.say(text))

    def _later(self, fn: Callable[[], None]) -> None:
        """Do something once no lock is held."""
        self._node.progress.call_later(0.0, fn)


def named(pids: Sequence[int]) -> str:
    """Name workers.

    >>> named([4]), named([2, 3, 7])
    ('worker 4', 'workers 2, 3 and 7')
    """
    *most, last = map(str, pids)
    return f"workers {', '.join(most)} and {last}" if most else f"worker {last}"
