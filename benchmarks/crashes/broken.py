"""A module that no worker can import."""

raise ImportError("benchmarks.crashes.broken cannot be imported, on purpose")
