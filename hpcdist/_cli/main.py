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


_CLOSED_PIPE = 141  # what a shell says of a program that SIGPIPE has ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; end quietly where nobody reads what it prints (`| head`).

    Args:
        argv: The arguments; without it, this process's.
    """
    try:
        try:
            return _command(argv)
        finally:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
    except BrokenPipeError:
        if not _silence():  # another pipe, or socket: that is somebody's error
            raise
        return _CLOSED_PIPE


def _silence() -> bool:
    """Let what is still printed to a closed pipe go nowhere; tell whether there was one."""
    import os
    import select

    closed = False
    for fd in (1, 2):
        poll = select.poll()
        poll.register(fd, 0)
        if any(event & select.POLLERR for _, event in poll.poll(0)):
            closed = True
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, fd)
            os.close(nowhere)
    return closed


def _command(argv: Sequence[str] | None) -> int:
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:2] == ["worker", "--join"] and len(args) == 3:
        from hpcdist._cli.worker import join

        join(args[2])
    if args[:1] == ["keeper"] and args[1:2] in (["--join"], ["--linger"]) and args[3:4] == ["--"]:
        from hpcdist._keeper.job_keeper import keep

        keep(args[2], args[4:], lingers=args[1] == "--linger")
    if args[:1] == ["again"] and len(args) == 2:
        from hpcdist._cli.again import again

        return again(args[1])
    from hpcdist._cli.parser import parse

    return _dispatch(parse(args))


def _dispatch(options: argparse.Namespace) -> int:
    from importlib import import_module

    command = import_module(f"hpcdist._cli.{options.command}")
    code: int = command.main(options)
    return code
