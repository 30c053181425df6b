"""The figures of hpcdist, each against the raw MPI floor of the same run: `python -m benchmarks`."""
