"""Grid Engine's options and scripts, and what its commands print: recorded from 8.1.9."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcdist._cli.schedulers import chosen
from hpcdist._keeper import installed_mpi
from hpcdist._keeper.installed_mpi import Mpi
from hpcdist._schedulers import commands
from hpcdist._schedulers.commands import Done
from hpcdist._schedulers.job import JobId
from hpcdist._schedulers.sge import SGEManager
from hpcdist._schedulers.sge_words import (
    parse_qacct,
    parse_qstat,
    parse_reasons,
    parse_script,
    parse_submit,
    state_of,
)
from hpcdist._schedulers.verdict import JobState, Verdict

MPICH = Mpi("mpich", (5, 0, 2), "/env/bin/mpiexec")
OPENMPI = Mpi("openmpi", (5, 0, 11), "/env/bin/mpiexec")
QSTAT = """\
<?xml version='1.0'?>
<job_info  xmlns:xsd="http://arc.liv.ac.uk/repos/darcs/sge/source/dist/util/resources/schemas/qstat/qstat.xsd">
  <queue_info>
    <job_list state="running">
      <JB_job_number>9</JB_job_number>
      <JAT_prio>0.25000</JAT_prio>
      <JB_name>a &lt;b&gt;</JB_name>
      <JB_owner>hpcuser</JB_owner>
      <state>r</state>
      <JAT_start_time>2026-11-21T13:18:27</JAT_start_time>
      <queue_name>all.q@n2</queue_name>
      <slots>1</slots>
    </job_list>
  </queue_info>
  <job_info>
    <job_list state="pending">
      <JB_job_number>4</JB_job_number>
      <JAT_prio>0.75000</JAT_prio>
      <JB_name>sleep</JB_name>
      <JB_owner>hpcuser</JB_owner>
      <state>qw</state>
      <JB_submission_time>2026-11-21T13:18:25</JB_submission_time>
      <queue_name></queue_name>
      <slots>200</slots>
    </job_list>
    <job_list state="pending">
      <JB_job_number>2</JB_job_number>
      <JB_name>sleep</JB_name>
      <state>Eqw</state>
      <queue_name></queue_name>
      <slots>2</slots>
    </job_list>
  </job_info>
</job_info>
"""
DETAILS = """\
<detailed_job_info>
  <djob_info>
    <element>
      <JB_job_number>2</JB_job_number>
      <JB_job_name>sleep</JB_job_name>
      <JB_script_file>/home/me/.hpcdist/jobs/a/script.sh</JB_script_file>
      <JB_ja_tasks>
        <ulong_sublist>
          <JAT_message_list>
            <ulong_sublist>
              <QIM_type>1</QIM_type>
              <QIM_message>11/21/2026 13:18:25 [20001:257]: error: can&apos;t open output file \
&quot;/nonexistent/x&quot;: No such file or directory</QIM_message>
            </ulong_sublist>
          </JAT_message_list>
        </ulong_sublist>
      </JB_ja_tasks>
      <JB_ja_structure>
      </JB_ja_structure>
    </element>
    <element>
      <JB_job_number>4</JB_job_number>
      <JB_script_file>/home/me/.hpcdist/jobs/b/script.sh</JB_script_file>
      <JB_ja_structure>
      </JB_ja_structure>
    </element>
  </djob_info>
  <messages>
    <element>
      <SME_message_list>
        <element>
          <MES_job_number_list>
            <ulong_sublist>
              <ULNG_value>2</ULNG_value>
            </ulong_sublist>
          </MES_job_number_list>
          <MES_message_number>32</MES_message_number>
          <MES_message>Job is in error state</MES_message>
        </element>
        <element>
          <MES_job_number_list>
            <ulong_sublist>
              <ULNG_value>4</ULNG_value>
            </ulong_sublist>
          </MES_job_number_list>
          <MES_message>cannot run in PE &quot;mpi&quot; because it only offers 16 slots\
