"""Keywords: ours, the scheduler's, slips, layers of settings, contradictions."""

import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import hpcdist
from hpcdist import _config
from hpcdist._contract.managers import COMMON
from hpcdist._keeper import keeper_link
from hpcdist._keeper.installed_mpi import MPICH_WHEEL_ENV, Mpi
from hpcdist._schedulers import options
from hpcdist._schedulers.job import FOLDER
from hpcdist._schedulers.slurm import SlurmManager
from hpcdist._schedulers.slurm_words import ALIASES

# The long options of `sbatch --help`, 22.05 and 24.11.
_SBATCH = """
account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment constraint
container contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline
delay-boot dependency distribution error exclude exclusive export export-file extra
extra-node-info get-user-env gid gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket
gpus-per-task gres gres-flags help hint hold ignore-pbs input job-name kill-on-invalid-dep
licenses mail-type mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network nice
no-kill no-requeue nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu ntasks-per-node
ntasks-per-socket open-mode output overcommit oversubscribe parsable partition power prefer
priority profile propagate qos quiet reboot requeue reservation resv-ports segment signal
sockets-per-node spread-job stepmgr switches test-only thread-spec threads-per-core time time-min
tmp tres-bind tres-per-task uid usage use-min-nodes verbose wait wait-all-nodes wckey wrap
"""
SBATCH = _SBATCH.split()


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory to stand in, with no files of settings but its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    _config.forget()
    yield tmp_path
    _config.forget()


def directives(n: int = 8, **params: Any) -> list[str]:
    script = SlurmManager(n).job_script(mpi="pmi2", **params)
    lines = [line.removeprefix("#SBATCH ") for line in script.splitlines() if "#SBATCH" in line]
    ours = ("--chdir", "--output=", "--open-mode", "--no-requeue", "--no-kill", "--job-name=hpcd")
    return [line for line in lines if not line.startswith(ours)]


def whole(**params: Any) -> str:
    return SlurmManager(8).job_script(mpi="pmi2", **params)


def test_what_the_public_documentation_shows() -> None:
    found = directives(
        128, partition="debug", t="00:05:00", exclusive=True, mem_per_cpu="2G", options=["--wait"]
    )
    assert found == [
        *("--ntasks=128", "--partition=debug", "-t 00:05:00", "--exclusive"),
        *("--mem-per-cpu=2G", "--wait"),
    ]


def test_none_and_false_leave_out_what_we_set() -> None:
    script = whole(no_requeue=False, no_kill=None)
    assert "requeue" not in script
    assert "#SBATCH --no-kill" not in script


def test_a_requeue_takes_the_place_of_ours() -> None:
    script = whole(requeue=True)
    assert "#SBATCH --requeue" in script
    assert "--no-requeue" not in script


def test_a_list_is_repeated_and_the_two_spellings_are_one() -> None:
    assert directives(x=["n1", "n2"])[1:] == ["-x n1", "-x n2"]
    assert "#SBATCH --job-name=hpcdist" not in whole(J="mine")


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("a b", "'a b'"),
        ("$HOME", "'$HOME'"),
        ("it's", "'it'\"'\"'s'"),
        ("a#b", "'a#b'"),
        ("a\\b", "'a\\\\b'"),
        ("", "''"),
        ("a/b:c,d=[1-2]%4", "a/b:c,d=[1-2]%4"),
    ],
)
def test_values_are_quoted_as_sbatch_reads_them(value: str, written: str) -> None:
    assert directives(comment=value)[1:] == [f"--comment={written}"]


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\0b"])
def test_a_value_of_several_lines_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="one line"):
        whole(comment=value)
    with pytest.raises(ValueError, match="one line"):
        whole(options=[f"--comment={value}"])


def test_a_value_that_is_no_text_is_refused() -> None:
    with pytest.raises(TypeError, match="mem="):
        whole(mem={"G": 2})


@pytest.mark.parametrize(
    ("slip", "meant"),
    [
        ("templat", "template"),
        ("modlues", "modules"),
        ("job_dri", "job_dir"),
        ("timout", "timeout"),
    ],
)
def test_a_slip_is_a_type_error_with_the_name(slip: str, meant: str) -> None:
    with pytest.raises(TypeError, match=f"{slip}.*did you mean '{meant}'"):
        whole(**{slip: "x"})


