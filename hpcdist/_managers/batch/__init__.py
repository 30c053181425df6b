"""Batch schedulers: job scripts, submission, and what became of the jobs."""
