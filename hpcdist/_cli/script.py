"""`hpcdist script -n 8 ...`: the job script that `addprocs` would submit."""

from __future__ import annotations

import argparse

from hpcdist._cli import job_options
from hpcdist._cli.schedulers import chosen, manager_of, refusals


def main(options: argparse.Namespace) -> int:
    """Print the script."""
    with refusals(options):
        scheduler = chosen(getattr(options, "scheduler", None), needed=False)
        script = manager_of(scheduler, options.n).job_script(**job_options.keywords(options))
    print(script, end="")
    return 0
