"""What PBS's commands print, read, and the scripts for it: recorded from OpenPBS 23.06.06."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcdist._keeper.installed_mpi import Mpi, scrubbed
from hpcdist._schedulers import commands
from hpcdist._schedulers.commands import CommandFailed, Done, SubmitError, environment
from hpcdist._schedulers.job import JobId
from hpcdist._schedulers.launchers import AGENT
from hpcdist._schedulers.pbs import PBSManager
from hpcdist._schedulers.pbs_words import (
    STATES,
    chunks,
    has_id,
    is_torque,
    never_starts,
    parse_found,
    parse_jobs,
    parse_submit,
    verdict_of,
)
from hpcdist._schedulers.submission import submit
from hpcdist._schedulers.verdict import JobState

QSTAT = """\
{
    "timestamp":1795238191,
    "pbs_version":"23.06.06",
    "pbs_server":"head",
    "Jobs":{
        "7.head":{
            "Job_Name":"hpcdist-d34ad69d",
            "Job_Owner":"hpcuser@head",
            "job_state":"R",
            "substate":42,
            "exec_host":"n1/0*4+n2/0*4",
            "exec_vnode":"(n1:ncpus=4)+(n2:ncpus=4)",
            "Variable_List":{
                "PBS_O_HOME":"/home/hpcuser",
                "BAR":100000,
                "job_state":"F"
            },
            "comment":"Job run at Sat Nov 21 at 05:15 on (n1:ncpus=4)+(n2:ncpus=4)",
            "stime":"Sat Nov 21 05:15:47 2026",
            "Submit_arguments":"-f /home/hpcuser/.hpcdist/jobs/hpcdist-d34ad69d/script.sh"
        },
        "26[].head":{
            "Job_Name":"other",
            "job_state":"B",
            "substate":10
        }
    }
}
"""


def ended(**facts: Any) -> Any:
    return verdict_of({"job_state": "F", **facts})


def test_a_running_job() -> None:
    jobs = parse_jobs(QSTAT)
    assert list(jobs) == ["7.head", "26[].head"]
    found = verdict_of(jobs["7.head"])
    assert (found.state, found.word, found.nodes) == (JobState.RUNNING, "RUNNING", "n1,n2")
    assert found.reason == ""
    assert found.start is not None
    assert found.start.hour == 5
    assert verdict_of(jobs["26[].head"]).state is JobState.RUNNING


@pytest.mark.parametrize(
    "fault",
    ['"LEAD":005,', '"A":"it\\\'s",', '"A":"a\\,b",', '"A":"x\ny",', '"A":1e,', '"A":"\t"'],
)
def test_faulty_json_still_tells_the_states(fault: str) -> None:
    text = QSTAT.replace('"BAR":100000,', f"{fault}")
    found = parse_jobs(text)
    assert list(found) == ["7.head", "26[].head"]
    verdict = verdict_of(found["7.head"])
    assert (verdict.state, verdict.nodes) == (JobState.RUNNING, "n1,n2")


def test_warnings_before_the_answer_and_no_answer() -> None:
    assert list(parse_jobs("Site notice\n" + QSTAT)) == ["7.head", "26[].head"]
    assert parse_jobs("") == {}
    assert parse_jobs("qstat: cannot connect to server head (errno=111)") == {}
    assert parse_jobs('{"timestamp":1}') == {}


def test_a_waiting_job() -> None:
    comment = "Not Running: Insufficient amount of resource: ncpus (R: 8 A: 0 T: 16)"
    facts = {"job_state": "Q", "comment": comment, "estimated": {"start_time": 1795238191}}
    found = verdict_of(facts)
    assert (found.state, found.word, found.reason) == (JobState.QUEUED, "PENDING", comment)
    assert found.start is not None
    assert found.start.timestamp() == 1795238191
    assert not PBSManager(1).hopeless(found)
    assert PBSManager(1).hopeless(
        verdict_of({"job_state": "Q", "comment": "Can Never Run: Not enough total nodes available"})
    )
    assert not never_starts("")


def test_every_state_is_known_and_a_new_one_keeps_its_word() -> None:
    for letter, (state, word) in STATES.items():
        found = verdict_of({"job_state": letter})
        assert (found.state, found.word) == (state, word)
    found = verdict_of({"job_state": "Y"})
    assert (found.state, found.word) == (JobState.UNKNOWN, "Y")


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"Exit_status": 0, "substate": 92}, "COMPLETED"),
        ({"Exit_status": 3, "substate": 93}, "FAILED, exit code 3"),
        ({"Exit_status": 138, "substate": 93}, "FAILED, exit code 138"),
        ({"Exit_status": 265, "substate": 93}, "FAILED, killed by SIGKILL"),
        ({"Exit_status": 271, "substate": 91}, "CANCELLED"),
        ({"substate": 91}, "CANCELLED"),
        ({"Exit_status": -29, "substate": 93}, "TIMEOUT (exceeded resource walltime)"),
        ({"Exit_status": -27, "substate": 93}, "OUT_OF_MEMORY (exceeded resource mem)"),
        ({"Exit_status": -1, "substate": 93}, "FAILED (it could not be started)"),
        ({"Exit_status": -77, "substate": 93}, "FAILED (PBS says -77)"),
    ],
)
def test_ends(facts: dict[str, Any], said: str) -> None:
    found = ended(**facts)
    assert found.describe() == said
    assert found.state.terminal


@pytest.mark.timeout(240)
@given(st.text(max_size=60))
def test_no_text_upsets_a_parser(text: str) -> None:
    assert isinstance(parse_jobs(text), dict)
    assert isinstance(parse_jobs('{"Jobs":' + text), dict)
    verdict_of({"job_state": text, "comment": text, "exec_host": text, "stime": text})
    ended(Exit_status=text, substate=text)
    has_id(text)
    is_torque(text)


def test_the_id_among_other_words() -> None:
    assert parse_submit("0.head\n") == "0.head"
    assert parse_submit("Welcome to hell\n12.pbs-01.site.org \nbye\n") == "12.pbs-01.site.org"
    assert parse_submit("26[].head\n") == "26[].head"
    with pytest.raises(ValueError, match="'oops'"):
        parse_submit("oops", "nothing")
    assert has_id("7.head\n")
    assert not has_id("7.he")


def test_a_lost_submission_is_found() -> None:
    folder = "/home/hpcuser/.hpcdist/jobs/hpcdist-d34ad69d"
    assert parse_found(QSTAT, f"{folder}/script.sh") == JobId("7.head")
    assert parse_found(QSTAT, "/elsewhere/hpcdist-d34ad69d/script.sh") == JobId("7.head")
    assert parse_found(QSTAT, "/elsewhere/hpcdist-00000000/script.sh") is None


def test_chunks() -> None:
    assert [count for count, _ in chunks("3:ncpus=1+host=n1:mem=2gb")] == [3, 1]
    assert chunks("host=n1") == [(1, {"host": "n1"})]


# Options and scripts


@pytest.fixture(autouse=True)
def mpich(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Mpi("mpich", (5, 0), "/opt/mpich/bin/mpiexec")
    monkeypatch.setattr("hpcdist._keeper.installed_mpi.find_mpi", lambda python: found)


def directives(n: int, **params: Any) -> list[str]:
    script = PBSManager(n).job_script(**params)
    lines = [line.removeprefix("#PBS ") for line in script.splitlines() if line.startswith("#PBS ")]
    ours = ("-N hpcdist-run", "-S /bin/bash", "-r n", "-j oe", "-k doe", "-o /")
    return [line for line in lines if not line.startswith(ours)]


@pytest.mark.parametrize(
    ("n", "params", "lines"),
    [
        (4, {}, ["-l select=4:ncpus=1:mpiprocs=1:ompthreads=1"]),
        (
            4,
            {"mpiprocs": 2},
            ["-l select=2:ncpus=2:mpiprocs=2:ompthreads=1", "-l place=scatter"],
        ),
        (
            5,
            {"mpiprocs": 2, "ncpus": 8, "place": "free"},
            [
                "-l select=2:ncpus=8:mpiprocs=2:ompthreads=1+1:ncpus=8:mpiprocs=1:ompthreads=1",
                "-l place=free",
            ],
        ),
        (2, {"mpiprocs": 2}, ["-l select=1:ncpus=2:mpiprocs=2:ompthreads=1"]),
        (2, {"ngpus": 1}, ["-l select=2:ncpus=1:mpiprocs=1:ompthreads=1:ngpus=1"]),
        (2, {"enable_threaded_blas": True, "ncpus": 4}, ["-l select=2:ncpus=4:mpiprocs=1"]),
        (
            4,
            {"split": 2},
            ["-r y", "-J 0-1", "-l select=2:ncpus=1:mpiprocs=1:ompthreads=1"],
        ),
        (
            4,
            {"split": "node", "ntasks_per_node": 2},
            ["-r y", "-J 0-1", "-l select=1:ncpus=2:mpiprocs=2:ompthreads=1"],
        ),
        (4, {"select": "2:ncpus=2:mpiprocs=2:mem=1gb"}, ["-l select=2:ncpus=2:mpiprocs=2:mem=1gb"]),
        (4, {"l": "select=2:ncpus=2,walltime=5:00"}, ["-l select=2:ncpus=2", "-l walltime=5:00"]),
        (4, {"options": ["-l select=4"]}, ["-l select=4"]),
        (4, {"nodes": "2:ppn=2"}, ["-l nodes=2:ppn=2"]),
        (4, {"ntasks": 4, "mem": "2gb"}, ["-l ncpus=4", "-l mem=2gb"]),
        (
            1,
            {"walltime": "00:05:00", "queue": "debug", "A": "me", "bigmem": True, "place": None},
            [
                *("-l select=1:ncpus=1:mpiprocs=1:ompthreads=1", "-l walltime=00:05:00"),
                *("-q debug", "-A me", "-l bigmem=true"),
            ],
        ),
        (
            1,
            {"options": ["-W umask=022"]},
            ["-l select=1:ncpus=1:mpiprocs=1:ompthreads=1", "-W umask=022"],
        ),
    ],
)
def test_options(n: int, params: dict[str, Any], lines: list[str]) -> None:
    assert directives(n, **params) == lines


def test_sizes() -> None:
    manager = PBSManager(5)
    for params, sizes in (
        ({"split": 2}, [2, 2, 1]),
        ({"split": "node", "mpiprocs": 3}, [3, 2]),
        ({"split": "node", "select": "1:ncpus=4:mpiprocs=4"}, [4, 1]),
    ):
        assert list(manager.plan(manager.settings_of(params)).sizes) == sizes


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"J": "0-3"}, "J='0-3' contradicts split="),
        ({"I": True}, "terminal"),
        ({"z": True}, "id"),
        ({"mpi": "pmix"}, "mpi='pmix' contradicts PBSManager"),
        ({"launcher": "srun"}, "launcher= is one of auto, mpiexec with pbs, not 'srun'"),
        ({"select": "1:ncpus=1", "ncpus": 2}, "ncpus=2 contradicts select='1:ncpus=1'"),
        ({"nodes": 2, "mpiprocs": 2}, "mpiprocs=2 contradicts nodes=2"),
        ({"mem": "1gb", "ngpus": 1}, "ngpus=1 contradicts mem='1gb': say it in select="),
        ({"ntasks": 3}, "ntasks=3 contradicts PBSManager(4)"),
        ({"ncpus": "many"}, "ncpus='many'"),
        ({"split": "node"}, "ntasks_per_node"),
        ({"split": "node", "select": "2:ncpus=1:mpiprocs=1"}, "one chunk"),
        ({"N": "two\nlines"}, "one line"),
    ],
)
def test_contradictions(params: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        PBSManager(4).job_script(**params)


def test_never_the_whole_environment() -> None:
    assert "-V" not in " ".join(directives(1))


def test_a_value_is_quoted_as_qsub_reads_it() -> None:
    quote = PBSManager(1).quote
    assert quote("2:ncpus=1:mem=2gb") == "2:ncpus=1:mem=2gb"
    assert quote("FOO='a,b'") == "'FOO='\"'\"'a,b'\"'\"''"


GOLDEN = """\
# The launcher takes this for ssh: hpcdist-remote [option ...] host command. What runs on other
# hosts has this script's environment, but for what is each host's or task's own.
cat >"$folder/hpcdist-remote" <<'END'
#!/bin/sh
while :; do
    case $1 in
    -[bcDEeFIiJLlmOopQRSWw]) shift 2 ;;
    -*) shift ;;
    *) break ;;
    esac
