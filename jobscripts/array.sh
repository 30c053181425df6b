#!/bin/bash
# A job array: many small clusters, each of one driver and its workers on one node.
#
#     sbatch jobscripts/array.sh driver.py [argument ...]
#
# The driver runs once for each task of the array, which it knows by SLURM_ARRAY_TASK_ID. Four
# workers are there when it starts; `hpcdist.init()` in it does nothing more.
#
# To adapt: the lines that begin with #SBATCH (`sbatch --array=0-99%10 ...` overrules them: a hundred
# tasks, ten at once), and how the environment is made, below.
#SBATCH --job-name=hpcdist-array
#SBATCH --array=0-3
#SBATCH --nodes=1
#SBATCH --cpus-per-task=4
#SBATCH --time=10
#SBATCH --no-requeue

# module load python
# source ~/environment/bin/activate

exec python -u -m hpcdist run -n "$SLURM_CPUS_PER_TASK" "$@"
