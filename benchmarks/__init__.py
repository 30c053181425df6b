"""The figures of hpcdist, each against the floor of the same run: `python -m benchmarks`."""