done
host=$1
shift
command='. '"'"'/a '"'"'"'"'"'"'"'"'b/hpcdist-run/environment'"'"'; '"$*"
exec pbs_tmrsh "$host" /bin/sh -c "$command"
END
chmod 700 "$folder/hpcdist-remote"
export PATH="$folder:$PATH"
"""


def test_the_script(tmp_path: Path) -> None:
    script = PBSManager(4).job_script(walltime="1:00", job_dir="/a 'b")
    assert GOLDEN in script
    assert "#PBS -o '/a '\"'\"'b/hpcdist-run/pbs.log'\n" in script
    assert f"mpiexec -launcher ssh -launcher-exec {AGENT} -prepend-rank -n 4 /bin/sh -c " in script
    assert 'exec >>"$folder/log" 2>&1\n' in script
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_a_user_who_says_where_output_goes_finds_all_of_it_there() -> None:
    script = PBSManager(1).job_script(o="out.txt")
    assert "#PBS -o out.txt\n" in script
    assert "exec >>" not in script
    manager = PBSManager(1)
    asked = manager.plan(manager.settings_of({"o": "out.txt"})).asked
    assert manager.log_files(asked, "/work", "/run", JobId("1.head")) == [
        str(Path.cwd() / "out.txt")
    ]


def test_an_mpiexec_that_knows_the_scheduler_is_taken_plainly() -> None:
    script = PBSManager(4).job_script(launcher="mpiexec")
    assert "/opt/mpich/bin/mpiexec -prepend-rank -n 4 " in script
    assert AGENT not in script
    assert "rank $" not in script


def test_a_program_says_itself_how_it_ends() -> None:
    script = PBSManager(4).program_script(["driver.py", "a b"])
    assert f"-launcher-exec {AGENT} -n 4 " in script
    assert "driver.py 'a b' &" in script
    assert "keeper" not in script


def test_open_mpi_and_intel_reach_hosts_by_the_same_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, words in (
        (Mpi("openmpi", (5, 0, 11), "mpirun"), f"export PRTE_MCA_plm_ssh_agent={AGENT}\n"),
        (Mpi("openmpi", (4, 1), "mpirun"), f"export OMPI_MCA_plm_rsh_agent={AGENT}\n"),
        (Mpi("intel", (2021, 18), "mpiexec"), f"-bootstrap ssh -bootstrap-exec {AGENT}"),
    ):
        monkeypatch.setattr("hpcdist._keeper.installed_mpi.find_mpi", lambda python, f=found: f)
        assert words in PBSManager(4).job_script()


@pytest.mark.skipif(shutil.which("sh") is None, reason="no shell")
def test_the_agent_takes_what_ssh_would(tmp_path: Path) -> None:
    """It drops options, gives the command to a shell, and hands the environment over."""
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "pbs_tmrsh"
    fake.write_text('#!/bin/sh\necho "on $1"\nshift\nunset GIVEN\nexec "$@"\n')
    fake.chmod(0o755)
    script = PBSManager(2).job_script(job_dir=str(tmp_path / "my jobs"))
    folder = tmp_path / "my jobs" / "hpcdist-run"
    folder.mkdir(parents=True)
    begin = script.index('cat >"$folder/hpcdist-remote"')
    part = script[begin : script.index("# In the background")]
    call = f"{AGENT} -x -l me -o A=b n2 'printf \"%s\\n\"' '\"$GIVEN\"; echo' $((1 + 1))"
    done = subprocess.run(
        ["bash", "-c", f"folder='{folder}'\n{part}\n{call}"],
        env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "GIVEN": "a  'b'\n$c"},
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    assert done.stdout == "on n2\na  'b'\n$c\n2\n"


# Commands


class Fake:
    """Answers in the place of PBS's commands."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[list[str]] = []
        self.in_turn: list[tuple[int, str, str]] = []
        self.answers: dict[str, tuple[int, str, str]] = {
            "qstat --version": (0, "pbs_version = 23\n", "")
        }
        monkeypatch.setattr(commands, "run", self.run)

    def run(self, argv: list[str], **_: object) -> Done:
        self.calls.append(list(argv))
        line = " ".join(argv)
        found = [answer for key, answer in self.answers.items() if line.startswith(key)]
        status, out, err = found[-1] if found else (0, "", "")
        if self.in_turn:
            status, out, err = self.in_turn.pop(0)
        return Done(tuple(argv), status, out, err, 0.0)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(monkeypatch)