</MES_message>
        </element>
      </SME_message_list>
    </element>
  </messages>
</detailed_job_info>
"""
TASK = """\
==============================================================
qname        all.q
hostname     n2
jobnumber    7
taskid       undefined
start_time   Sat Nov 21 13:18:27 2026
end_time     Sat Nov 21 13:18:29 2026
granted_pe   spread
slots        4
failed       100 : assumedly after job
exit_status  137                  (Killed)
ru_wallclock 2s
category     -pe spread 4
"""
QACCT = (
    TASK
    + """\
==============================================================
qname        all.q
hostname     n1
jobnumber    7
taskid       undefined
qsub_time    Sat Nov 21 13:18:26 2026
start_time   Sat Nov 21 13:18:27 2026
end_time     Sat Nov 21 13:18:30 2026
failed       0
exit_status  3
ru_wallclock 3s
category     -pe spread 4
"""
)


def ended(failed: str, status: str, *more: str) -> Verdict:
    """Return what is read of one record of qacct."""
    lines = ["=" * 62, "jobnumber    1", f"failed       {failed}", f"exit_status  {status}", *more]
    return parse_qacct("\n".join(lines))["1"]


def test_qstat() -> None:
    found = parse_qstat(QSTAT)
    assert {ident: (v.state.name, v.word) for ident, v in found.items()} == {
        "9": ("RUNNING", "RUNNING"),
        "4": ("QUEUED", "PENDING"),
        "2": ("HELD", "Eqw"),
    }
    assert found["9"].nodes == "all.q@n2"
    assert found["9"].start is not None
    assert SGEManager(1).hopeless(found["2"])
    assert not SGEManager(1).hopeless(found["4"])


def test_tasks_of_a_job_array() -> None:
    task = QSTAT.replace("<slots>1</slots>", "<slots>1</slots>\n      <tasks>2</tasks>")
    assert parse_qstat(task)["9.2"].state is JobState.RUNNING
    assert "9" not in parse_qstat(task)
    whole = QACCT.replace("taskid       undefined", "taskid       3")
    assert {ident: v.describe() for ident, v in parse_qacct(whole).items()} == {
        "7.3": "FAILED, exit code 3"
    }
    assert SGEManager(2).task(JobId("9"), 0) == "9.1"
    for out in ("9.1-3:1\n", 'Your job-array 9.1-3:1 ("a") has been submitted\n'):
        assert parse_submit(out) == "9"


def test_all_tasks_of_an_array_are_asked_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    manager, asked = SGEManager(4), list[list[str]]()
    queued = QSTAT.replace("<slots>200</slots>", "<tasks>{}</tasks>")
    both = "".join(queued.replace("{}", number) for number in ("1", "2"))
    answers = {"-u": both, "-j": DETAILS}

    def run(argv: list[str], **more: object) -> Done:
        asked.append(argv)
        return done(argv, answers["-u" if "-u" in argv else "-j"])

    monkeypatch.setattr(commands, "run", run)
    tasks = [manager.task(JobId("4"), k) for k in range(2)]
    found = manager.poll(tasks)
    assert [found[task].reason for task in tasks] == [
        'cannot run in PE "mpi" because it only offers 16 slots'
    ] * 2
    assert [argv[-1] for argv in asked if "-j" in argv] == ["4"]


def test_why_jobs_wait() -> None:
    assert parse_reasons(DETAILS) == {
        "2": 'can\'t open output file "/nonexistent/x": No such file or directory',
        "4": 'cannot run in PE "mpi" because it only offers 16 slots',
    }


def test_the_job_of_a_script() -> None:
    assert parse_script(DETAILS, "/home/me/.hpcdist/jobs/b/script.sh") == "4"
    assert parse_script(DETAILS, "/home/me/other.sh") is None


@pytest.mark.parametrize(
    ("word", "state"),
    [
        ("t", JobState.RUNNING),
        ("hr", JobState.RUNNING),
        ("hRwq", JobState.HELD),
        ("Rq", JobState.QUEUED),
        ("Rr", JobState.RUNNING),
        ("ts", JobState.PAUSED),
        ("T", JobState.PAUSED),
        ("dt", JobState.RUNNING),
        ("dEqw", JobState.HELD),
        ("Ehqw", JobState.HELD),
        ("", JobState.UNKNOWN),
    ],
)
def test_states(word: str, state: JobState) -> None:
    assert state_of(word) is state


def test_the_record_of_a_job_is_the_last_of_its_tasks() -> None:
    found = parse_qacct(QACCT.replace("\n", "     \n"))["7"]  # it pads its lines
    assert found.describe() == "FAILED, exit code 3"
    assert (found.nodes, found.exit_code) == ("n1", 3)
    assert found.end is not None


def test_the_good_end_of_a_task_says_nothing_of_its_job() -> None:
    good = ("0", "0", "granted_pe   spread")
    assert ended(*good).state is JobState.UNKNOWN
    assert ended(*good, "pe_taskid    NONE").state is JobState.DONE
    assert parse_qacct(TASK + "pe_taskid    1.n2\n") == {}


def test_how_jobs_end() -> None:
    assert ended("0    ", "0").describe() == "COMPLETED"
    assert ended("26  : opening input/output file", "0").describe() == (
        "FAILED (opening input/output file)"
    )
    killed = ended("100 : assumedly after job", "137                  (Killed)")
    assert killed.describe() == "FAILED (assumedly after job), killed by SIGKILL"
    assert ended("100 : assumedly after job", "137", "deleted_by   me@n1").describe() == (
        "CANCELLED by me@n1"
    )
    over = ("37  : qmaster enforced h_rt, h_cpu, or h_vmem limit", "137")
    ran = "ru_wallclock 3600s"
    assert ended(*over, ran, "category     -l h_rt=1:0:0").state is JobState.TIMEOUT
    assert ended(*over, ran, "category     -l h_rt=4000").state is JobState.FAILED
    task = ("100 : assumedly after job", "137", "ru_wallclock 3598s")
    assert ended(*task, "category     -l h_rt=3600").state is JobState.TIMEOUT
    assert "h_vmem" in ended(*over, ran, "category     -l h_vmem=1G").describe()


def test_of_a_deleted_job_qacct_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    manager, job = SGEManager(1), JobId("7")
    answers = {"qstat": QSTAT.replace(">9<", ">7<").replace(">r<", ">dr<"), "qacct": TASK}
    monkeypatch.setattr(commands, "run", lambda argv, **more: done(argv, answers[argv[0]]))
    assert manager.poll([job])[job].word == "dr"
    answers["qstat"] = "<job_info></job_info>"
    assert manager.post_mortem([job])[job].describe() == "CANCELLED"
    assert SGEManager(1).post_mortem([job])[job].state is JobState.FAILED


def done(argv: list[str], out: str) -> Done:
    return Done(tuple(argv), 0, out, "", 0.0)


@given(st.text())
def test_no_text_upsets_a_parser(text: str) -> None:
    for parse in (parse_qstat, parse_reasons, parse_qacct):
        assert isinstance(parse(text), dict)
    parse_script(text, "/x")
    state_of(text)


def test_a_submission_without_an_answer() -> None:
    with pytest.raises(ValueError, match="no job id"):
        parse_submit("Your job has been eaten\n", "why?")


# Options and scripts


@pytest.fixture(params=[MPICH, OPENMPI], ids=["mpich", "openmpi"])
def script(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., str]:
    """`script(n, **options)`: what would be submitted from `/`, for one MPI or the other."""
    monkeypatch.setattr(installed_mpi, "find_mpi", lambda python: request.param)
    monkeypatch.setenv("HPCDIST_DIR", "/runs")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return lambda n, **options: SGEManager(n).job_script(**{"dir": "/", **options})


GOLDEN = """\
#!/bin/bash
#$ -N hpcdist-run
#$ -S /bin/bash
#$ -wd /
#$ -o /runs/jobs/hpcdist-run/log
#$ -j y
#$ -r n
#$ -q long.q
#$ -l h_rt=01:00:00
#$ -l exclusive
#$ -R y
#$ -l gpu=1,mem_free=2G
#$ -m "b e"
#$ -pe orte 16
#$ -hard

