"""Workers in jobs of Slurm, PBS, Grid Engine and LSF."""
