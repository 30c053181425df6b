"""`addprocs(SlurmManager(n), …)`: its options, its refusals, its ways to start a world."""

import re

import pytest

from tests import containers, helpers
from tests.slurm.cluster import Finished, Slurm
from tests.slurm.drivers import PRELUDE


def run(slurm: Slurm, text: str, timeout: float = 90) -> Finished:
    """Run a driver to its good end."""
    done = slurm.driver(PRELUDE + text, timeout=timeout)
    assert done.rc == 0, f"{done.out}\n{done.err}"
    return done


@pytest.mark.any_mpi
def test_what_is_wrong_with_options_is_told_before_anything_is_made(slurm: Slurm) -> None:
    run(
        slurm,
        """
refused(TypeError, "queue_timeout", querue_timeout=3)
refused(TypeError, "job_dir", "--job-dri", job_dri="x")
refused(TypeError, "'timeout'", timout=3)
refused(ValueError, "ntasks=3", "SlurmManager(2)", n=2, ntasks=3)
refused(ValueError, "n=", "SlurmManager(2)", n=2, **{"-n": "3"})
refused(ValueError, "chdir='/tmp'", "dir=", chdir="/tmp")
refused(ValueError, "array='0-3'", "split=", array="0-3")
refused(ValueError, "wrap='ls'", "template=", wrap="ls")
refused(ValueError, "split=", split=0)
refused(ValueError, "ntasks_per_node", split="node")
refused(ValueError, "nodes=2", "split='node'", split="node", ntasks_per_node=1, nodes=2)
refused(ValueError, "launcher=", "mpiexec", launcher="mpirun")
refused(TypeError, "keep=", keep="yes")
refused(ValueError, "queue_timeout=", queue_timeout=-1)
refused(ValueError, "one line", comment="two\\nlines")
refused(ValueError, "nope.j2", "/etc/hpcdist/templates", template="nope.j2")
refused(ValueError, "[profile.bigmem]", profile="bigmem")
refused(ValueError, "/nonexistent", dir="/nonexistent")
refused(ValueError, "backslash", job_dir="a\\\\b")
Path("bad.j2").write_text(
    '{% extends "builtin/slurm.sh.j2" %}\\n{% block setup %}{{ nosuch }}{% endblock %}\\n')
refused(ValueError, "bad.j2, line 2", "nosuch", template="bad.j2")
for n in (0, -1, True, "3"):
    try:
        SlurmManager(n)
    except ValueError as exc:
        assert repr(n) in str(exc)
    else:
        raise AssertionError(n)
assert not RUNS.exists() or not list(RUNS.iterdir())
assert h.procs() == [1]
""",
    )


@pytest.mark.any_mpi
def test_what_slurm_refuses_is_told_in_its_words(slurm: Slurm) -> None:
    run(
        slurm,
        """
refused(LaunchError, "Invalid partition name", "nope", "submitting the job", partition="nope")
refused(LaunchError, "bogus-option", bogus_option=3)
refused(LaunchError, "Memory specification can not be satisfied", mem="999G")
refused(LaunchError, "Memory specification can not be satisfied", mem_per_cpu="999G")
refused(LaunchError, "Invalid --time", t="yesterday")
refused(LaunchError, "Invalid feature", constraint="gpu")
refused(LaunchError, "Invalid directive", "opt", options=["--comment=raw opt"])
refused(LaunchError, "interface='ib7'", "lo (127.0.0.1)", interface="ib7")
refused(LaunchError, "/proc/nowhere", job_dir="/proc/nowhere")
refused(LaunchError, "/nonexistent/python", python="/nonexistent/python")

exc = refused(LaunchError, "can never start: PartitionTimeLimit", partition="debug", t="10:00:00")
assert len(exc.jobs) == 1 and exc.jobs[0].isdigit(), exc.jobs

# A job that dies at its start: its state, its exit code, and the last it has printed.
refused(LaunchError, "FAILED, exit code 2", "before\\n", "setup failed on n", "at: ls /nonexistent",
        setup=["echo before", "ls /nonexistent", "echo after"])
refused(LaunchError, "exit code 1", "one\\n", "at: false", setup="echo one\\nfalse\\necho two\\n")
refused(LaunchError, "exit code 127", "module: command not found", "module load gcc/12",
        modules=["gcc/12"])
refused(LaunchError, "exit code 2", "unknown option --bogus", exeflags=["--bogus"])
refused(LaunchError, "Invalid MPI type 'pmix_v99'", mpi="pmix_v99")
refused(LaunchError, "exit code 9", python="python", setup=["python() { exit 9; }"])
nothing_left()
assert h.procs() == [1]
rmprocs(addprocs(SlurmManager(1)))  # none of this has hurt
nothing_left()
""",
    )


