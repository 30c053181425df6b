"""`hpcdist top`: what the workers of a running driver are doing."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys

from hpcdist._cli.onlooking import PATIENCE, NotFound, find, fresh
from hpcdist._cli.schedulers import leave
from hpcdist._cli.top_page import page
from hpcdist._events.windows import Closed, FolderView, View


def main(options: argparse.Namespace) -> int:
    """Show it once, or until a key or Ctrl-C ends it."""
    try:
        view = find(options.driver)
        if options.once or options.json:
            return _once(view, options)
        if not sys.stdout.isatty():
            leave(options, 2, "this is no terminal: say --once, or --json")
        from hpcdist._cli.top_screen import watch

        return watch(view)
    except NotFound as exc:
        leave(options, 1, str(exc))
    except Closed:
        leave(options, 1, "the driver has ended")
    except KeyboardInterrupt:
        return 0


def _once(view: View | FolderView, options: argparse.Namespace) -> int:
    seen = fresh(view, PATIENCE)
    if seen is None:
        leave(options, 1, "the driver does not answer: is it stopped, or does C code hold it?")
    if options.json:
        print(json.dumps(seen, indent=1))
        return 0
    width = shutil.get_terminal_size().columns if _has_width() else None
    print("\n".join(page(seen, width)))
    return 0


def _has_width() -> bool:
    return sys.stdout.isatty() or "COLUMNS" in os.environ
