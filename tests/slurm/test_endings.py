"""How workers, drivers, jobs and nodes end, and what those who go on see of it."""

from __future__ import annotations

import json
import re
import signal
import time

import pytest

from tests.helpers import eventually, mpi_flavour, patient
from tests.slurm.cluster import Slurm
from tests.slurm.endings import HEAD, run, says

# Workers


def test_one_death_stays_one_death(slurm: Slurm) -> None:
    said = run(
        slurm,
        """
def die(how):
    if how == "exit":
        os._exit(7)
    os.kill(os.getpid(), getattr(signal, how))
    time.sleep(60)

def fragile(i, host):
    if os.uname().nodename == host:
        try:
            os.close(os.open("died", os.O_CREAT | os.O_EXCL))  # by one of them alone
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02)
    return i * i

pids = on_two_nodes(8)
(first, mine), (other, theirs) = by_host(pids).items()
say(hosts=[first, other])
deaths = []
for pid, how in ((mine[1], "SIGKILL"), (theirs[1], "SIGSEGV"), (theirs[2], "exit")):
    waiting = remotecall(time.sleep, mine[2], 0.3)
    deaths.append({"how": how, "victim": pid, **loss_of(remotecall(die, pid, how))})
    assert waiting.fetch(timeout=10) is None, "a call on another worker"
    left = workers()
    assert pid not in left
    assert spmd(total, pids=left) == [sum(left)] * len(left)
    seen = hpcdist.everywhere.call(workers, pids=left)
    assert all(found == left for found in seen.values()), seen
say(deaths=deaths)
# Not there: a host without ranks, of which one has ended with a status, ends prterun (5.0.11).
assert pmap(lambda i: fragile(i, first), range(40)) == [i * i for i in range(40)]
left = workers()
assert len(left) == 4, left
victims = [[p for p in left if p in some][-1] for some in (mine, theirs)]
futures = hold(victims)
begin = time.monotonic()
rmprocs(victims)
say(removal=time.monotonic() - begin, reasons=[loss_of(f)["why"] for f in futures])
left = workers()
assert spmd(total) == [sum(left)] * len(left)
""",
    )
    for death in said["deaths"]:
        assert death["pid"] == death["victim"]
        assert death["took"] < 4, death  # 2 s, on a machine with time for it
        assert death["host"] in said["hosts"]
    whys = [death["why"] for death in said["deaths"]]
    assert whys[0] == "killed by SIGKILL"
    assert said["removal"] < 15
    assert said["reasons"] == ["removed", "removed"]
    assert whys[1:] == ["killed by SIGSEGV", "exit code 7"]


def test_mpi_abort_is_told_with_its_code(slurm: Slurm) -> None:
    """Slurm would end the whole step of an MPICH rank that aborts; Open MPI's launcher may."""
    said = run(
        slurm,
        """
def abort():
    from mpi4py import MPI
    MPI.COMM_WORLD.Abort(7)

pids = on_two_nodes(4)
own = remotecall(abort, pids[3])
say(own=why_in_time(own, "Abort"))
if sys.argv[1] == "mpich":
    assert spmd(total) == [sum(pids[:3])] * 3
    rmprocs(workers())
""",
        mpi_flavour(),
    )
    assert said["own"].partition(";")[0] == "MPI_Abort with code 7", said


# Drivers


DRIVER = (
    HEAD
    + """
way, busy = sys.argv[1:]
pids = on_two_nodes(4)
if busy == "stuck":
    hold(by_host(pids)["n1"][:1] + by_host(pids)["n2"][:1])
say(ready=True)
if way == "raise":
    raise KeyError("mine")
if way == "exit":
    sys.exit(5)
if way != "return":
    time.sleep(600)
"""
)
WAYS = {
    ("return", "stuck"): 0,
    ("raise", "stuck"): 1,
    ("exit", "idle"): 5,
    ("exit", "stuck"): 5,
    ("SIGTERM", "stuck"): -signal.SIGTERM,
    ("SIGKILL", "idle"): -signal.SIGKILL,
    ("SIGKILL", "stuck"): -signal.SIGKILL,
}


