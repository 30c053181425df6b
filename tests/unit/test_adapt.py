"""`adapt=(lo, hi)`: jobs come and go with the work that waits, in virtual time."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Callable
from typing import Any

import pytest

import hpcdist
from hpcdist import Launch, LocalManager, SlurmManager, launch, pmap
from hpcdist._cluster.adaptation import Arrangement, Peak, Standing, arrange
from hpcdist._contract.adapting import Adapt
from hpcdist._monitor import output
from hpcdist._monitor.status_line import StatusLine
from hpcdist._runtime.node import here
from hpcdist.testing import Simulation, compute
from hpcdist.testing.worlds import SimJobs

pytestmark = pytest.mark.any_mpi


class Site:
    """A simulated cluster with a queue, and a launch that adapts to its work."""

    def __init__(
        self,
        sim: Simulation,
        n: int = 1,
        wait: Callable[[], float] = lambda: 30.0,
        walltime: float | None = None,
        **params: Any,
    ) -> None:
        self.sim = sim
        manager = SimJobs(sim.cluster, n, wait, walltime)
        self.launch: Launch = sim.node(1).run(launch, manager, **params)

    @property
    def jobs(self) -> int:
        """How many jobs there have been."""
        return len(self.launch.history)

    @property
    def queued(self) -> int:
        """How many wait now."""
        return sum(not world.up and not world.closed for world in self.launch.worlds)

    def map(self, count: int) -> list[int]:
        return self.sim.node(1).run(pmap, nap, range(count))


def nap(k: int) -> int:
    compute(20)
    return k


def test_jobs_come_with_work_and_go_when_it_is_done() -> None:
    with Simulation(nodes=1) as sim:
        site = Site(sim, n=2, adapt=(0, 3))
        sim.advance(300)
        assert site.jobs == 0
        assert site.launch.workers_wanted == 0
        assert site.map(30) == list(range(30))
        assert site.jobs == 3
        assert site.launch.workers_wanted == 6
        sim.advance(200)
        assert site.launch.pids == []
        assert site.jobs == 3
        assert site.map(2) == [0, 1]
        assert site.jobs == 4


def bursts(gaps: list[tuple[int, float]]) -> int:
    """Run a map of so many items, wait so long, and so on; return how many items were run."""
    done = 0
    for count, gap in gaps:
        done += len(pmap(nap, range(count)))
        rest(gap)
    return done


def rest(seconds: float) -> None:
    """Let time pass on process 1."""
    hpcdist.sleep(seconds)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("seed", range(2))
def test_hours_of_work_in_bursts_start_no_job_twice(seed: int) -> None:
    """What comes again within `idle` finds its jobs; what comes later starts them anew, once."""
    with Simulation(nodes=1, seed=seed) as sim:
        waits = random.Random(seed)
        site = Site(sim, wait=lambda: waits.uniform(5, 120), adapt=(0, 4), idle=300)
        close = [(waits.randrange(8, 30), waits.uniform(20, 200)) for _ in range(20)]
        task = sim.node(1).start(bursts, close)
        most = 0
        while not task.done():
            sim.advance(20)
            most = max(most, site.launch.workers_wanted or 0)
        assert task.result() == sum(count for count, _ in close)
        assert sim.now > 3600
        assert most == site.jobs == 4
        far = [(20, 1500.0)] * 6
        assert sim.node(1).run(bursts, far) == 120
        assert sim.now > 3 * 3600
        assert site.jobs == 4 + 5 * 4  # the first of them still finds the jobs of before


def test_no_more_jobs_wait_than_may() -> None:
    with Simulation(nodes=1) as sim:
        site = Site(sim, wait=lambda: 100.0, adapt=(0, 9), max_queued=2)
        task = sim.node(1).start(pmap, nap, range(60))
        queued = []
        while not task.done():
            sim.advance(1)
            queued.append(site.queued)
        assert max(queued) == 2
        assert site.jobs > 4


def test_what_waits_in_vain_leaves_the_queue() -> None:
    """One job comes and does it all: those that still wait are not needed, after a while."""
    waits = iter([5.0, *[10_000.0] * 9])
    with Simulation(nodes=1) as sim:
        site = Site(sim, wait=lambda: next(waits), adapt=(0, 4), idle=300)
        site.map(8)
        assert site.queued == 3
        sim.advance(700)
        assert site.queued == 0
        assert site.launch.workers_wanted == 0
        states = [job.state for job in site.launch.history]
        assert sorted(states) == [*["CANCELLED"] * 3, "ENDED"]
        sim.advance(20_000)
        assert site.jobs == 4
        assert sim.node(1).run(hpcdist.workers) == [1]


@pytest.mark.parametrize("renew", [False, True])
def test_jobs_that_end_are_replaced_while_work_waits(renew: bool) -> None:
    with Simulation(nodes=1) as sim:
        site = Site(sim, walltime=600.0, adapt=(0, 3), renew=renew)
        assert site.map(400) == list(range(400))
        assert site.jobs >= 12
        sim.advance(1000)
        ended = site.jobs
        sim.advance(3000)
        assert site.jobs == ended
        assert site.launch.workers_wanted == 0


def test_the_fewest_stay_and_are_replaced() -> None:
    with Simulation(nodes=1) as sim:
        site = Site(sim, n=2, adapt=(1, 3))
        sim.advance(60)
        assert len(site.launch.pids) == 2
        sim.advance(600)
        assert site.jobs == 1
        sim.lose_world(1)
        sim.advance(60)
        assert len(site.launch.pids) == 2
        assert site.jobs == 2


@pytest.mark.parametrize("isolation", ["auto", "process"])
def test_one_job_replaces_a_lost_one(isolation: str) -> None:
    """Though its workers are lost one after the other."""
    with Simulation(nodes=1) as sim:
        site = Site(sim, n=3, walltime=3600.0, renew=True, isolation=isolation)
        sim.advance(60)
        assert len(site.launch.pids) == 3
        sim.delay(0.0, 1.0)
        sim.lose_world(1)
        sim.advance(120)
        assert [job.workers for job in site.launch.history] == [3, 3]


def test_work_need_not_wait_for_the_first_jobs_to_call_for_others() -> None:
    with Simulation(nodes=1) as sim:
        site = Site(sim, wait=lambda: 100.0, adapt=(1, 4), max_queued=3)
        task = sim.node(1).start(pmap, nap, range(40))
        sim.advance(10)
        assert site.queued == 3
        assert task.result() == list(range(40))
        assert site.jobs == 4


def test_the_fewest_are_waited_for_though_not_all_of_them_may_queue() -> None:
    with Simulation(nodes=1) as sim:
        site = Site(sim, wait=lambda: 20.0, adapt=(5, 9), max_queued=2)
        assert site.queued == 2
        assert len(sim.node(1).run(site.launch.wait)) == 5
        assert site.jobs == 5
        sim.advance(1000)
        assert site.jobs == 5


def test_a_job_gets_nothing_more_once_its_successor_is_there() -> None:
    """It leaves then, in the middle of a map too: it is not kept to its end beside the other."""
    with Simulation(nodes=1) as sim:
        site = Site(sim, n=2, walltime=600.0, renew=True)
        task = sim.node(1).start(pmap, nap, range(100))
        while site.jobs < 2 or site.queued:  # it is submitted 2:00 before the end, and waits 0:30
            sim.advance(1)
        sim.advance(45)
        assert sim.now < 600
        assert sim.has_ended(2)
        assert sim.has_ended(3)
        assert len(site.launch.pids) == 2
        assert task.result() == list(range(100))


def leave_a_result() -> hpcdist.Future[int]:
    return hpcdist.remotecall(abs, hpcdist.default_worker_pool(), -3)


def test_a_result_that_nobody_has_fetched_keeps_its_job() -> None:
    with Simulation(nodes=1) as sim:
        site = Site(sim, adapt=(0, 2))
        future = sim.node(1).run(leave_a_result)
        sim.advance(600)
        assert len(site.launch.pids) == 1
        assert sim.node(1).run(future.fetch) == 3
        sim.advance(200)
        assert site.launch.pids == []


def test_tasks_of_an_executor_call_for_jobs() -> None:
    def run() -> list[int]:
        with hpcdist.Executor() as executor:
            return list(executor.map(nap, range(12)))

    with Simulation(nodes=1) as sim:
        site = Site(sim, adapt=(0, 3))
        assert sim.node(1).run(run) == list(range(12))
        assert site.jobs == 3


def test_who_waits_for_workers_gets_them() -> None:
    with Simulation(nodes=1) as sim:
        site = Site(sim, n=2, adapt=(0, 3))
        assert len(sim.node(1).run(site.launch.wait, 3)) >= 3
        assert site.jobs == 2


def test_work_for_a_tag_calls_for_jobs_with_it() -> None:
    with Simulation(nodes=1) as sim:
        plain = Site(sim, adapt=(0, 3), tag="cpu")
        tagged = Site(sim, adapt=(0, 3), tag="gpu")
        assert sim.node(1).run(lambda: pmap(nap, range(6), pool="gpu")) == list(range(6))
        assert (plain.jobs, tagged.jobs) == (0, 3)


def test_workers_that_are_there_count() -> None:
    with Simulation(nodes=5) as sim:
        site = Site(sim, adapt=(0, 9))
        site.map(6)
        assert site.jobs == 2


def test_a_map_without_items_waits_for_nobody() -> None:
    with Simulation(nodes=1) as sim:
        site = Site(sim, adapt=(0, 3))
        assert site.map(0) == []
        assert sim.now < 10
        assert site.jobs == 0


def test_a_launch_that_is_cancelled_starts_nothing_any_more() -> None:
    with Simulation(nodes=1) as sim:
        site = Site(sim, wait=lambda: 5.0, adapt=(1, 3))
        sim.advance(60)
        sim.node(1).run(site.launch.cancel)
        sim.advance(60)
        assert site.map(2) == [0, 1]  # here, as nobody else is there
        assert site.jobs == 1


class Terminal(io.StringIO):
    """A terminal, as far as those know who write to it."""

    def isatty(self) -> bool:
        return True


def test_one_line_on_a_terminal_says_how_things_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    with Simulation(nodes=1) as sim:
        monkeypatch.setattr("sys.stderr", screen)
        site = Site(sim, n=2, wait=lambda: 100.0, walltime=300.0, adapt=(0, 2))
        task = sim.node(1).start(pmap, nap, range(12))
        sim.advance(50)
        assert screen.getvalue().endswith("\r\x1b[K12 items waiting: no job runs, 2 queued")
        sim.advance(60)
        (shown,) = screen.getvalue().split("\r\x1b[K")[-1:]
        run = "8 items waiting: 2 jobs run (4 workers)"
        assert re.fullmatch(re.escape(run) + r" · job [12] ends in 4:[45]\d", shown)
        task.result()
        sim.advance(5)
        assert screen.getvalue().endswith("\r\x1b[K")
        assert site.jobs == 2


def test_what_is_printed_goes_above_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    line = here.node.service(StatusLine)
    line.show("2 items waiting")
    output.say("hello")
    line.show("")
    assert screen.getvalue() == "\r\x1b[K2 items waiting\r\x1b[Khello\n2 items waiting\r\x1b[K"
    output.say("bye")
    assert screen.getvalue().endswith("\r\x1b[Kbye\n")


RUNS = Standing(sound=True, working=True)
IDLE = Standing(sound=True, working=True, idle=99)
LOST = Standing()


def test_of_too_many_jobs_those_in_the_queue_go_first_and_the_last_of_them() -> None:
    places = [IDLE, RUNS, *(Standing(sound=True, queued=True, submitted=at) for at in (1.0, 2.0))]
    given_back = lambda peak: arrange(places, 0, peak, Adapt(0, 9)).give_back
    assert [given_back(peak) for peak in (4, 3, 2, 1, 0)] == [
        (),
        (3,),
        (3, 2),
        (3, 2, 0),
        (3, 2, 0),
    ]
    submitting = [Standing(sound=True, queued=True)]  # it has no number yet
    assert arrange(submitting, 0, 0, Adapt(0, 9)).give_back == ()


def test_a_job_that_ends_gets_a_successor_if_it_is_needed() -> None:
    ending = Standing(working=True)
    assert arrange([ending, RUNS], 2, 2, Adapt(0, 9), renew=True) == Arrangement(keep=(1, 0))
    assert arrange([ending, RUNS], 1, 2, Adapt(0, 9), renew=True) == Arrangement(keep=(1,))
    assert arrange([LOST, RUNS], 2, 2, Adapt(0, 9)) == Arrangement(keep=(1,), drop=(0,), start=1)
    assert arrange([LOST, RUNS], 1, 1, Adapt(0, 9)) == Arrangement(keep=(1,), drop=(0,))


def test_the_most_of_late_is_forgotten_after_a_while() -> None:
    peak = Peak(60)
    noted = [peak.note(at, jobs) for at, jobs in ((0, 3), (10, 1), (59, 2), (61, 0), (130, 0))]
    assert noted == [3, 3, 3, 2, 0]


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"adapt": (5, 2)}, r"5 is more than 2; did you mean \(2, 5\)"),
        ({"adapt": (0.5, 2)}, "two whole numbers"),
        ({"adapt": (True, 2)}, "two whole numbers"),
        ({"adapt": 5}, "two whole numbers"),
        ({"adapt": "05"}, "two whole numbers"),
        ({"adapt": (0, 1, 2)}, "two whole numbers"),
        ({"adapt": (-1, 2)}, r"at least \(0, 1\)"),
        ({"adapt": (0, 0)}, r"at least \(0, 1\)"),
        ({"adapt": (0, 2), "max_queued": 0}, "max_queued is how many jobs may wait"),
        ({"adapt": (0, 2), "max_queued": 1.5}, "max_queued is how many jobs may wait"),
        ({"adapt": (0, 2), "idle": -1}, "idle is the seconds"),
        ({"adapt": (0, 2), "idle": float("nan")}, "idle is the seconds"),
        ({"adapt": (0, 2), "idle": "soon"}, "idle is the seconds"),
        ({"max_queued": 3}, r"of use with adapt=\(lo, hi\) only"),
        ({"idle": 3}, r"of use with adapt=\(lo, hi\) only"),
        ({"adapt": (0, 2), "split": 1}, "the manager's number is the size of one job"),
        ({"adapt": (0, 2), "min_workers": 9}, "min_workers=9 is more than"),
        ({"adapt": (0, 2), "renew": True}, "needs to know for how long a job may run"),
    ],
)
def test_nonsense_is_refused_before_anything_is_submitted(
    params: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        launch(SlurmManager(4), partition="debug", **params)


def test_only_jobs_adapt() -> None:
    for what in (2, LocalManager(2), ["localhost"]):
        with pytest.raises(ValueError, match="is for workers in jobs of a batch scheduler"):
            launch(what, adapt=(0, 2))


def test_a_script_can_be_shown_where_no_job_is_called_for_yet() -> None:
    script = SlurmManager(4).job_script(partition="debug", mpi="pmi2", adapt=(0, 3))
    assert "--ntasks=4" in script
