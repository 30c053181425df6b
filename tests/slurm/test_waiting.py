"""Jobs that wait in the queue: what is told of them, and how they are given up."""

import pytest

from tests.slurm.cluster import Finished, Slurm
from tests.slurm.drivers import PRELUDE

pytestmark = pytest.mark.any_mpi


def run(slurm: Slurm, text: str, timeout: float = 90) -> Finished:
    """Run a driver to its good end."""
    done = slurm.driver(PRELUDE + text, timeout=timeout)
    assert done.rc == 0, f"{done.out}\n{done.err}"
    return done


def test_a_launch_while_it_waits(slurm: Slurm) -> None:
    run(
        slurm,
        """
def scheduler_commands():
    return [(c["argv"][0], c["when"]) for c in commands()]

blocker = block()
begin = time.monotonic()
going = h.launch(SlurmManager(2), keep=True, t="1:00")
assert time.monotonic() - begin < 2, "launch() does not wait"
assert str(going.state) == "PENDING" and going.pids == [] and going.estimated_start is None
(job,) = until(lambda: going.jobs)
assert job.isdigit() and job.cluster is None
until(lambda: going.reason, 10)
assert going.reason == "Resources" and str(going.state) == "PENDING", repr(going)
assert going.estimated_start.tzinfo is not None, going.estimated_start
assert 0 < going.estimated_start.timestamp() - time.time() < 600, going.estimated_start
assert "0 of 2" in repr(going)

for n in (None, 1):
    begin = time.monotonic()
    try:
        going.wait(n, timeout=0.5)
    except TimeoutError:
        assert 0.4 < time.monotonic() - begin < 1.5
    else:
        raise AssertionError("waited for nothing")
assert going.wait(0) == []

# No more than one question in five seconds, however often somebody looks.
until(lambda: (going.state, going.reason, len(scheduler_commands()) >= 4)[-1], 25)
names = [name for name, _ in scheduler_commands()]
whens = [when for _, when in scheduler_commands()]
assert names == ["sbatch", "squeue", "squeue", "squeue"], names
assert all(b - a > 4.5 for a, b in zip(whens[1:], whens[2:])), whens
assert whens[1] - whens[0] > 1.5, whens

# Several launches at once; they begin when they can, and are asked nothing then.
other = h.launch(SlurmManager(1))
until(lambda: other.jobs)
shown("scancel", blocker)
assert len(going.wait(1, 20)) >= 1
pids = going.wait(timeout=20)
assert len(pids) == 2 and going.pids == pids and going.wait() == pids
assert len(other.wait(timeout=20)) == 1
assert str(going.state) == "RUNNING" and "2 of 2" in repr(going), repr(going)
assert going.reason is None and going.estimated_start is None, (going.reason, "is over")
assert h.workers() == sorted(pids + other.pids)
asked_before = len(commands())
assert everywhere.call(h.myid, pids=pids) == {pid: pid for pid in pids}
going.cancel()  # ends what runs
until(lambda: h.workers() == other.pids and str(going.state) == "CANCELLED")
until(lambda: len(queue()) == 1)
asked = [c["argv"][0] for c in commands()][asked_before:]
assert asked in ([], ["scancel"], ["squeue"], ["squeue", "scancel"]), commands()  # for its end
rmprocs(h.workers())
until(lambda: not queue())
(kept,) = until(lambda: [run for run in [list(RUNS.iterdir())] if len(run) == 1])
assert {"script.sh", "log", "manifest.json", "commands.jsonl"} <= set(os.listdir(kept[0]))
assert "join" not in os.listdir(kept[0]), "the secret is not kept"
shown("rm", "-r", kept[0])
""",
    )


