"""What a launcher in a job prints: whose words are whose, and which ranks have ended how."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from hpcdist._keeper import launcher_output
from hpcdist._schedulers import launchers
from hpcdist._schedulers.slurm_words import ENDS, LABEL


@pytest.mark.parametrize(
    ("how", "text", "expected"),
    [
        ("srun", "", []),
        ("srun", "0: a\n1: b\n1: c\n", [(0, "a\n"), (1, "b\nc\n")]),
        # srun pads the numbers to the width of the last.
        ("srun", " 3: a\n12: b\n", [(3, "a\n"), (12, "b\n")]),
        ("srun", "2: \n", [(2, "\n")]),
        ("srun", "2: 3: nested\n", [(2, "3: nested\n")]),
        ("srun", "7: end without a newline", [(7, "end without a newline")]),
        (
            "srun",
            "srun: error: n1: task 3: Killed\n",
            [(None, "srun: error: n1: task 3: Killed\n")],
        ),
        ("srun", "slurmstepd: error: x\n0: a\n", [(None, "slurmstepd: error: x\n"), (0, "a\n")]),
        ("mpirun", "[1,3]<stdout>: a\n[1,0]<stderr>: b\n", [(3, "a\n"), (0, "b\n")]),
        ("mpirun", "prterun noticed\n", [(None, "prterun noticed\n")]),
        ("mpirun", "0: not a label\n", [(None, "0: not a label\n")]),
        ("hydra", "[3] a\n[0] b\n", [(3, "a\n"), (0, "b\n")]),
        ("", "0: a\n", [(None, "0: a\n")]),
    ],
)
def test_lines_are_split_by_rank(
    how: str, text: str, expected: list[tuple[int | None, str]]
) -> None:
    labels = {"srun": LABEL, "mpirun": launchers.PRTE_LABEL, "hydra": launchers.HYDRA_LABEL}
    assert launcher_output.split_labels(labels.get(how, ""), text) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        # Seen with 22.05.
        ("srun: error: n1: task 1: Killed", [(1, -9)]),
        ("srun: error: n2: task 5: Segmentation fault (core dumped)", [(5, -11)]),
        ("srun: error: n2: task 5: Segmentation fault", [(5, -11)]),
        ("srun: error: n2: task 6: Exited with exit code 7", [(6, 7)]),
        ("srun: error: n1: task 3: Terminated", [(3, -15)]),
        ("srun: error: n2: tasks 5-7: Killed", [(5, -9), (6, -9), (7, -9)]),
        ("srun: error: n2: tasks 0,2-3: Exited with exit code 1", [(0, 1), (2, 1), (3, 1)]),
        ("srun: error: n2: task 0: Aborted (core dumped)", [(0, -6)]),
        ("srun: error: n2: task 0: Out Of Memory", [(0, -9)]),
        # What is no rank's end.
        ("srun: Force Terminated StepId=1.0", []),
        ("srun: Job step aborted: Waiting up to 5 seconds for job step to finish.", []),
        ("srun: error: Unable to create step for job 3: Job/step already completing", []),
        ("slurmstepd: error: *** STEP 1.0 ON n1 CANCELLED AT 2026-01-01T00:00:00 ***", []),
        ("the program says: srun: error: n1: task 1: Killed", []),
    ],
)
def test_ends_of_ranks_as_srun_tells_them(line: str, expected: list[tuple[int, int]]) -> None:
    assert launcher_output.parse_ends(line + "\n", ENDS) == (line + "\n", expected)


def test_what_a_rank_s_shell_tells_is_its_end(tmp_path: os.PathLike[str]) -> None:
    """Open MPI's launcher may be the first to tell: of the shell, which ends in good order."""
    launcher = "[h:01] [prterun-h-1@0,0] odls:waitpid_fired child [prterun-h-1@1,2] exit code "
    assert launcher_output.parse_ends(launcher + "0\n", mpi=False) == ("", [])
    assert launcher_output.parse_ends(launcher + "0\n") == ("", [(2, 0)])
    assert launcher_output.parse_ends(launcher + "3\n", mpi=False) == ("", [(2, 3)])
    shell = launchers.separate(launchers.WorldLauncher((), "mpirun")).argv
    for command, status in (("exit 0", 0), ("exit 7", 7), ("kill -9 $$", -9)):
        done = subprocess.run(
            [*shell, "sh", "-c", command],
            env=os.environ | {"PMI_RANK": "2"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0
        assert launcher_output.parse_told(done.stderr)[1] == [(2, status)]


def test_a_command_gets_its_values(tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "said")
    argv = ["sh", "-c", "echo $0 $1 >{path}", "-{signal}", "{pid} $HOME"]
    pid = launcher_output.spawn(argv, path=path, signal=9, pid=4711, host="unused")
    assert pid is not None
    assert os.waitpid(pid, 0)[1] == 0
    with open(path) as file:
        assert file.read() == "-9 4711 $HOME\n"


def test_a_command_is_not_waited_for_and_leads_its_own_group() -> None:
    begin = time.monotonic()
    pid = launcher_output.spawn(["sleep", "{seconds}"], seconds=60)
    assert pid is not None
    assert time.monotonic() - begin < 5
    assert os.getpgid(pid) == pid
    os.kill(pid, 9)
    os.waitpid(pid, 0)


def test_a_command_that_is_missing_is_no_error() -> None:
    assert launcher_output.spawn(["no-such-scheduler"], step="1.0") is None


@pytest.mark.parametrize("words", [{"label": "^[0-9]+: "}, {"ends": "^rank ([0-9]+) is gone"}])
def test_an_expression_without_its_groups_is_refused(words: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"group\(s\)"):
        launchers.WorldLauncher(("flux", "run"), **words)
