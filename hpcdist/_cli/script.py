"""`hpcdist script -n 8 ...`: the job script that `addprocs`, or `submit`, would submit."""

from __future__ import annotations

import argparse

from hpcdist._cli import job_options, submit
from hpcdist._cli.schedulers import chosen, refusals


def main(options: argparse.Namespace) -> int:
    """Print the script for workers; where a driver is named, the one that would run it."""
    if options.program:
        return submit.show(options)
    with refusals(options):
        scheduler = chosen(getattr(options, "scheduler", None), needed=False)
        script = scheduler.manager(options.n).job_script(**job_options.keywords(options))
    print(script, end="")
    return 0
