"""The mechanism of `adapt=`: sees what work waits and how jobs are, and says what is to be done."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hpcdist._cluster import adaptation
from hpcdist._cluster.adaptation import Arrangement, Peak
from hpcdist._cluster.berths import Berth, RenewedLaunch
from hpcdist._cluster.idleness import Idleness
from hpcdist._contract.adapting import Adapt
from hpcdist._maps.demand import Demand, Want
from hpcdist._monitor.status_line import StatusLine

_LOOK_EVERY, _LOOK_SELDOM = 1.0, 5.0  # seconds: while work waits, and else
_ASK_EVERY, _ASK_OFTEN = 1 / 8, 0.2  # part of `idle`, and seconds: how often workers are asked
_ASK_SELDOM = 10.0


class Adapting:
    """How many jobs a launch is to have.

    Args:
        launch: The launch.
        adapt: Between how many and how many.
        each: How many workers a job has.
        look: Has the launch see to it.
    """

    def __init__(
        self, launch: RenewedLaunch, adapt: Adapt, each: int, look: Callable[[], None]
    ) -> None:
        self.adapt = adapt
        self.each = each
        self._launch = launch
        self._node = launch.node
        self._look = look
        self._demand = launch.node.service(Demand)
        self._line = launch.node.service(StatusLine)
        self._idleness = Idleness(launch.node)
        self._peak = Peak(adapt.idle)
        self._asks_at = 0.0
        self._is_on = False
        self._looks_soon = False
        self._is_wanted = False  # some work waits, or runs
        self._shown = ""

    def begin(self) -> None:
        """Look now and then, and whenever new work waits."""
        self._is_on = True
        self._demand.watchers.append(self._look_soon)
        self._look_again()

    def end(self) -> None:
        """Look no more."""
        if self._is_on:
            self._is_on = False
            self._demand.watchers.remove(self._look_soon)
            self._show("")

    def _look_again(self) -> None:
        if self._is_on:
            self._look()
            pause = min(_LOOK_SELDOM, max(_ASK_OFTEN, self.adapt.idle / 4))
            later = _LOOK_EVERY if self._is_wanted else pause
            self._node.progress.call_later(min(later, pause), self._look_again)

    def _look_soon(self) -> None:
        """Look, but not on this thread, which may be any."""
        if not self._looks_soon:
            self._looks_soon = True
            self._node.progress.call_later(0.0, self._look_now)

    def _look_now(self) -> None:
        self._looks_soon = False
        if self._is_on:
            self._look()

    def arrange(self, berths: Sequence[Berth]) -> Arrangement:
        """Say what is to be done with the places for jobs, and show how things stand."""
        wants = self._demand.of(self._launch.settings.tags)
        needed = adaptation.called_for(self._workers(wants), self.each, self.adapt)
        peak = self._peak.note(self._node.machine.now(), needed)
        self._ask(berths)
        jobs = [berth.as_job(self._idleness.of(berth.living())) for berth in berths]
        self._is_wanted = any(want.waiting or want.flying for want in wants)
        self._show(self._told(wants, berths) if self._is_wanted else "")
        renew = self._launch.settings.renew
        return adaptation.arrange(jobs, needed, peak, self.adapt, renew=renew)

    def _workers(self, wants: Sequence[Want]) -> int:
        """Return how many workers this launch is to have: those of others count, too."""
        members, ours = self._node.members, set(self._launch.pids)
        total = 0
        for tag in {want.tag for want in wants}:
            called_for = sum(want.workers for want in wants if want.tag == tag)
            there = members.tagged(tag) if tag else list(members.living)
            total += max(0, called_for - len([pid for pid in there if pid not in ours]))
        return max(total, self._launch.hoped)

    def _ask(self, berths: Sequence[Berth]) -> None:
        """Ask the workers what they have to do, where some of them may be given back."""
        now = self._node.machine.now()
        there = [berth for berth in berths if berth.living()]
        if now < self._asks_at or len(there) <= self.adapt.lo:
            return
        self._asks_at = now + min(_ASK_SELDOM, max(_ASK_OFTEN, self.adapt.idle * _ASK_EVERY))
        self._idleness.ask(pid for berth in there for pid in berth.living())

    def _told(self, wants: Sequence[Want], berths: Sequence[Berth]) -> str:
        """Say in one line how things stand."""
        running = [berth for berth in berths if berth.living()]
        ends = [end for berth in running if (end := berth.next_end()) is not None]
        return adaptation.line(
            sum(want.waiting for want in wants),
            len(running),
            sum(len(berth.living()) for berth in running),
            sum(len(berth.queued()) for berth in berths),
            min(ends, key=lambda end: end[1], default=None),
        )

    def _show(self, text: str) -> None:
        """Show a line, once no lock is held."""
        if text != self._shown:
            self._shown = text
            self._node.progress.call_later(0.0, lambda: self._line.show(text))