def test_a_launch_that_is_given_up(slurm: Slurm) -> None:
    run(
        slurm,
        """
def text_of(wait):
    try:
        wait()
    except LaunchError as exc:
        return str(exc)
    raise AssertionError("no error")

blocker = block()
going = h.launch(SlurmManager(3))
until(lambda: going.jobs)
going.cancel()
assert str(going.state) == "CANCELLED" and going.pids == []
going.cancel()
assert "cancelled" in text_of(going.wait) and "cancelled" in text_of(lambda: going.wait(1))
assert going.jobs[0] in text_of(going.wait)
until(lambda: queue() == [f"{blocker} RUNNING"])

at_once = h.launch(SlurmManager(1))  # while sbatch runs
at_once.cancel()
assert "cancelled" in text_of(at_once.wait)

# All tasks of an array.
array = h.launch(SlurmManager(6), split=2)
until(lambda: len(array.jobs) == 3)
assert len(queue()) >= 4
array.cancel()
until(lambda: queue() == [f"{blocker} RUNNING"])

# By somebody else.
begin = time.monotonic()
going = h.launch(SlurmManager(1), comment="victim")
until(lambda: going.reason, 10)
shown("scancel", going.jobs[0])
text = text_of(lambda: going.wait(timeout=20))
assert "CANCELLED" in text and going.jobs[0] in text and str(going.state) == "FAILED", text

begin = time.monotonic()
refused(LaunchError, "queue_timeout=3 s", "Resources", queue_timeout=3)
assert 2.5 < time.monotonic() - begin < 8
refused(LaunchError, "queue_timeout=4 s", "JobHeldUser", hold=True, queue_timeout=4)
refused(LaunchError, "queue_timeout=4 s", "BeginTime", begin="now+1hour", queue_timeout=4)

until(lambda: queue() == [f"{blocker} RUNNING"])
assert h.procs() == [1]
shown("scancel", blocker)
rmprocs(addprocs(SlurmManager(1)))
nothing_left()
""",
    )


def test_a_terminal_shows_the_wait_and_ctrl_c_ends_it(slurm: Slurm) -> None:
    run(
        slurm,
        """
import pty, re, select

if sys.argv[1:]:
    try:
        addprocs(SlurmManager(2))
    except KeyboardInterrupt:
        print("interrupted", h.procs(), flush=True)
    print("then", addprocs(SlurmManager(2)), flush=True)
    print(sorted(everywhere.call(h.myid)), flush=True)
    sys.exit()

blocker = block()
os_pid, fd = pty.fork()
if not os_pid:
    os.execv(sys.executable, [sys.executable, __file__, "inside"])
screen = ""

def read():
    global screen
    if select.select([fd], [], [], 0.05)[0]:
        try:
            screen += os.read(fd, 9999).decode()
        except OSError:
            pass
    return screen

# Near midnight the estimate is of tomorrow, and says the day.
queued = r"job \\d+ queued: Resources, estimated start [\\w ]*\\d\\d:\\d\\d"
until(lambda: re.search(queued, read()))
(job,) = [line.split()[0] for line in queue() if "PENDING" in line]
assert f"job {job} queued" in screen, screen
os.write(fd, b"\\3")  # Ctrl-C
begin = time.monotonic()
until(lambda: "interrupted [1]" in read())
assert time.monotonic() - begin < 2, screen
until(lambda: not any(line.startswith(job) for line in queue()))
second, = until(lambda: [line.split()[0] for line in queue() if "PENDING" in line])
until(lambda: f"job {second} queued" in read())
shown("scancel", blocker)
until(lambda: "[1, 4, 5]" in read())
assert f"job {second} running" in screen and "of 2 workers have registered" in screen, screen
lines = [line.rpartition("\\r\\x1b[K")[2] for line in screen.split("\\r\\n")]
assert [line for line in lines if line] == \\
    ["interrupted [1]", "then [4, 5]", "[1, 4, 5]"], lines  # the notes have been taken away
assert os.waitpid(os_pid, 0)[1] == 0
nothing_left()
""",
    )


def test_enough_workers_are_enough(slurm: Slurm) -> None:
    run(
        slurm,
        """
# Of several jobs.
blocker = block("n1,n2")
begin = time.monotonic()
pids = addprocs(SlurmManager(4), split=2, exclusive=True, min_workers=2)
assert len(pids) == 2 and h.workers() == pids
assert sorted(everywhere.call(h.myid)) == [1, *pids]
shown("scancel", blocker)
until(lambda: h.nworkers() == 4)
assert len(everywhere.call(h.myid)) == 5
rmprocs(h.workers())
nothing_left()

# Of one job: a worker that takes its time.
Path("slow").write_text(f'''#!/bin/sh
if [ "$SLURM_PROCID" = 1 ]; then while [ ! -e go ]; do sleep 0.05; done; fi
exec {sys.executable} "$@"
''')
os.chmod("slow", 0o755)
one = dict(python="./slow", mpi="none")
pids = addprocs(SlurmManager(3), min_workers=2, **one)
assert len(pids) == 2 and h.workers() == pids, (pids, h.workers())
Path("go").touch()
until(lambda: h.nworkers() == 3)
assert len(everywhere.call(h.myid)) == 4
os.remove("go")
rmprocs(h.workers())
until(lambda: not queue())

# Too few at the end of the time.
error = refused(LaunchError, "1 worker did not register within 10 s", n=3, min_workers=3,
                timeout=10, **one)
assert len(error.jobs) == 1
rmprocs(error.pids)
nothing_left()
""",
    )