def test_one_unknown_id_among_several(fake: Fake) -> None:
    fake.answers["qstat -x"] = (153, QSTAT, "qstat: Unknown Job Id 9.head\n")
    found = PBSManager(1).poll([JobId("7.head"), JobId("9.head")])
    assert list(found) == ["7.head"]


def test_where_there_is_no_history_only_living_jobs_are_asked_for(fake: Fake) -> None:
    refusal = "qstat: PBS is not configured to maintain job history 7.head\n"
    fake.answers["qstat -x"] = (0, "", refusal)
    fake.answers["qstat -f"] = (153, "", "qstat: Unknown Job Id 7.head\n")
    assert PBSManager(1).poll([JobId("7.head")]) == {}
    assert [call[1] for call in fake.calls] == ["-x", "-f"]


def test_no_answer_says_nothing_of_the_jobs(fake: Fake) -> None:
    fake.answers["qstat -x"] = (255, "", "qstat: cannot connect to server head (errno=111)\n")
    with pytest.raises(CommandFailed, match="cannot connect"):
        PBSManager(1).poll([JobId("7.head")])
    assert PBSManager(1).post_mortem([JobId("7.head")]) == {}


def test_many_ids_go_some_at_a_time(fake: Fake) -> None:
    fake.answers["qstat -x"] = (0, json.dumps({"Jobs": {"3.head": {"job_state": "Q"}}}), "")
    jobs = [JobId(f"{number}.head") for number in range(60)]
    assert list(PBSManager(1).poll(jobs)) == ["3.head"]
    assert [len(call) for call in fake.calls] == [55, 15]


