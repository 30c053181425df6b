"""Job scripts: what they say, how they are quoted, and what bash makes of them."""

import dataclasses
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpcdist._schedulers.job import FOLDER, JobSpec
from hpcdist._schedulers.render import TemplateError, command, render

GOLDEN = """\
#!/bin/bash
#SBATCH --job-name=run
#SBATCH -t 5

# run: made by hpcdist from the template slurm.sh.j2
folder=/runs/one

"""


def spec(folder: Path | str = "/runs/one", **changes: Any) -> JobSpec:
    made = JobSpec(
        name="run",
        prefix="#SBATCH",
        directives=("--job-name=run", "-t 5"),
        folder=str(folder),
        cwd="/",
        command=("true",),
        template="slurm.sh.j2",
    )
    return dataclasses.replace(made, **changes)


def run(script: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        return subprocess.run(
            ["bash", file.name], capture_output=True, text=True, timeout=20, **options
        )


def exit_file(folder: Path) -> list[str]:
    return (folder / "exit").read_text().split()


def test_the_head_of_a_script() -> None:
    assert render(spec()).startswith(GOLDEN)


def test_the_command_runs_in_the_background() -> None:
    script = render(spec(command=("srun", "a b", f"{FOLDER}/join")))
    assert """\nsrun 'a b' "$folder"/join &\npid=$!\n""" in script


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20))
def test_any_text_survives_the_shell(text: str) -> None:
    script = command(["printf", "%s.", text])
    answer = subprocess.run(["bash", "-c", script], capture_output=True, timeout=20)
    assert answer.stdout == f"{text}.".encode()


NASTY = 'it\'s a $HOME "path" `id` \\ ;&|#'


def test_a_script_of_nasty_names_is_a_script(tmp_path: Path) -> None:
    folder = tmp_path / NASTY
    folder.mkdir()
    argv = ("printf", "%s\n", NASTY, f"{FOLDER}/a b")
    script = render(
        spec(folder, cwd=str(folder), command=argv, name="a/b\nc", env=(("NASTY", NASTY),))
    )
    assert subprocess.run(["bash", "-n"], input=script, text=True, timeout=20).returncode == 0
    done = run(script)
    assert done.stderr == ""
    assert done.stdout == f"{NASTY}\n{folder}/a b\n"
    assert exit_file(folder)[0] == "0"


def test_environment_and_path_reach_the_command(tmp_path: Path) -> None:
    argv = ("sh", "-c", 'echo "$A|$PYTHONPATH"')
    script = render(spec(tmp_path, command=argv, env=(("A", NASTY),), path=("/x y",)))
    environ = dict(os.environ, PYTHONPATH="/before")
    assert run(script, env=environ).stdout == f"{NASTY}|/x y:/before\n"


@pytest.mark.parametrize("code", [0, 7])
def test_the_exit_code_is_the_commands_own(tmp_path: Path, code: int) -> None:
    done = run(render(spec(tmp_path, command=("sh", "-c", f"exit {code}"))))
    assert done.returncode == code
    found, when, *host = exit_file(tmp_path)
    assert found == str(code)
    assert abs(int(when) - time.time()) < 60
    assert len(host) == 1  # and no word of a signal


@pytest.mark.parametrize(
    "setup",
    [
        ("echo before", "false", "echo after"),
        ("echo before\nfalse\necho after\n",),
        ("echo before", "for i in 1 2; do\n  ls /no/such || true\n  false\ndone", "echo after"),
    ],
)
def test_a_setup_line_that_fails_ends_the_job(tmp_path: Path, setup: tuple[str, ...]) -> None:
    done = run(render(spec(tmp_path, setup=setup, command=("echo", "launched"))))
    assert done.returncode == 1
    assert done.stdout == "before\n"
    assert "setup failed" in done.stderr
    assert done.stderr.rstrip().endswith("at: false")
    assert exit_file(tmp_path)[0] == "1"


