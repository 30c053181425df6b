#!/bin/bash
# A driver as one of the ranks that srun starts: rank 0 is process 1, the others are its workers.
#
#     sbatch jobscripts/srun.sh driver.py [argument ...]
#
# The driver calls `hpcdist.init()` before anything else; the job's exit code is the driver's. All
# ranks are one MPI world, so this is the quickest way to talk for workers of different nodes.
#
# To adapt: the lines that begin with #SBATCH (`sbatch --ntasks=64 ...` overrules them), and how the
# environment is made, below. With MPICH, `--kill-on-bad-exit=0` lets a program go on that can do
# with fewer workers when one dies (see `pmap`); Open MPI ends all of them.
#SBATCH --job-name=hpcdist-srun
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --time=10
#SBATCH --no-requeue

# module load python
# source ~/environment/bin/activate

# The start-up protocol that the MPI of this environment speaks. With another one, every task would
# be a world of its own; hpcdist.init() says so and fails.
library=$(python -c '
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(MPI.Get_library_version())') || exit 1
case $library in
*"Open MPI"*)
    mpi=pmix
    export PMIX_MCA_psec=native # the wheel has no plug-in for munge, and complains
    ;;
*) mpi=pmi2 ;; # MPICH and its kin: Intel MPI, MVAPICH, Cray MPICH
esac
case $library in
*"ch4:ucx ofi"*)
    # The wheel of MPICH: over UCX, its start under pmi2 hangs now and then, after "value not properly
    # terminated", the more so the more a program has in memory when it calls hpcdist.init(); and so
    # it does over libfabric's "sockets", which it would take next.
    export MPIR_CVAR_CH4_NETMOD="${MPIR_CVAR_CH4_NETMOD:-ofi}" FI_PROVIDER="${FI_PROVIDER:-^sockets}"
    ;;
esac

exec srun --mpi="$mpi" --kill-on-bad-exit=1 --unbuffered python "$@"
