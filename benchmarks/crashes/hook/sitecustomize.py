"""Has an accident happen to a worker that starts; Python imports this by its name alone."""

import os

if "CRASH_AT" in os.environ:
    from benchmarks.crashes.at_start import stop_at

    stop_at(os.environ["CRASH_AT"])
