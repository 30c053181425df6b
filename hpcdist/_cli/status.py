"""`hpcdist status`: `hpcdist top --once`."""

from __future__ import annotations

import argparse

from hpcdist._cli import top


def main(options: argparse.Namespace) -> int:
    """Print it."""
    options.once = True
    return top.main(options)