@pytest.mark.parametrize(("way", "busy"), WAYS)
def test_with_its_driver_a_job_ends(slurm: Slurm, way: str, busy: str) -> None:
    if way.startswith("SIG"):  # nobody is left to clear away what may help to find out why
        slurm.expected.append(".hpcdist/jobs/*/*")
    driver = slurm.start(slurm.python, slurm.program(DRIVER), way, busy)
    says(driver, "ready")
    begin = time.monotonic()
    if way.startswith("SIG"):
        driver.send(signal.Signals[way])
    done = driver.wait(20)
    assert done.rc == WAYS[way, busy], done.err
    eventually(lambda: not slurm.processes("n1", "n2", "n3"), 30)
    eventually(lambda: not slurm.jobs(), 30)
    assert time.monotonic() - begin < patient(30)
    assert "KeyError: 'mine'" in done.err if way == "raise" else "Traceback" not in done.err
    # Whatever stays behind of a driver that was killed, the secret does not.
    assert not [name for name in slurm.files() if name.endswith("/join")]


CHILDREN = (
    HEAD
    + """
pids = on_two_nodes(4)

def start_some():
    import subprocess
    subprocess.Popen(["sleep", "599"], start_new_session=True)
    subprocess.run("setsid sleep 598 &", shell=True, check=True)  # and without a parent

for pid in pids:
    remotecall_fetch(start_some, pid)
say(ready=True)
if sys.argv[1] == "SIGKILL":
    time.sleep(600)
"""
)


@pytest.mark.parametrize("way", ["SIGKILL", "return"])
def test_with_a_job_ends_what_its_workers_have_started(slurm: Slurm, way: str) -> None:
    if way == "SIGKILL":
        slurm.expected.append(".hpcdist/jobs/*/*")
    driver = slurm.start(slurm.python, slurm.program(CHILDREN), way)
    says(driver, "ready")
    if way == "SIGKILL":
        left = [line for line in slurm.processes("n1", "n2", "n3").values() if "sleep 59" in line]
        assert len(left) == 8
        driver.send(signal.SIGKILL)
    driver.wait(20)
    eventually(lambda: not slurm.processes("n1", "n2", "n3"), 30)
    eventually(lambda: not slurm.jobs(), 30)


def test_a_job_whose_driver_is_gone_before_it_starts_ends_by_itself(slurm: Slurm) -> None:
    slurm.expected.append(".hpcdist/jobs/*/*")
    # One is killed while its job is queued, one while sbatch runs.
    queued = slurm.start(
        slurm.python,
        slurm.program(HEAD + "addprocs(SlurmManager(2), hold=True, job_name='queued')"),
    )
    slurm.file(
        "bin/sbatch",
        "#!/bin/sh\n: >submitting\nwhile [ ! -e killed ]; do sleep 0.05; done\n"
        'exec /usr/bin/sbatch "$@"\n',
        0o755,
    )
    submitting = slurm.start(
        slurm.python,
        slurm.program(
            HEAD
            + "os.environ['PATH'] = f'{os.getcwd()}/bin:' + os.environ['PATH']\n"
            + "addprocs(SlurmManager(2), job_name='submitting')"
        ),
    )
    (job,) = eventually(slurm.jobs, 30)
    assert job.reason == "JobHeldUser"
    queued.kill()
    eventually(lambda: slurm.path("submitting").exists(), 30)
    submitting.kill()
    queued.wait()
    submitting.wait()
    slurm.file("killed", "")
    eventually(lambda: not any("sbatch" in line for line in slurm.processes("login").values()), 30)
    assert slurm.login("scontrol", "release", job.id).rc == 0
    begin = time.monotonic()
    assert slurm.ended(job.id, 30).state in ("FAILED", "COMPLETED")
    eventually(lambda: slurm.path("../.hpcdist").exists() and not slurm.jobs(), 30)
    assert time.monotonic() - begin < patient(30)
    eventually(lambda: not slurm.processes(), 10)
    assert not [name for name in slurm.files() if name.endswith("/join")]
    logs = slurm.login("sh", "-c", "cat ~/.hpcdist/jobs/*/log").out
    assert "Connection refused" in logs, logs  # of the second, where sbatch was not ended in time
    assert "Traceback" not in logs, logs


# Jobs

