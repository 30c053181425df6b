"""How the MPI of this test run is started under Slurm."""

import sys
from pathlib import Path

from hpcdist._keeper.installed_mpi import MPICH_WHEEL_ENV
from tests.helpers import mpi_environment, mpi_flavour

__all__ = ["ENVIRONMENT", "PMI", "WRONG_PMI", "mpiexec"]

_OPENMPI = mpi_flavour() == "openmpi"

# The option of srun that fits, and those with which every task is a world of its own.
PMI = ["--mpi=pmix" if _OPENMPI else "--mpi=pmi2"]
WRONG_PMI = ["none", "pmi2"] if _OPENMPI else ["none"]

# More ranks than cores; no binding, as the nodes claim more cores than there are; and the wheel of
# Open MPI has no plug-in for munge.
_SETTINGS = (
    "OMPI_MCA_btl",
    "OMPI_MCA_mpi_yield_when_idle",
    "PRTE_MCA_hwloc_default_binding_policy",
)
ENVIRONMENT = {name: mpi_environment()[name] for name in _SETTINGS} if _OPENMPI else {}
if _OPENMPI:
    ENVIRONMENT["PMIX_MCA_psec"] = "native"
else:
    ENVIRONMENT = dict(MPICH_WHEEL_ENV)  # for programs that are not started by hpcdist


def mpiexec(ranks: int) -> list[str]:
    """Return the start of a command line within an allocation."""
    return [str(Path(sys.executable).parent / "mpiexec"), "-n", str(ranks)]
