"""`hpcdist`, or `python -m hpcdist`: the commands, each in a module of its own.

A worker is started by the hundred, so its command is recognised before anything is imported that
only people need.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments; without it, this process's.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:2] == ["worker", "--join"] and len(args) == 3:
        from hpcdist._cli.worker import join

        join(args[2])
    if args[:2] == ["keeper", "--join"] and args[3:4] == ["--"]:
        from hpcdist._managers.job_keeper import keep

        keep(args[2], args[4:])
    from hpcdist._cli.parser import parse

    return _dispatch(parse(args))


def _dispatch(options: argparse.Namespace) -> int:
    from importlib import import_module

    command = import_module(f"hpcdist._cli.{options.command}")
    code: int = command.main(options)
    return code
