"""A worker's life, from its join file to its end, and how it reaches the others."""

MODULE = "hpcdist._worker.worker"  # what the keeper's forked ranks import