def test_cancelling_what_has_ended_is_no_error(fake: Fake) -> None:
    fake.answers["qdel"] = (35, "", "qdel: Job has finished 7.head\nqdel: Unknown Job Id 9.head\n")
    PBSManager(1).cancel([JobId("7.head"), JobId("9.head")])
    fake.answers["qdel"] = (159, "", "qdel: Unauthorized Request 7.head\n")
    with pytest.raises(CommandFailed, match="Unauthorized"):
        PBSManager(1).cancel([JobId("7.head")])


def test_a_job_whose_host_does_not_answer_is_cancelled_by_force(fake: Fake) -> None:
    manager, number = PBSManager(1), JobId("2.head")
    force = ["qdel", "-W", "force", "2.head"]
    manager.cancel_lost(number)
    assert fake.calls == [force]
    lost = (222, "", "qdel: Server could not connect to MOM 2.head\n")
    fake.in_turn = [lost, (0, "", "")]  # the server has noticed meanwhile
    manager.cancel_lost(number)
    assert fake.calls[1:] == [force, force]
    refused = (159, "", "qdel: Unauthorized Request 2.head\n")
    fake.in_turn = [refused, refused, (0, "", "")]
    manager.cancel_lost(number)
    assert fake.calls[3:] == [force, force, ["qdel", "2.head"]]
    fake.in_turn = [refused, refused, lost]
    with pytest.raises(CommandFailed, match="could not connect to MOM"):
        manager.cancel_lost(number)