# hpcdist-run: made by hpcdist from the template sge.sh.j2
folder=/runs/jobs/hpcdist-run
"""


def test_a_script(script: Callable[..., str]) -> None:
    text = script(
        16,
        pe="orte",
        q="long.q",
        h_rt="01:00:00",
        exclusive=True,
        R=True,
        l="gpu=1,mem_free=2G",
        m="b e",
        options=["-hard"],
        s_rt=None,
    )
    assert text.startswith(GOLDEN), text
    assert "qrsh -inherit" in text
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, timeout=20)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_one_worker_needs_no_parallel_environment(script: Callable[..., str]) -> None:
    assert "-pe" not in script(1)
    assert "\n#$ -pe smp 1\n" in script(1, pe="smp")
    assert "\n#$ -pe mpi 2\n" in script(2)


def test_how_many_workers_a_job_has(script: Callable[..., str]) -> None:
    assert "\n#$ -pe mpi 4\n" in script(8, split=4)
    assert "\n#$ -t 1-2\n" in script(8, split=4)
    assert '/tasks/"$((SGE_TASK_ID - 1))"' in script(8, split=4)
    text = script(8, split="node", ntasks_per_node=2, pe="smp")
    assert "\n#$ -pe smp 2\n" in text
    assert "ntasks" not in text


def test_modules_are_found_without_a_login_shell(script: Callable[..., str]) -> None:
    lines = script(1, modules=["gcc"]).splitlines()
    assert lines.index("type module >/dev/null 2>&1 || . /etc/profile") < lines.index(
        "module load gcc"
    )


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (("pe='mpi 3'", "SGEManager(4)"), {"pe": "mpi 3"}),
        (("ntasks=3", "SGEManager(4)"), {"ntasks": 3}),
        (("t='1-4'", "split="), {"t": "1-4"}),
        (("cwd=True", "dir="), {"cwd": True}),
        (("wd='/tmp'", "dir="), {"wd": "/tmp"}),
        (("ntasks_per_node", "allocation rule"), {"ntasks_per_node": 2}),
        (("job_dir='/a:b'", "Grid Engine"), {"job_dir": "/a:b"}),
        (("neither # nor quotes",), {"ac": "it's"}),
        (("ntasks_per_node",), {"split": "node"}),
    ],
)
def test_what_contradicts_is_refused(words: tuple[str, ...], options: dict[str, Any]) -> None:
    manager = SGEManager(4)
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        manager.plan(manager.settings_of({"dir": "/", **options})).asked
    assert all(word in str(caught.value) for word in words), caught.value


def test_workers_that_are_no_world() -> None:
    manager = SGEManager(2)
    asked = manager.plan(manager.settings_of({})).asked
    for mpi in (MPICH, OPENMPI):
        made = manager.launcher(2, asked, "process", mpi)
        assert (made.mpi, made.apart) == (False, True)
        assert manager.launcher(2, asked, "auto", mpi).mpi


def test_where_the_output_goes() -> None:
    manager = SGEManager(1)
    asked = manager.plan(manager.settings_of({"o": "out.$JOB_ID", "e": "err.$HOSTNAME"})).asked
    assert manager.log_files(asked, "/work", "/runs/a", JobId("7")) == ["/work/out.7"]
    plain = manager.plan(manager.settings_of({})).asked
    assert manager.log_files(plain, "/work", "/runs/a", JobId("7")) == ["/runs/a/log"]


def test_grid_engine_is_told_from_others_that_have_a_qsub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for program, name in (("qsub", "pbs"), ("qconf", "sge")):
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
        assert chosen(None).scheduler.name == name
