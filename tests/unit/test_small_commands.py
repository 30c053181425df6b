"""`hpcdist config`, `completion`, and `--json` of `jobs`."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcdist import _config
from hpcdist._cli.main import main


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HPCDIST_DIR", str(tmp_path / "home"))
    _config.forget()
    yield tmp_path
    _config.forget()


def test_each_setting_and_who_has_said_so(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "hpcdist.toml").write_text('timeout = 5\nlog = "info"\n[slurm]\naccount = "p1"\n')
    monkeypatch.setenv("HPCDIST_LOG", "debug")
    _config.forget()
    assert main(["config", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    found = {each["name"]: (each["value"], each["from"]) for each in said}
    assert found["timeout"] == (5.0, "./hpcdist.toml")
    assert found["log"] == ("debug", "HPCDIST_LOG")
    assert found["heartbeat"] == (2.0, "default")
    assert found["slurm.account"] == ("p1", "./hpcdist.toml")
    assert main(["config"]) == 0
    assert "slurm.account" in capsys.readouterr().out


def test_a_wrong_setting_is_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "hpcdist.toml").write_text('timeout = "soon"\n')
    _config.forget()
    with pytest.raises(SystemExit) as ended:
        main(["config"])
    assert ended.value.code == 1
    assert "'timeout' must be a number" in capsys.readouterr().err


def test_jobs_for_programs(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["jobs", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    folder = home / "home" / "jobs" / "run"
    folder.mkdir(parents=True)
    facts = {"folder": str(folder), "kind": "program", "jobs": [["7", None]], "n": 2, "when": 1.0}
    (folder / "manifest.json").write_text(json.dumps({**facts, "scheduler": "gone", "name": "run"}))
    assert main(["jobs", "--json", "--all"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["job"], row["state"], row["left"], row["name"]) == ("7", "unknown", None, "run")
    assert row["since"].startswith("19")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    for word in ("submit", "top", "doctor", "json"):
        assert word in text
    if shutil.which(shell) is not None:
        subprocess.run([shell, "-n"], input=text, text=True, check=True, timeout=50)


def completed(script: str, *words: str) -> list[str]:
    """What bash offers for the last of these words."""
    line = " ".join(f"'{word}'" for word in words)
    text = f"{script}COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _hpcdist\n"
    text += "printf '%s\\n' \"${COMPREPLY[@]}\"\n"
    done = subprocess.run(
        ["bash", "-c", text], capture_output=True, text=True, check=True, timeout=50
    )
    return done.stdout.split("\n")[:-1]


def test_bash_completes(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["completion", "bash"])
    script = capsys.readouterr().out
    assert completed(script, "hpcdist", "to") == ["top"]
    assert completed(script, "hpcdist", "top", "--o") == ["--once"]
    (home / "my driver.py").touch()
    assert completed(script, "hpcdist", "run", "my") == ["my driver.py"]
