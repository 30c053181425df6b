"""What becomes of a cluster when a worker ends: every cause at every moment, on real processes."""
