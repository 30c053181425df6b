"""Settings and their layers, and the lines of the log."""

import doctest
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hpcdist import _config, _log
from hpcdist._config import nearest, one_typo_from, setting, table, unknown_option


@pytest.fixture(autouse=True)
def layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Path]]:
    """Give the test three config files of its own, none of which exists yet."""
    paths = {name: tmp_path / f"{name}.toml" for name in ("project", "user", "site")}
    monkeypatch.setattr(_config, "_FILES", tuple(map(str, paths.values())))
    for name in [name for name in os.environ if name.startswith("HPCDIST_")]:
        if name != "HPCDIST_TEST_RUN":  # the suite's own
            monkeypatch.delenv(name)
    _config.forget()
    yield paths
    _config.forget()


def test_doctests() -> None:
    assert doctest.testmod(_config).failed == 0


def test_defaults() -> None:
    assert setting("timeout") == 60.0
    assert setting("heartbeat") == 2.0
    assert setting("heartbeat_limit") == 10.0
    assert setting("dir") == os.path.expanduser("~/.hpcdist")
    assert setting("log") == "warning"
    assert setting("outstanding") == 256 << 20


def test_nearer_layers_win(layers: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def now(value: float) -> None:
        _config.forget()
        assert setting("timeout") == value

    layers["site"].write_text("timeout = 1")
    now(1)
    layers["user"].write_text("timeout = 2")
    now(2)
    layers["project"].write_text("timeout = 3")
    now(3)
    monkeypatch.setenv("HPCDIST_TIMEOUT", "4.5")
    now(4.5)
    assert setting("timeout", given=5) == 5.0


def test_files_are_read_once(layers: dict[str, Path]) -> None:
    assert setting("timeout") == 60
    layers["project"].write_text("timeout = 3")
    assert setting("timeout") == 60


def test_dir_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCDIST_DIR", "~/elsewhere")
    assert setting("dir") == os.path.expanduser("~/elsewhere")


def test_tables_are_raw_and_merged_by_key(layers: dict[str, Path]) -> None:
    layers["site"].write_text(
        "[slurm]\naccount = 'a'\npartition = 'all'\n[profile.bigmem]\nmem = '1T'\n"
    )
    layers["project"].write_text("[slurm]\npartition = 'debug'\n")
    assert table("slurm") == {"account": "a", "partition": "debug"}
    assert table("profile.bigmem") == {"mem": "1T"}
    assert table("profile") == {"bigmem": {"mem": "1T"}}
    assert table("pbs") == table("profile.none") == {}


def test_a_scheduler_of_another_package_has_a_table(
    layers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = tmp_path / "installed" / "bigsite_hpc-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: bigsite-hpc\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[hpcdist.managers]\nbigsite = no_such_module:M\n")
    monkeypatch.syspath_prepend(str(about.parent))
    layers["user"].write_text("[bigsite]\naccount = 'a'\n")
    assert setting("timeout") == 60
    assert table("bigsite") == {"account": "a"}
    layers["user"].write_text("[bigsiet]\n")
    _config.forget()
    with pytest.raises(ValueError, match=r"unknown table 'bigsiet'; did you mean 'bigsite'\?"):
        setting("timeout")


def test_a_scheduler_defined_here_has_a_table(
    layers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import hpcdist

    monkeypatch.setattr(_config, "_learned", set[str]())

    class Site(hpcdist.SlurmManager):
        name = "bigsite"

    layers["user"].write_text("[bigsite]\naccount = 'a'\n")
    assert hpcdist.default_addprocs_params()["timeout"] == 60
    assert "--account=a" in Site(2).job_script(mpi="pmi2")
    assert "bigsite" in _config.learned()  # which goes into join files: workers read settings too


def test_a_setting_that_is_gone_is_an_error(
    layers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPCDIST_SPIN_US", "banana")
    with pytest.raises(ValueError, match="HPCDIST_SPIN_US is no longer a setting"):
        setting("timeout")
    monkeypatch.delenv("HPCDIST_SPIN_US")
    layers["user"].write_text("spin_us = 3")
    with pytest.raises(ValueError, match="unknown key 'spin_us'"):
        setting("timeout")


def test_a_user_s_files_follow_xdg_config_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the real places
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder, timeout in (("home/.config", 7), ("elsewhere", 8)):
        (tmp_path / folder / "hpcdist").mkdir(parents=True)
        (tmp_path / folder / "hpcdist" / "config.toml").write_text(f"timeout = {timeout}")
    for home, timeout in (
        ("", 7),
        ("not/absolute", 7),
        (str(tmp_path / "elsewhere"), 8),
    ):
        monkeypatch.setenv("XDG_CONFIG_HOME", home)
        _config.forget()
        assert setting("timeout") == timeout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("timout = 3", "unknown key 'timout'; did you mean 'timeout'"),
        ("[slrum]", "unknown table 'slrum'; did you mean 'slurm'"),
        ("zzz = 3", "unknown key 'zzz'; known are timeout"),
        ("slurm = 3", r"'slurm' must be a table"),
        ("timeout = 'soon'", "'timeout' must be a number, not 'soon'"),
        ("timeout = true", "'timeout' must be a number"),
        ("timeout = -1", "'timeout' must not be negative"),
        ("timeout = ", "not valid TOML"),
    ],
)
def test_mistakes_in_a_file_are_named(layers: dict[str, Path], text: str, message: str) -> None:
    layers["user"].write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        setting("timeout")
    assert str(layers["user"]) in str(caught.value)


def test_mistakes_in_the_environment_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCDIST_TIMEOUT", "soon")
    with pytest.raises(ValueError, match="HPCDIST_TIMEOUT: 'timeout' must be a number"):
        setting("timeout")
    monkeypatch.delenv("HPCDIST_TIMEOUT")
    monkeypatch.setenv("HPCDIST_TIMOUT", "3")
    _config.forget()
    with pytest.raises(ValueError, match=r"HPCDIST_TIMOUT is unknown; .* HPCDIST_TIMEOUT\?"):
        setting("timeout")


def test_variables_of_others_and_our_internal_ones_are_let_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("JOIN", "RANK", "TEST_RUN", "LOG", "QQQ", "TEST_WHATEVER"):
        monkeypatch.setenv(f"HPCDIST_{name}", "info")
    assert setting("timeout") == 60


def test_nearest() -> None:
    assert nearest("topolgy", ["timeout", "topology"]) == "topology"
    assert nearest("zzz", ["timeout", "topology"]) is None


@pytest.mark.parametrize("typo", ["templat", "templatee", "templste", "tempalte", "emplate"])
def test_one_typo(typo: str) -> None:
    assert one_typo_from(typo, ["timeout", "template"]) == "template"


@pytest.mark.parametrize("name", ["time", "template", "tem", "etalpmet", ""])
def test_no_typo(name: str) -> None:
    assert one_typo_from(name, ["timeout", "template"]) is None


def test_unknown_option() -> None:
    error = unknown_option("zzz", {"b", "a"}, "addprocs")
    assert isinstance(error, TypeError)
    assert str(error) == "addprocs has no option 'zzz'; known are a, b"


@contextmanager
def without_logging() -> Iterator[None]:
    """Have no handler of `logging` set up meanwhile, and the level read anew: pytest has some."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_log, "_threshold", _log._Threshold())
        patch.setattr(logging.getLogger(), "handlers", [])
        yield


@pytest.mark.parametrize(
    ("level", "written"),
    [(None, ["warning"]), ("info", ["info", "warning"]), ("debug", ["debug", "info", "warning"])],
)
def test_log(
    level: str | None,
    written: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if level:
        monkeypatch.setenv("HPCDIST_LOG", level)
    with without_logging():
        for name in ("debug", "info", "warning"):
            _log.log(name, "one\ntwo")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(written)
    for line, name in zip(lines, written, strict=True):
        assert re.fullmatch(rf"\d\d:\d\d:\d\d\.\d{{3}} hpcdist\[\d+\] {name}: one\\ntwo", line)


def test_log_with_a_wrong_level_still_warns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HPCDIST_LOG", "loud")
    with without_logging():
        _log.log("warning", "here")
    assert "here" in capsys.readouterr().err