@pytest.mark.any_mpi
def test_options_reach_the_job(slurm: Slurm) -> None:
    run(
        slurm,
        """
pids = addprocs(SlurmManager(4), partition="debug", t="00:01:30", nodes=2, ntasks_per_node=2,
                exclusive=True, mem_per_cpu="20M", nice=None, comment=False,
                options=["--comment=raw", "--nice=7"])
(job,) = {row.job_id for row in h.status() if row.pid in pids}
assert queue("-o", "%P %l %D %C %m %k %h") == ["debug 2:00 2 128 20M raw NO"], queue("-o", "%all")
assert "Nice=7" in shown("scontrol", "show", "job", job)
places = [(row.host, row.rank) for row in h.status() if row.pid in pids]
assert places == [("n1", 0), ("n1", 1), ("n2", 2), ("n2", 3)], places
assert h.procs(pids[0]) == pids[:2] and h.procs(pids[3]) == pids[2:] and h.procs(1) == [1]
rmprocs(pids)

# Short and long names, dashes and underscores name one option; a list is repeated.
script = SlurmManager(1).job_script(p="debug", mem_per_cpu="1M", licenses=["a", "b"])
assert "#SBATCH -p debug" in script and script.count("#SBATCH --licenses=") == 2, script
assert not RUNS.exists() or len(list(RUNS.iterdir())) <= 1  # showing makes nothing

# Each worker may use as many processors as it was given.
pids = addprocs(SlurmManager(2), cpus_per_task=3, setup=["export A='1 2'", 'export B="$A 3"'])
seen = asked(pids[1], lambda: (os.environ["SLURM_CPUS_PER_TASK"], os.environ["B"]))
assert seen == ("3", "1 2 3"), seen
nothing_left()
""",
    )


def test_the_workers_are_as_their_user_wants_them(slurm: Slurm) -> None:
    run(
        slurm,
        """
odd = Path("a $HOME b'c # é").absolute()
odd.mkdir()
env = {"A": "x $y 'z' \\"q\\" é \\\\ `id`\\nnl", "OMP_NUM_THREADS": "7"}
pids = addprocs(SlurmManager(2), dir=odd, job_dir=odd / "jobs x", env=env, job_name="my/job name",
                comment="it's # a \\\\ comment", setup='export B="$PWD"')
assert list((odd / "jobs x").iterdir()), "the run's folder is where it was asked for"
assert queue("-o", "%j|%k") == ["my/job name|it's # a \\\\ comment"], queue("-o", "%j|%k")
seen = asked(pids[0], lambda: (os.getcwd(), os.environ["A"], os.environ["OMP_NUM_THREADS"],
                               os.environ["B"], os.environ["OPENBLAS_NUM_THREADS"]))
assert seen == (str(odd), env["A"], "7", str(odd), "1"), seen
until(lambda: not list((odd / "jobs x").iterdir()))

for way, flags in (("all", ["-X", "dev", "-W", "ignore::DeprecationWarning"]), ("text", "-X dev")):
    pids = addprocs(SlurmManager(1), exeflags=flags, enable_threaded_blas=True, python="python")
    dev, threads, python = asked(
        pids[0], lambda: (sys.flags.dev_mode, os.environ.get("OMP_NUM_THREADS"), sys.executable))
    assert (dev, threads) == (True, None) and os.path.samefile(python, sys.executable), python

# A template of the user's, one of the project's, and settings in files.
text = '''{% extends "builtin/slurm.sh.j2" %}
{% block setup %}
export SITE="WHOSE"
{{ super() }}
{% endblock %}
'''
Path("my.sh.j2").write_text(text.replace("WHOSE", "mine"))
Path("hpcdist-templates").mkdir()
Path("hpcdist-templates/slurm.sh.j2").write_text(text.replace("WHOSE", "project"))
for params, site in (({"template": "my.sh.j2"}, "mine"), ({}, "project")):
    pids = addprocs(SlurmManager(1), setup="export SITE2=$SITE", **params)
    assert asked(pids[0], lambda: os.environ["SITE2"]) == site
nothing_left()
""",
    )


@pytest.mark.any_mpi
def test_profiles_and_files_of_settings(slurm: Slurm) -> None:
    slurm.file(
        "hpcdist.toml",
        '[slurm]\npartition = "debug"\n[profile.bigmem]\ncomment = "big"\nmem-per-cpu = "10M"\n'
        'setup = ["export P=1"]\n',
    )
    run(
        slurm,
        """
pids = addprocs(SlurmManager(1), profile="bigmem")
assert queue("-o", "%P %k %m") == ["debug big 10M"], queue("-o", "%P %k %m")
assert asked(pids[0], lambda: os.environ["P"]) == "1"
until(lambda: not queue())
pids = addprocs(SlurmManager(1), profile="bigmem", partition=None, mem_per_cpu="20M", comment=False)
assert queue("-o", "%P %k %m") == ["compute (null) 20M"], queue("-o", "%P %k %m")
rmprocs(pids)
refused(ValueError, "bigmem", profile="bigmen")
nothing_left()
""",
    )


