"""What runs side by side (`-n 4`, pytest-xdist): modules, and folders that share a cluster.

The first test of a folder starts its cluster, for all of them; a cluster for each process would
take longer than it saves. Slurm is the exception: its tests are many, they wait more than they
compute, and it is up in two seconds. So its modules are dealt out like others, and each process
that gets one starts a Slurm of its own, for all that it gets.
"""

from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

__all__ = ["ByCluster", "begins_at", "scope_of"]

_ONE_CLUSTER = ("tests/pbs", "tests/sge", "tests/lsf", "tests/ssh")
# What takes longest begins first, so that it does not end last, with nothing beside it; and what
# waits for a minute of Slurm's. Simulations wait for nothing: they compute while those wait.
_FIRST = (
    "tests/slurm/test_time.py",
    "tests/slurm/test_time_limits.py",
    "tests/slurm/test_walltime.py",
    "tests/slurm/test_endings.py",
    "tests/sge",
    "tests/slurm/test_in_a_job.py",
    "tests/unit/test_old_faults.py",
    "tests/unit/test_swarm.py",
    "tests/cluster/test_cli.py",
    "tests/slurm/test_running.py",
    "tests/cluster/test_failures.py",
    "tests/ssh",
)


def scope_of(nodeid: str) -> str:
    """Return what a test stays together with: its module, or its folder."""
    module = nodeid.partition("::")[0]
    folder = module.rpartition("/")[0]
    return folder if folder in _ONE_CLUSTER else module


def begins_at(nodeid: str) -> int:
    """Return a number by which tests are put in order; what is not in the table stays as it is."""
    scope = scope_of(nodeid)
    return _FIRST.index(scope) if scope in _FIRST else len(_FIRST)


class ByCluster(LoadScopeScheduling):
    """Give each process a module or such a folder, and the next one when it is done."""

    def _split_scope(self, nodeid: str) -> str:
        return scope_of(nodeid)

    def _reschedule(self, node: WorkerController) -> None:
        """Give a process more to do, unless it takes another's place and is still looking."""
        if node in self.registered_collections:  # xdist takes that for granted
            super()._reschedule(node)

    def remove_node(self, node: WorkerController) -> str | None:
        """Leave out the test in which a process ended: it would end the next ones, too."""
        ended_in = None
        work = self.assigned_work[node]
        for unit in work.values():
            for nodeid, done in unit.items():
                if not done and ended_in is None:
                    unit[nodeid] = True
                    ended_in = nodeid
        # xdist would hand out anew what is done, too. A process that gets nothing but that waits
        # for ever: it keeps its last test until it knows the next one.
        for scope in [scope for scope, unit in work.items() if all(unit.values())]:
            del work[scope]
        super().remove_node(node)
        return ended_in
