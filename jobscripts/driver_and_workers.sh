#!/bin/bash
# A driver on the job's first node, which adds workers on all nodes by itself.
#
#     sbatch jobscripts/driver_and_workers.sh driver.py [argument ...]
#
# The driver calls
#
#     hpcdist.addprocs(hpcdist.SlurmManager(n), launcher="srun")
#
# for n workers as a step of this job, as often as it likes: unlike with srun.sh, workers may come
# and go while the job runs, and each launch is an MPI world of its own. The driver itself is in
# none. jobscripts/driver_and_workers.py is an example.
#
# To adapt: the lines that begin with #SBATCH (`sbatch --ntasks=64 ...` overrules them), and how the
# environment is made, below. The file system of ~/.hpcdist (or HPCDIST_DIR) must be one that all
# nodes see.
#SBATCH --job-name=hpcdist-driver
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --time=10
#SBATCH --no-requeue

# module load python
# source ~/environment/bin/activate

exec python -u "$@"
