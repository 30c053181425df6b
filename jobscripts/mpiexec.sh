#!/bin/bash
# A driver as one of the ranks that mpiexec starts: rank 0 is process 1, the others are its workers.
#
#     sbatch jobscripts/mpiexec.sh driver.py [argument ...]
#
# The driver calls `hpcdist.init()` before anything else; the job's exit code is the driver's. For
# clusters whose srun does not speak the protocol of your MPI (see `srun --mpi=list`).
#
# To adapt: the lines that begin with #SBATCH (`sbatch --ntasks-per-node=64 ...` overrules them), and
# how the environment is made, below. mpiexec must belong to the MPI that mpi4py loads: the first one
# on PATH does if the environment is active.
#SBATCH --job-name=hpcdist-mpiexec
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --time=10
#SBATCH --no-requeue

# module load python
# source ~/environment/bin/activate

# --bind-to none: with threads in a rank, a binding to one core is in the way.
exec mpiexec -n "$SLURM_NTASKS" --bind-to none python "$@"
