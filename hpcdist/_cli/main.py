"""`hpcdist`: run, repl, worker, demo."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:2] == ["worker", "--join"] and len(args) == 3:
        from hpcdist._managers.worker import work

        work(args[2])
    return 2