def test_ways_to_start_a_world(slurm: Slurm) -> None:
    family = helpers.mpi_flavour()
    wrong, words = {
        "mpich": ("pmix", ("MPI_Init_thread", "PMI version")),
        "openmpi": ("pmi2", ("1 ranks and not 2", "do not match", "Open MPI")),
    }.get(family, ("", ()))
    if not wrong:
        pytest.skip(f"no Slurm flavour of {family} is known")
    right = {"mpich": "pmi2", "openmpi": "pmix"}[family]
    run(
        slurm,
        f"""
def look(world, /, **params):
    pids = addprocs(SlurmManager(2), nodes=2, **params)
    rows = [(row.host, row.rank) for row in h.status() if row.pid in pids]
    assert rows == [("n1", 0), ("n2", 1)], rows
    assert remotecall_fetch(lambda q: remotecall_fetch(h.myid, q), pids[0], pids[1]) == pids[1]
    remotecall_fetch(print, pids[1], "hello", params)
    if world:
        size, rank = remotecall_fetch(sizes, pids[1])
        assert (size, rank) == (2, 1), (params, size, rank)
    else:
        try:
            h.spmd(h.myid, pids=pids)
        except ValueError as exc:
            assert "MPI" in str(exc)
        else:
            raise AssertionError("no world, and yet spmd")
    rmprocs(pids)

def sizes():
    from mpi4py import MPI
    return MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank

look(True, launcher="mpiexec")
look(True, launcher="srun")
look(True, mpi={right!r})
look(True, isolation="world")
look(False, isolation="process")
look(False, mpi="none")
nothing_left()
""",
    )
    text = f"refused(LaunchError, *{words!r}, n=2, mpi={wrong!r})\nnothing_left()\n"
    run(slurm, text)
    # A rank of Open MPI's that takes itself for a world of its own, and is killed in the middle of
    # its start because another has said so, leaves this.
    for node in slurm.nodes:
        slurm.root("sh", "-c", "rm -rf /tmp/ompi.* /tmp/hpcdist-* /dev/shm/sm_segment.*", on=node)


def test_many_small_jobs(slurm: Slurm) -> None:
    run(
        slurm,
        """
going = h.launch(SlurmManager(5), split=2, keep=True)
pids = going.wait()
assert len(going.jobs) == 3 and all(job.cluster is None for job in going.jobs), going.jobs
rows = [(row.job_id, row.rank) for row in h.status() if row.pid in pids]
first, second, third = going.jobs
assert rows == [(first, 0), (first, 1), (second, 0), (second, 1), (third, 0)], rows
array = first.partition("_")[0]
assert (first, second) == (f"{array}_0", f"{array}_1"), going.jobs
assert len({row.world for row in h.status() if row.pid in pids}) == 3
submits = [c for c in commands() if c["argv"][0] == "sbatch"]
assert len(submits) == 2, submits  # one for the array, one for the rest
assert remotecall_fetch(lambda q: remotecall_fetch(h.myid, q), pids[0], pids[4]) == pids[4]
try:
    h.spmd(h.myid, pids=pids)
except ValueError as exc:
    assert "world" in str(exc), exc
else:
    raise AssertionError("spmd over several worlds")
assert h.spmd(lambda: h.comm().size, pids=pids[2:4]) == [2, 2]
rmprocs(pids[2:4])  # one task of the array ends, the other lives
until(lambda: sorted(line.split()[0] for line in queue()) == sorted([first, third]))
assert remotecall_fetch(h.myid, pids[0]) == pids[0]
rmprocs(h.workers())
until(lambda: not queue())
for run in RUNS.iterdir():
    subprocess.run(["rm", "-r", run])

pids = addprocs(SlurmManager(4), split="node", ntasks_per_node=2, exclusive=True)
assert [row.host for row in h.status()[1:]] in (["n1"] * 2 + ["n2"] * 2, ["n2"] * 2 + ["n1"] * 2)
rmprocs(pids)
pids = addprocs(SlurmManager(3), split=1, isolation="process")
assert len({row.job_id for row in h.status()[1:]}) == 3
rmprocs(pids)
nothing_left()
""",
    )


