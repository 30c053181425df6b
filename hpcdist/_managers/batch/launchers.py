"""What starts a world inside a job: the scheduler's own launcher, or the MPI's."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from hpcdist._managers.launching import OPENMPI_ENV, OPENMPI_OPTIONS, Mpi

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
# A rank's shell tells the keeper how it ended (see `steps`), where the launcher does not: hydra
# never, and the words of Open MPI's daemons on other hosts may go elsewhere. Ranks that are no MPI
# world end for the launcher in good order.
_TELLING = (
    '"$@"; code=$?; [ $code = 0 ] || '
    'echo "hpcdist: rank ${PMI_RANK:-$OMPI_COMM_WORLD_RANK} ended with $code" >&2; '
)
_SEPARATE = _TELLING + "exit 0"
_TELLING += "[ $code -le 128 ] || kill -$((code - 128)) $$; exit $code"


@dataclass(frozen=True)
class WorldLauncher:
    """What starts a world inside a job.

    Attributes:
        argv: The command, up to what it shall start.
        how: How its lines name the ranks: "srun", "mpirun" or "hydra".
        env: Variables it needs.
        mpi: Whether its ranks are one MPI world.
        apart: Whether ranks may leave one by one, and one death is no other's.
        end: What kills all ranks at once, where the launcher cannot; `{step}` stands for the
            scheduler's name of what it has started.
        kill: What sends a rank on another host a signal: `{host}`, `{pid}`, `{signal}`.
        remote: What starts a command on another host of the job, for a launcher that would take
            ssh: `{host}`, and `{command}`, a text for a shell.
    """

    argv: tuple[str, ...]
    how: str
    env: Mapping[str, str] = field(default_factory=dict)
    mpi: bool = True
    apart: bool = True
    end: tuple[str, ...] = ()
    kill: tuple[str, ...] = ()
    remote: tuple[str, ...] = ()


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


def _hydra(n: int, mpi: Mpi, watched: bool) -> WorldLauncher:
    label = ("-prepend-rank",) if watched else ()
    return WorldLauncher((mpi.mpiexec, *label, "-n", str(n)), "hydra", apart=False)


def _prte(n: int, mpi: Mpi, watched: bool) -> WorldLauncher:
    many: tuple[str, ...] = OPENMPI_OPTIONS
    if mpi.version < (5,):
        many = ("--oversubscribe",)
    else:
        # --leave-session-attached: else the daemons of other hosts do not tell how a rank ended.
        told = ("--output", "tag", "--leave-session-attached")
        many = (*many, *told) if watched else many[: many.index("--prtemca")]
    argv = (mpi.mpiexec, *many, "-n", str(n))
    return WorldLauncher(argv, "mpirun", OPENMPI_ENV, apart=mpi.version >= (5,))


def like_rsh(*program: str) -> tuple[str, ...]:
    """Return the `remote` for a program that is used like rsh.

    Whatever shell it passes its words through, a plain /bin/sh there reads the command.
    """
    script = f'exec {shlex.join(program)} "$1" /bin/sh <<COMMAND\n$2\nCOMMAND'
    return ("/bin/sh", "-c", script, "sh", "{host}", "{command}")