def test_no_option_of_sbatch_is_taken_for_a_slip_or_for_ours() -> None:
    for name in SBATCH:
        name = name.replace("-", "_")
        if name not in ("profile", "container"):  # ours; options=["--profile=…"] reaches Slurm's
            assert name not in options.OWN | COMMON
            options._refuse_slips(name, "")


def test_short_names_stand_for_options_of_sbatch() -> None:
    assert {name.replace("_", "-") for name in ALIASES.values()} <= set(SBATCH)


# Layers


def test_tables_profiles_and_keywords(place: Path) -> None:
    (place / "hpcdist.toml").write_text(
        '[slurm]\npartition = "a"\nmem-per-cpu = "1G"\nqos = "low"\nsetup = ["echo site"]\n'
        'timeout = 7\n[profile.big]\nmem_per_cpu = "8G"\nexclusive = true\n'
    )
    assert directives()[1:] == ["--partition=a", "--mem-per-cpu=1G", "--qos=low"]
    assert directives(profile="big", p="b", qos=None)[1:] == [
        *("--mem-per-cpu=8G", "--exclusive", "-p b")
    ]
    assert "\necho site\n" in whole()
    assert "echo site" not in whole(setup=[])
    assert SlurmManager(1).default_addprocs_params()["timeout"] == 7


def test_a_profile_that_is_not_there(place: Path) -> None:
    (place / "hpcdist.toml").write_text("[profile.bigmem]\nmem = 1\n")
    with pytest.raises(ValueError, match=r"profile\.bigmen.*did you mean 'bigmem'"):
        whole(profile="bigmen")


def test_a_slip_in_a_file_names_the_table(place: Path) -> None:
    (place / "hpcdist.toml").write_text('[slurm]\ntemplat = "x"\n')
    with pytest.raises(TypeError, match=r"\[slurm\].*'templat'"):
        whole()


# Contradictions


@pytest.mark.parametrize(
    ("params", "ours", "theirs"),
    [
        ({"ntasks": 4}, "SlurmManager(8)", "ntasks=4"),
        ({"n": "9"}, "SlurmManager(8)", "n='9'"),
        ({"chdir": "/tmp"}, "dir=", "chdir='/tmp'"),
        ({"D": "/", "dir": "/tmp"}, "dir='/tmp'", "D='/'"),
        ({"array": "0-3"}, "split=", "array='0-3'"),
        ({"a": "0-3"}, "split=", "a='0-3'"),
        ({"wrap": "hostname"}, "template=", "wrap='hostname'"),
        ({"test_only": True}, "addprocs", "test_only=True"),
        ({"split": "node", "ntasks_per_node": 4, "N": 2}, "split='node'", "N=2"),
    ],
)
def test_a_contradiction_names_both(params: dict[str, Any], ours: str, theirs: str) -> None:
    with pytest.raises(ValueError) as caught:
        whole(**params)
    assert ours in str(caught.value)
    assert theirs in str(caught.value)


def test_agreement_is_none(place: Path) -> None:
    assert directives(ntasks=8)[:1] == ["--ntasks=8"]
    assert "--chdir=/\n" in whole(dir="/", chdir="/")


@pytest.mark.parametrize(
    ("params", "error"),
    [
        ({"split": 0}, "split="),
        ({"split": "nodes"}, "split="),
        ({"split": "node"}, "ntasks_per_node"),
        ({"launcher": "mpirun"}, "launcher="),
        ({"queue_timeout": -1}, "queue_timeout="),
        ({"keep": 1}, "keep="),
        ({"setup": 3}, "setup="),
        ({"profile": 3}, "profile="),
    ],
)
def test_values_of_ours_that_cannot_be(params: dict[str, Any], error: str) -> None:
    with pytest.raises((ValueError, TypeError), match=error):
        whole(**params)


@pytest.mark.parametrize("n", [0, -1, True, 2.0, "4"])
def test_how_many(n: Any) -> None:
    with pytest.raises(ValueError, match="int of 1 or more"):
        SlurmManager(n)


# Several jobs


@pytest.mark.parametrize(
    ("params", "sizes"),
    [
        ({}, [8]),
        ({"split": 3}, [3, 3, 2]),
        ({"split": 8}, [8]),
        ({"split": 99}, [8]),
        ({"split": "node", "ntasks_per_node": 4}, [4, 4]),
    ],
)
def test_sizes(params: dict[str, Any], sizes: list[int]) -> None:
    manager = SlurmManager(8)
    assert list(manager.plan(manager.settings_of(params)).sizes) == sizes


