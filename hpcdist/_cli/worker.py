"""`hpcdist worker --join FILE`: be a worker. Starts often, so it imports next to nothing."""

from __future__ import annotations

import os
import sys

from hpcdist._worker.worker import work

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import NoReturn


def main(options: argparse.Namespace) -> int:
    """Work for the launch that a join file describes."""
    join(options.join)


def join(path: str) -> NoReturn:
    """Work for the launch that a join file describes. Never returns.

    Args:
        path: The join file, or `-`: its text comes by standard input.
    """
    if path != "-" and not os.path.isfile(path):
        sys.exit(f"hpcdist worker: there is no join file {path}")
    if path == "-":
        from hpcdist._worker.lowlevel import start_worker

        start_worker("-", stdin=_read_object(sys.stdin.fileno()))
    work(path)


def _read_object(fd: int) -> bytes:
    """Read one JSON object, and not to the end: the sender may keep its side open."""
    import json

    text = b""
    while data := os.read(fd, 1 << 16):
        text += data
        if data.rstrip().endswith(b"}"):
            try:
                json.loads(text)
            except ValueError:
                continue
            return text
    sys.exit("hpcdist worker: standard input did not bring a join file")