SCANCEL = """
pids = addprocs(SlurmManager(2))
number = next(s.job_id for s in hpcdist.status() if s.pid == pids[0])
waiting = [remotecall(time.sleep, pid, 600) for pid in pids]
begin = time.monotonic()
assert os.system(f"scancel {number}") == 0
losses = [loss_of(future) for future in waiting]
took = time.monotonic() - begin
why = [why_in_time(future, "CANCELLED") for future in waiting]
told = time.monotonic() - begin
"""


def test_a_cancelled_job_and_one_out_of_memory_where_sacct_is_off_or_forbidden(
    slurm: Slurm,
) -> None:
    slurm.file(
        "none/sacct", "#!/bin/sh\necho 'sacct: error: Access denied' >&2\nexit 1\n", mode=0o755
    )
    # Nothing here can be made to run out of memory: no control groups.
    slurm.file(
        "oom/sacct",
        "#!/bin/sh\nfor last; do case $last in [0-9]*) job=$last ;; esac; done\n"
        'echo "$job|OUT_OF_MEMORY|0:125|2026-01-01T00:00:00|2026-01-01T00:01:00|n1"\n',
        mode=0o755,
    )
    said = run(
        slurm,
        SCANCEL
        + """
say(off=why, took=took, told=told)
path = os.environ["PATH"]
os.environ["PATH"] = os.getcwd() + "/none:" + path
exec(open(sys.argv[1]).read())
say(forbidden=why)
os.environ["PATH"] = os.getcwd() + "/oom:" + path
pid, = addprocs(SlurmManager(1))
waiting = remotecall(time.sleep, pid, 600)
number = next(s.job_id for s in hpcdist.status() if s.pid == pid)
assert os.system(f"scancel {number}") == 0
say(memory=why_in_time(waiting, "OUT_OF_MEMORY"))
os.environ["PATH"] = path
pid, = addprocs(SlurmManager(1))
assert remotecall_fetch(hpcdist.myid, pid) == pid
""",
        slurm.file("again.py", SCANCEL),
    )
    assert said["took"] < patient(5)
    for found in (*said["off"], *said["forbidden"]):
        assert re.search(r"its job \d+ ended: CANCELLED", found), said
    assert "OUT_OF_MEMORY" in said["memory"]


def test_a_cancelled_job_where_sacct_works(accounted_slurm: Slurm) -> None:
    said = run(accounted_slurm, SCANCEL + "say(why=why, told=told)")
    for found in said["why"]:
        assert "CANCELLED by 20001" in found
    assert said["told"] < 20


# Folders


def test_with_its_last_worker_a_job_ends_and_its_folder_goes(slurm: Slurm) -> None:
    said = run(
        slurm,
        """
import glob, subprocess
def jobs():
    return subprocess.check_output(["squeue", "-h", "-o", "%i"], text=True).split()
def folders():
    return glob.glob(os.path.expanduser("~/.hpcdist/jobs/*"))
a, b = on_two_nodes(2)
assert len(jobs()) == len(folders()) == 1
rmprocs(a)
assert remotecall_fetch(hpcdist.myid, b) == b
assert len(jobs()) == 1
rmprocs(b)
until(lambda: not jobs() and not folders(), 15)
pids = addprocs(SlurmManager(2), keep=True)
rmprocs(pids)
until(lambda: not jobs(), 15)
(folder,) = folders()
say(folder=os.path.basename(folder), secret=hpcdist.cluster_cookie())
""",
    )
    place = f"../.hpcdist/jobs/{said['folder']}"
    slurm.expected.append(".hpcdist/jobs/*/*")
    eventually(lambda: slurm.path(f"{place}/exit").exists())
    kept = {path.name: path.read_text() for path in slurm.path(place).iterdir()}
    assert kept.keys() == {"script.sh", "manifest.json", "log", "commands.jsonl", "exit"}
    assert json.loads(kept["manifest.json"])["jobs"]
    commands = [json.loads(line)["argv"][0] for line in kept["commands.jsonl"].splitlines()]
    assert commands[0] == "sbatch"
    for text in kept.values():
        assert said["secret"] not in text
        assert said["secret"].encode().hex() not in text
        assert "PRIVATE KEY" not in text
    assert kept["log"] == ""