def test_what_a_sourced_file_tries_is_its_own_business(tmp_path: Path) -> None:
    (tmp_path / "init.sh").write_text('false\nmodule() { false; test -n "$nothing"; return $1; }\n')
    lines = (f"source {tmp_path}/init.sh", "module 0", "set -u", "false || echo caught")
    done = run(render(spec(tmp_path, setup=lines, command=("echo", "launched"))))
    assert (done.returncode, done.stdout) == (0, "caught\nlaunched\n")


def test_a_module_that_fails_to_load_is_named(tmp_path: Path) -> None:
    done = run(
        render(
            spec(
                tmp_path,
                command=("echo", "launched"),
                modules=("gcc/12",),
            )
        )
    )
    assert done.returncode == 127
    assert "at: module load gcc/12" in done.stderr


def test_a_directory_that_is_missing_is_named(tmp_path: Path) -> None:
    done = run(render(spec(tmp_path, cwd="/no/such dir")))
    assert done.returncode == 1
    assert "/no/such dir" in done.stderr


def test_a_signal_reaches_the_command(tmp_path: Path) -> None:
    argv = ("sh", "-c", "trap 'kill $!; echo told; exit 5' TERM; sleep 30 & touch ready; wait")
    script = tmp_path / "script.sh"
    script.write_text(render(spec(tmp_path, cwd=str(tmp_path), command=argv)))
    with subprocess.Popen(["bash", script], stdout=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        assert process.stdout.readline() == "told\n"
        assert process.wait(10) == 5
    assert (exit_file(tmp_path)[0], exit_file(tmp_path)[3]) == ("5", "TERM")


def test_a_task_of_an_array_finds_its_folder(tmp_path: Path) -> None:
    (tmp_path / "tasks" / "3").mkdir(parents=True)
    script = render(spec(tmp_path, task="TASK", command=("echo", f"{FOLDER}/join")))
    done = run(script, env=dict(os.environ, TASK="3"))
    assert done.stdout == f"{tmp_path}/tasks/3/join\n"
    assert exit_file(tmp_path / "tasks" / "3")[0] == "0"


# Templates of one's own


def test_a_project_may_override_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hpcdist-templates").mkdir()
    (tmp_path / "hpcdist-templates" / "slurm.sh.j2").write_text(
        '{% extends "builtin/slurm.sh.j2" %}\n{% block setup %}\necho site\n{{ super() }}'
        "{% endblock %}\n"
    )
    done = run(render(spec(tmp_path, setup=("echo mine",), command=("echo", "launched"))))
    assert done.stdout == "site\nmine\nlaunched\n"


def test_a_template_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "other.j2"
    path.write_text(
        '{% extends "slurm.sh.j2" %}\n{% block launch %}\necho mine\ncode=4\n{% endblock %}'
    )
    assert run(render(spec(tmp_path, template=str(path)))).returncode == 4


def test_a_missing_template_is_named_with_the_places() -> None:
    with pytest.raises(TemplateError, match=r"no template 'nosuch\.j2'.*/etc/hpcdist/templates"):
        render(spec(template="nosuch.j2"))
    with pytest.raises(TemplateError, match=r"/no/such"):
        render(spec(template="/no/such/nosuch.j2"))


def test_an_undefined_variable_is_named_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.j2"
    path.write_text(
        '{% extends "slurm.sh.j2" %}\n{% block setup %}\n{{ wallclock }}\n{% endblock %}'
    )
    with pytest.raises(TemplateError, match=r"mine\.j2, line 3: 'wallclock' is undefined"):
        render(spec(template=str(path)))


def test_a_syntax_error_is_placed(tmp_path: Path) -> None:
    path = tmp_path / "mine.j2"
    path.write_text("\n{% if %}")
    with pytest.raises(TemplateError, match=r"mine\.j2, line 2"):
        render(spec(template=str(path)))
