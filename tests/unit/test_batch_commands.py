"""Running commands: the environment, deadlines, the record; with programs on PATH."""

import json
import os
import shlex
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from hpcdist._schedulers import commands
from hpcdist._schedulers.commands import CommandLate, CommandMissing, ConnectionLost, run
from tests.helpers import eventually

Program = Callable[[str, str], Path]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Put a shell script on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def make(name: str, text: str) -> Path:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return make


def test_output_errors_and_status_stay_apart(program: Program) -> None:
    program("fake", 'echo "out $1"; echo err >&2; exit 3')
    done = run(["fake", "a b"])
    assert (done.status, done.out, done.err, done.said) == (3, "out a b\n", "err\n", "err")


def test_input(program: Program) -> None:
    program("fake", "cat")
    assert run(["fake"], input="text").out == "text"
    assert run(["fake"]).out == ""  # and not what the terminal says


def test_the_environment_is_scrubbed(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    program("fake", "env")
    for name in ("SLURM_JOB_ID", "SBATCH_PARTITION", "SQUEUE_FORMAT", "PMI_RANK", "OMPI_X"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("SLURM_CLUSTERS", "big")
    found = dict(line.split("=", 1) for line in run(["fake"]).out.splitlines() if "=" in line)
    assert {name: value for name, value in found.items() if name.startswith("SLURM_")} == {
        "SLURM_CONF": "/etc/slurm.conf",
        "SLURM_CLUSTERS": "big",
        "SLURM_TIME_FORMAT": "standard",
    }
    assert found["LC_ALL"] == "C"
    assert not {"PMI_RANK", "OMPI_X", "SBATCH_PARTITION", "SQUEUE_FORMAT"} & set(found)


def test_a_missing_program_is_named() -> None:
    with pytest.raises(CommandMissing, match="'no-such-program'") as caught:
        run(["no-such-program"])
    assert caught.value.program == "no-such-program"


@pytest.mark.parametrize("until", [None, lambda out: False])
def test_the_deadline_kills_it_with_its_children(
    program: Program, tmp_path: Path, until: Callable[[str], bool] | None
) -> None:
    program("fake", f"sleep 60 & echo $! >{tmp_path}/child; wait")
    started = time.monotonic()
    with pytest.raises(CommandLate, match=r"fake did not answer within 0\.3 s"):
        run(["fake"], deadline=0.3, until=until)
    assert time.monotonic() - started < 5
    child = int((tmp_path / "child").read_text())
    eventually(lambda: not _runs(child))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_command_that_lingers_is_let_go_once_it_has_answered(program: Program) -> None:
    program("fake", "echo 12; echo warning >&2; sleep 60")
    started = time.monotonic()
    done = run(["fake"], until=lambda out: out.endswith("12\n"))
    assert (done.status, done.out) == (0, "12\n")
    assert time.monotonic() - started < 5


def test_a_command_that_would_linger_but_fails(program: Program) -> None:
    program("fake", "echo no >&2; exit 4")
    done = run(["fake"], until=lambda out: "12" in out)
    assert (done.status, done.err) == (4, "no\n")


def test_all_is_recorded(program: Program, tmp_path: Path) -> None:
    program("fake", 'echo "$1"; [ "$1" != slow ] || sleep 60')
    log = str(tmp_path / "commands.jsonl")
    run(["fake", "one"], log=log)
    with pytest.raises(CommandLate):
        run(["fake", "slow"], deadline=0.2, log=log)
    lines = [json.loads(line) for line in Path(log).read_text().splitlines()]
    assert [(line["argv"], line["status"]) for line in lines] == [
        (["fake", "one"], 0),
        (["fake", "slow"], -9),
    ]
    assert lines[0]["out"] == "one\n"
    assert abs(lines[0]["when"] - time.time()) < 60


def test_output_that_is_no_utf8(program: Program) -> None:
    program("fake", r"printf '\377\n'")
    assert run(["fake"]).out == "\ufffd\n"


def test_a_record_whose_folder_is_gone_harms_nobody(program: Program) -> None:
    program("fake", "true")
    assert run(["fake"], log="/no/such/folder/log").status == 0


def test_the_environment_of_another_process() -> None:
    assert commands.environment({"SLURM_JOB_ID": "1"}) == {
        "LC_ALL": "C",
        "SLURM_TIME_FORMAT": "standard",
    }


class Elsewhere:
    """Another host, whose shell is one of this host; `broken`: the way there ends too early."""

    name, user = "login.site", "ada"

    def __init__(self, *, broken: bool = False) -> None:
        self.broken = broken

    def reaching(self, argv: Sequence[str]) -> list[str]:
        lost = "echo Connection closed >&2; exit 255"
        return ["sh", "-c", lost if self.broken else shlex.join(argv)]


def test_commands_of_another_host_tell_how_they_end() -> None:
    with commands.on(Elsewhere()):
        done = run(["sh", "-c", "echo out; echo err >&2; exit 255"])
        assert (done.status, done.out, done.err) == (255, "out\n", "err\n")
        assert run(["cat"], input="a b; c").out == "a b; c"
        assert run(["sh", "-c", "echo $LC_ALL"]).out == "C\n"
        assert commands.user() == "ada"
        with pytest.raises(CommandMissing, match=r"no-such-program.*is login\.site a login node"):
            run(["no-such-program"])
    assert commands.place() is None


def test_a_connection_that_ends_is_no_answer() -> None:
    with commands.on(Elsewhere(broken=True)):
        with pytest.raises(
            ConnectionLost, match=r"sbatch: .* login\.site ended: Connection closed"
        ):
            run(["sbatch", "script.sh"])
        assert commands.ask("squeue").status == 1


def test_a_file_is_read_where_commands_run(tmp_path: Path) -> None:
    path = tmp_path / "script.sh"
    path.write_text("#!/bin/sh\n")
    assert commands.text_of(str(path)) == "#!/bin/sh\n"
    with commands.on(Elsewhere()):
        assert commands.text_of(str(path)) == "#!/bin/sh\n"
        with pytest.raises(commands.CommandFailed, match="nowhere"):
            commands.text_of(str(tmp_path / "nowhere"))