def test_workers_run_under_a_command(slurm: Slurm) -> None:
    run(
        slurm,
        """
import os, sys
NICE = ["nice", "-n", "5", sys.executable]
for launcher in ("srun", "mpiexec"):
    pids = addprocs(SlurmManager(2), nodes=2, python=NICE, launcher=launcher)
    assert {remotecall_fetch(os.nice, pid, 0) for pid in pids} == {5}, launcher
    h.rmprocs(pids)
""",
    )


def test_workers_run_in_a_container(slurm: Slurm) -> None:
    """The stand-in needs a user namespace, as the real one does where it is not set-uid."""
    run(
        slurm,
        containers.PRELUDE
        + f"""
for launcher in {("srun", "mpiexec") if helpers.mpi_flavour() == "mpich" else ("mpiexec",)}:
    pids = addprocs(SlurmManager(2), nodes=2, container="app.sif", launcher=launcher)
    assert everywhere.call(inside, pids=pids) == dict.fromkeys(pids, expected())
    assert h.spmd(lambda: h.comm().allreduce(1), pids=pids) == [2, 2], launcher
    h.rmprocs(pids)

Path("driver.py").write_text(
    "import hpcdist, os; hpcdist.init(); "
    "print('inside', hpcdist.nworkers(), os.environ['APPTAINER_CONTAINER'])")
done = subprocess.run(
    [sys.executable, "-m", "hpcdist", "submit", "driver.py", "-n", "2", "--nodes", "2", "--wait",
     "--container", "app.sif", "--container-args", "--nv", "--wrapper", "nice -n 3"],
    capture_output=True, text=True, timeout=60)
assert done.returncode == 0, done
log = Path(done.stderr.partition("its output goes to ")[2].split()[0]).read_text()
assert f"inside 1 {{image}}" in log, log
shown(sys.executable, "-m", "hpcdist", "jobs", "--clear")
""",
    )


def test_workers_share_the_gpus_of_their_node(slurm: Slurm) -> None:
    run(
        slurm,
        """
import os
seen = lambda: (os.environ["SLURMD_NODENAME"], os.environ.get("CUDA_VISIBLE_DEVICES"))
def shares(n, **params):
    pids = addprocs(SlurmManager(n), **params)
    found = sorted(everywhere.call(seen, pids=pids).values())
    rmprocs(pids)
    return found
two = [("n1", "0,2"), ("n1", "1,3"), ("n2", "0,2"), ("n2", "1,3")]
assert shares(4, nodes=2, ntasks_per_node=2, gres="gpu:4", gpus="auto") == two
eight = shares(8, nodes=1, gres="gpu:4", gpus="auto")
assert eight == sorted([("n1", str(k)) for k in range(4)] * 2), eight
# Granted to each task alone, by srun: nothing is left to be shared.
alone = shares(2, nodes=1, gpus_per_task=2, gpus="auto")
assert [len(gpus.split(",")) for _, gpus in alone] == [2, 2], alone  # whichever by mpiexec
nothing_left()
""",
    )


def test_process_1_dials_workers_that_cannot_dial_it(slurm: Slurm) -> None:
    """As behind a firewall: what asks for a connection to that address gets no answer at all."""
    walled = "192.0.2.8"
    (login,) = re.findall(r"inet (10\.\S+)/", slurm.root("ip", "-4", "addr").out)
    silent = ("from", walled, "blackhole")
    try:
        assert slurm.root("ip", "addr", "add", f"{walled}/32", "dev", "br0").rc == 0
        assert slurm.root("ip", "rule", "add", *silent).rc == 0
        for node in slurm.nodes:
            assert slurm.root("ip", "route", "add", walled, "via", login, on=node).rc == 0
        done = run(
            slurm,
            f"""
pids = addprocs(SlurmManager(4), nodes=2, ntasks_per_node=2, interface="{walled}")
assert {{row.host for row in h.status()[1:]}} == {{"n1", "n2"}}
assert everywhere.call(h.myid, pids=pids) == {{pid: pid for pid in pids}}
assert h.spmd(lambda: h.comm().allreduce(1), pids=pids) == [4] * 4
# An interface that other hosts know nothing of; there the answer is a refusal.
more = addprocs(SlurmManager(1), interface="lo", isolation="process")
assert remotecall_fetch(lambda: remotecall_fetch(h.myid, pids[0]), more[0]) == pids[0]
rmprocs(pids + more)
nothing_left()
""",
        )
        assert "refused" not in done.err
    finally:
        slurm.root("ip", "rule", "del", *silent)
        slurm.root("ip", "addr", "del", f"{walled}/32", "dev", "br0")
        for node in slurm.nodes:
            slurm.root("ip", "route", "del", walled, on=node)