def test_submissions(fake: Fake) -> None:
    manager = PBSManager(1)
    job = manager.plan(manager.settings_of({})).example()
    fake.answers["qsub"] = (0, "12.head\n", "")
    assert submit(manager, job, "/run/script.sh", None) == "12.head"
    assert fake.calls[-1] == ["qsub", "-f", "/run/script.sh"]
    fake.answers["qsub -f"] = (2, "", "usage: qsub [-a date_time] ...\n")
    assert submit(manager, job, "/run/script.sh", None) == "12.head"
    assert fake.calls[-1] == ["qsub", "/run/script.sh"]
    del fake.answers["qsub -f"]
    fake.answers["qsub"] = (170, "", "qsub: Unknown queue\n")
    with pytest.raises(SubmitError, match="qsub: Unknown queue"):
        submit(manager, job, "/run/script.sh", None)
    fake.answers["qsub"] = (0, "hm\n", "")
    fake.answers["qselect"] = (0, "7.head\n26[].head\n", "")
    fake.answers["qstat -f"] = (0, QSTAT, "")
    assert submit(manager, job, "/x/hpcdist-d34ad69d/script.sh", None) == "7.head"
    with pytest.raises(SubmitError, match="no job of"):
        submit(manager, job, "/x/hpcdist-0/script.sh", None)
    fake.answers["qstat --version"] = (0, "Version: 4.2.10\nCommit: 4\n", "")
    with pytest.raises(SubmitError, match="Torque"):
        submit(manager, job, "/run/script.sh", None)


