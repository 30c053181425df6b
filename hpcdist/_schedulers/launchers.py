"""What starts a world inside a job: the scheduler's own launcher, or the MPI's."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from hpcdist._keeper.installed_mpi import OPENMPI_ENV, OPENMPI_OPTIONS, Mpi
from hpcdist._public import public_in

# The program that a job script makes of `WorldLauncher.remote`, first on PATH there (base.sh.j2).
AGENT = "hpcdist-remote"
# Open MPI 5, and 4. Daemons that leave their session end with the scheduler's task, and mpirun
# hangs; those of other hosts cannot start more of them (both seen with 5.0.11, or by its sources).
_AGENT = {
    "PRTE_MCA_plm_ssh_agent": AGENT,
    "PRTE_MCA_plm_ssh_no_tree_spawn": "1",
    "PRTE_MCA_prte_leave_session_attached": "1",
    "OMPI_MCA_plm_rsh_agent": AGENT,
    "OMPI_MCA_plm_rsh_no_tree_spawn": "1",
    "OMPI_MCA_orte_leave_session_attached": "1",
}
# `mpiexec -prepend-rank` of hydra: "[3] text". `mpirun --output tag` of PRRTE 3:
# "[1,3]<stdout>: text".
HYDRA_LABEL = r"^\[([0-9]{1,9})\] ?"
PRTE_LABEL = r"^\[\d+,([0-9]{1,9})\]<std\w+>: ?"
# A rank's shell tells the keeper how it ended (see `launcher_output`), where the launcher does not:
# hydra never does, and the words of Open MPI's daemons on other hosts may go elsewhere. Ranks that
# are no MPI world end for the launcher in good order, so that the shell alone knows how.
_RANK = "${PMI_RANK:-$OMPI_COMM_WORLD_RANK}"
_TELL = f'echo "hpcdist: rank {_RANK} ended with $code" >&2; '
_SEPARATE = f'"$@"; code=$?; {_TELL}exit 0'
_TELLING = f'"$@"; code=$?; [ $code = 0 ] || {_TELL}'
_TELLING += "[ $code -le 128 ] || kill -$((code - 128)) $$; exit $code"


@public_in("managers")
@dataclass(frozen=True)
class WorldLauncher:
    """What starts a world inside a job.

    Attributes:
        argv: The command, up to what it shall start.
        how: Whose it is: "mpirun" or "hydra", an MPI's; "other", a scheduler's.
        env: Variables it needs.
        mpi: Whether its ranks are one MPI world.
        apart: Whether ranks may leave one by one, and one death is no other's.
        end: What kills all ranks at once, where the launcher cannot; `{step}` stands for the
            scheduler's name of what it has started.
        kill: What sends a rank on another host a signal: `{host}`, `{pid}`, `{signal}`.
        step_variables: The variables of a rank whose values, with dots between, are that name.
        remote: What starts a command on another host of the job, for a launcher that would take
            ssh: `{host}`, and `{command}`, a text for a shell.
        label: How its lines name the ranks: an expression for their beginning, whose first group is
            the number; "": they do not.
        ends: How its errors tell that ranks have ended: an expression whose groups are their
            numbers ("0-2,5") and the words ("Killed", "Exited with exit code 7").
        rank_variable: The variable by which a rank knows its number. Each rank's shell then says
            how it ended: for a launcher that does not, or not in such words.

    Example:
        >>> from hpcdist.managers import WorldLauncher
        >>> argv = ("flux", "run", "-n8", "--label-io")
        >>> WorldLauncher(argv, label="^([0-9]+): ", rank_variable="FLUX_TASK_RANK").how
        'other'
    """

    argv: tuple[str, ...]
    how: str = "other"
    env: Mapping[str, str] = field(default_factory=dict)
    mpi: bool = True
    apart: bool = True
    end: tuple[str, ...] = ()
    kill: tuple[str, ...] = ()
    remote: tuple[str, ...] = ()
    label: str = ""
    ends: str = ""
    rank_variable: str = ""
    step_variables: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, text, least in (("label", self.label, 1), ("ends", self.ends, 2)):
            if text and re.compile(text).groups < least:
                raise ValueError(f"{name}={text!r}: an expression with {least} group(s) or more")


def mpiexec(n: int, mpi: Mpi, *, watched: bool, remote: Sequence[str] = ()) -> WorldLauncher:
    """Take the MPI's own launcher, which finds the job's hosts by itself.

    Args:
        watched: Whether a keeper reads which rank said what, and how each ended.
        remote: How it shall reach the other hosts, see `WorldLauncher`; by default its own way.
    """
    launcher = _hydra(n, mpi, watched) if mpi.family != "openmpi" else _prte(n, mpi, watched)
    if not remote:
        return launcher
    argv: tuple[str, ...] = launcher.argv
    env = dict(launcher.env)
    if mpi.family == "openmpi":
        env |= _AGENT
    else:
        name = "bootstrap" if mpi.family == "intel" else "launcher"
        argv = (argv[0], f"-{name}", "ssh", f"-{name}-exec", AGENT, *argv[1:])
    if watched:
        argv = (*argv, "/bin/sh", "-c", _TELLING, "sh")
    kill = tuple(word.replace("{command}", "kill -{signal} {pid}") for word in remote)
    return replace(launcher, argv=argv, env=env, kill=kill, remote=tuple(remote))


def separate(launcher: WorldLauncher) -> WorldLauncher:
    """Let an MPI's launcher start ranks that are no MPI world, and not learn how they end."""
    argv = launcher.argv[:-4] if _TELLING in launcher.argv else launcher.argv
    argv = (*argv, "/bin/sh", "-c", _SEPARATE, "sh")
    return replace(launcher, argv=argv, mpi=False, apart=True)


def telling(launcher: WorldLauncher) -> WorldLauncher:
    """Let the shells of ranks tell how these end, of a launcher that says by what they know it."""
    if not launcher.rank_variable:
        return launcher
    script = (_TELLING if launcher.mpi else _SEPARATE).replace(_RANK, f"${launcher.rank_variable}")
    return replace(launcher, argv=(*launcher.argv, "/bin/sh", "-c", script, "sh"))


def _hydra(n: int, mpi: Mpi, watched: bool) -> WorldLauncher:
    label = ("-prepend-rank",) if watched else ()
    argv = (mpi.launcher, *label, "-n", str(n))
    return WorldLauncher(argv, "hydra", mpi.network, apart=False, label=HYDRA_LABEL)


def _prte(n: int, mpi: Mpi, watched: bool) -> WorldLauncher:
    many: tuple[str, ...] = OPENMPI_OPTIONS
    if mpi.version < (5,):
        many = ("--oversubscribe",)
    else:
        # --leave-session-attached: else the daemons of other hosts do not tell how a rank ended.
        told = ("--output", "tag", "--leave-session-attached")
        many = (*many, *told) if watched else many[: many.index("--prtemca")]
    argv = (mpi.launcher, *many, "-n", str(n))
    apart = mpi.version >= (5,)
    return WorldLauncher(argv, "mpirun", OPENMPI_ENV, apart=apart, label=PRTE_LABEL)


def like_rsh(*program: str) -> tuple[str, ...]:
    """Return the `remote` for a program that is used like rsh.

    Whatever shell it passes its words through, a plain /bin/sh there reads the command.
    """
    script = f'exec {shlex.join(program)} "$1" /bin/sh <<COMMAND\n$2\nCOMMAND'
    return ("/bin/sh", "-c", script, "sh", "{host}", "{command}")
