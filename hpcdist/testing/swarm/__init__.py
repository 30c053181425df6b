"""Random programs on simulated clusters, and what must be true of each."""
