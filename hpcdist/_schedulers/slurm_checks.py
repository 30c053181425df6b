"""Checks of `hpcdist doctor` that ask Slurm, and the parsers of its answers."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from hpcdist._schedulers import commands
from hpcdist._schedulers.findings import Finding, Trial, bad, doubt, fact, good, table
from hpcdist._schedulers.slurm_words import parse_mpi_list

_NEEDED = ("sbatch", "squeue", "scancel", "srun", "scontrol", "sinfo")
_PARTITIONS = "%P|%a|%l|%F|%c"
# Which flavour of srun starts which library.
_FITTING = {"mpich": "pmi2", "intel": "pmi2", "openmpi": "pmix"}


@dataclass(frozen=True)
class Partition:
    """A partition, as far as a user cares."""

    name: str
    state: str
    limit: str
    idle: int
    nodes: int
    cpus: str
    default: bool


def parse_partitions(text: str) -> list[Partition]:
    """Read `sinfo -h -o "%P|%a|%l|%F|%c"`; %F is allocated/idle/other/all.

    >>> parse_partitions("debug*|up|2:00|1/2/0/3|64\\n")[0].idle
    2
    """
    found = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split("|")]
        counts = fields[3].split("/") if len(fields) == 5 else []
        if len(counts) != 4 or not all(_is_count(count) for count in counts):
            continue
        name, state, limit, _, cpus = fields
        idle, total = _count(counts[1]), _count(counts[3])
        found.append(
            Partition(name.rstrip("*"), state, limit, idle, total, cpus, name.endswith("*"))
        )
    return found


def _is_count(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?[KMG]?", text) is not None


def _count(text: str) -> int:
    """Read a number of nodes; big ones are cut short.

    >>> _count("12"), _count("1.5K")
    (12, 1536)
    """
    scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1], 1)
    return int(float(text.rstrip("KMG")) * scale)


def parse_accounting(status: int, out: str, err: str) -> str:
    """Tell from what `sacct` answers whether it is "on", "off", "forbidden" or else in its words.

    >>> parse_accounting(1, "", "Slurm accounting storage is disabled")
    'off'
    >>> parse_accounting(1, "", "slurmdbd: Permission denied"), parse_accounting(0, "", "")
    ('forbidden', 'on')
    """
    if status == 0:
        return "on"
    said = (err + out).strip()
    if "accounting storage is disabled" in said:
        return "off"
    if re.search(r"[Pp]ermission denied|[Aa]ccess.*denied|not authori[sz]ed", said):
        return "forbidden"
    return said or f"exit code {status}"


def parse_ping(text: str) -> list[tuple[str, str]]:
    """Read `scontrol ping`: each controller's host, and UP or DOWN.

    >>> parse_ping("Slurmctld(primary) at login is UP\\nSlurmctld(backup) at b is DOWN\\n")
    [('login', 'UP'), ('b', 'DOWN')]
    >>> parse_ping("Slurmctld(primary/backup) at a/b are UP/DOWN")
    [('a', 'UP'), ('b', 'DOWN')]
    """
    found: list[tuple[str, str]] = []
    for hosts, states in re.findall(r" at (\S+) (?:is|are) ([A-Z/]+)", text):
        found += zip(hosts.split("/"), states.split("/"), strict=False)
    return found


def checks(trial: Trial) -> list[Callable[[], Iterable[Finding]]]:
    """Return the checks, in their order."""
    return [
        scheduler,
        lambda: [flavours(trial.family, _launcher(trial))],
        lambda: [test_only(trial)],
        lambda: [partitions()],
        lambda: [accounting()],
    ]


def _launcher(trial: Trial) -> str:
    argv = trial.launcher().argv
    return " ".join([argv[0], *(word for word in argv if word.startswith("--mpi="))])


def scheduler() -> Iterator[Finding]:
    """Check Slurm's commands, and that Slurm answers."""
    missing = [program for program in _NEEDED if shutil.which(program) is None]
    if missing:
        yield bad(
            f"not on PATH: {', '.join(missing)}",
            "go to a login node, or load the site's slurm module",
        )
        return
    done = commands.ask("sinfo", "--version")
    yield good(f"{done.out.strip() or 'Slurm'}: {', '.join(_NEEDED)} are there")
    ping = commands.ask("scontrol", "ping")
    up = [host for host, state in parse_ping(ping.out) if state == "UP"]
    if up:
        yield good(f"the controller on {', '.join(up)} answers, after {ping.seconds:.2f} s")
    else:
        yield bad("the controller does not answer", "wait, or ask the administrators", ping.said)


def flavours(family: str | None, launcher: str) -> Finding:
    """Compare the flavours of srun with the MPI library in use.

    Args:
        family: The library's; None: there is none.
        launcher: What will start the ranks.
    """
    done = commands.ask("srun", "--mpi=list")
    offered = parse_mpi_list(f"{done.out}\n{done.err}")
    if not offered:
        return doubt("srun does not list its MPI flavours", "give --mpi yourself", done.said)
    text = f"srun offers {', '.join(sorted(offered))}"
    wanted = _FITTING.get(family or "")
    if wanted is None:
        return fact(text)
    text += f"; {family} needs {wanted}; ranks are started by {launcher}"
    chosen = re.search(r"--mpi=(\S+)", launcher)
    if chosen is None or chosen[1].startswith(wanted):
        return good(text)
    return bad(text, f"--mpi={wanted}, or --launcher=mpiexec")


def test_only(trial: Trial) -> Finding:
    """Let sbatch judge a script of ours, with all the options that were given."""
    script = trial.script()
    with tempfile.TemporaryDirectory(prefix="hpcdist-doctor-") as folder:
        path = os.path.join(folder, "script.sh")
        with open(path, "w") as file:
            file.write(script)
        done = commands.ask("sbatch", "--test-only", path)
    if done.status == 0 and "allocation failure" not in done.said:
        where = re.search(r" on nodes (\S+) in partition (\S+)", done.said)
        more = f" (nodes {where[1]}, partition {where[2]})" if where else ""
        return good(f"sbatch --test-only accepts our script{more}")
    return bad(
        "sbatch --test-only refuses our script",
        "hpcdist passes on options that it does not know: --partition=…, --account=…, --time=…",
        done.said,
    )


def partitions() -> Finding:
    """List the partitions."""
    done = commands.ask("sinfo", "-h", "-o", _PARTITIONS)
    found = parse_partitions(done.out)
    if not found:
        return doubt("sinfo lists no partition", "ask the administrators", done.said)
    headline = ("PARTITION", "STATE", "TIME LIMIT", "IDLE NODES", "CPUS")
    rows = [
        (
            partition.name + (" (default)" if partition.default else ""),
            partition.state,
            partition.limit,
            f"{partition.idle} of {partition.nodes}",
            partition.cpus,
        )
        for partition in found
    ]
    return fact("partitions:", table(headline, rows))


def accounting() -> Finding:
    """Tell whether Slurm remembers jobs that have ended."""
    done = commands.ask("sacct", "-X", "-n", "-P", "-S", "now-1minutes", "-o", "JobID")
    state = parse_accounting(done.status, done.out, done.err)
    if state == "on":
        return good("accounting (sacct) is on: hpcdist can always say how a job ended")
    return fact(
        f"accounting (sacct) is {state}: hpcdist asks scontrol how a job ended, which remembers "
        "it for some minutes"
    )