def test_what_a_job_leaves_in_the_environment_misleads_nobody() -> None:
    inside = {"PBS_NODEFILE": "/aux/7.head", "PBS_ENVIRONMENT": "PBS_BATCH", "PBS_JOBID": "7.head"}
    assert scrubbed(inside) == {"PBS_JOBID": "7.head"}
    assert "PBS_DPREFIX" not in environment({"PBS_DPREFIX": "#NOT"})


def test_the_template_of_the_documentation(tmp_path: Path) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "pbs.md"
    found = re.search(r"^```jinja\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None
    template = tmp_path / "pbs.sh.j2"
    template.write_text(found[1])
    script = PBSManager(2).job_script(template=str(template), setup="true", walltime="1:00")
    lines = script.splitlines()
    assert lines.index("#PBS -l filesystems=home:scratch") > lines.index("#PBS -l walltime=1:00")
    assert lines.index("source /opt/site/init.sh") < lines.index("true")
    assert "exec pbs_tmrsh" in script
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_a_job_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCDIST_DIR", str(tmp_path / "a b"))
    script = PBSManager(6).job_script(split=2)
    assert f"-o '{tmp_path}/a b/jobs/hpcdist-run/pbs.^array_index^.log'" in script
    assert f"folder='{tmp_path}/a b/jobs/hpcdist-run'/tasks/\"$PBS_ARRAY_INDEX\"" in script
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert PBSManager(6).task(JobId("26[].head"), 1) == "26[1].head"
    # Without a second of its size a world is a job of its own.
    assert "-J" not in PBSManager(3).job_script(split=3)