def test_jobs_of_one_size_are_an_array() -> None:
    found = directives(split=4)
    assert found == ["--ntasks=4", "--array=0-1"]
    assert "/tasks/%a/log" in whole(split=4)
    assert directives(split="node", ntasks_per_node=4)[:3] == [
        *("--ntasks=4", "--nodes=1", "--array=0-1")
    ]


# What starts the world


def slurm_with(*names: str) -> SlurmManager:
    class Flavoured(SlurmManager):
        def flavours(self) -> frozenset[str]:
            return frozenset(names)

    return Flavoured(4)


def launcher(found: Mpi | None, isolation: str = "auto", **params: Any) -> list[str]:
    manager = slurm_with("none", "pmi2", "pmix")
    asked = manager.plan(manager.settings_of(params)).asked
    made = manager.launcher(4, asked, isolation, found)
    return [made.argv[0], made.argv[1]]


MPICH = Mpi("mpich", (4, 3), "/opt/mpich/bin/mpiexec")
OPENMPI = Mpi("openmpi", (5, 0, 7), "/opt/openmpi/bin/mpiexec")
OLD = Mpi("openmpi", (4, 1), "/opt/openmpi4/bin/mpiexec")


@pytest.mark.parametrize(
    ("found", "params", "argv"),
    [
        (MPICH, {}, ["srun", "--mpi=pmi2"]),
        (OPENMPI, {}, ["/opt/openmpi/bin/mpiexec", "--oversubscribe"]),
        (OLD, {}, ["srun", "--mpi=pmix"]),
        (OPENMPI, {"launcher": "srun"}, ["srun", "--mpi=pmix"]),
        (OPENMPI, {"mpi": "pmix_v4"}, ["srun", "--mpi=pmix_v4"]),
        (MPICH, {"launcher": "mpiexec"}, ["/opt/mpich/bin/mpiexec", "-prepend-rank"]),
        (None, {}, ["srun", "--mpi=none"]),
    ],
)
def test_launchers(found: Mpi | None, params: dict[str, Any], argv: list[str]) -> None:
    assert launcher(found, **params) == argv


def test_without_a_fitting_flavour_the_mpis_own_launcher_is_taken() -> None:
    manager = slurm_with("none")
    asked = manager.plan(manager.settings_of({})).asked
    made = manager.launcher(4, asked, "auto", MPICH)
    assert made.argv[0] == MPICH.mpiexec


@pytest.mark.parametrize("params", [{}, {"launcher": "mpiexec"}])
def test_the_wheel_of_mpich_gets_a_network_that_works_and_a_site_s_own_is_left_alone(
    params: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own choice, libfabric's "sockets", stood still in MPI_Init in 2 of 24 launches."""

    def variables(found: Mpi) -> dict[str, str]:
        manager = slurm_with("pmi2")
        asked = manager.plan(manager.settings_of(params)).asked
        return dict(manager.launcher(4, asked, "auto", found).env)

    for name in MPICH_WHEEL_ENV:
        monkeypatch.delenv(name, raising=False)
    assert variables(MPICH) == {}
    (tmp_path / "python").touch()  # installed beside an interpreter
    wheel = Mpi("mpich", (5, 0, 2), f"{tmp_path}/mpiexec")
    assert variables(wheel) == {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "^sockets"}
    assert variables(replace(wheel, family="intel")) == {}
    monkeypatch.setenv("FI_PROVIDER", "verbs")
    assert variables(wheel) == {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "verbs"}


def test_cpus_per_task_are_repeated_for_srun() -> None:
    assert "--ntasks=8 --cpus-per-task=3 --kill" in whole(c=3)


def test_the_command_of_the_script() -> None:
    line = next(line for line in whole().splitlines() if line.endswith(" &"))
    assert "keeper" in line
    assert line.count('--join "$folder"/join') == 2
    assert FOLDER not in whole()


def test_a_job_finds_the_checkout_it_was_submitted_from(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(hpcdist.__file__).resolve().parents[1]
    assert f"export PYTHONPATH={shlex.quote(str(root))}" in whole()
    installed = "/usr/lib/python3/site-packages/hpcdist/_keeper/keeper_link.py"
    monkeypatch.setattr(keeper_link, "__file__", installed)
    assert "PYTHONPATH" not in whole()
