"""`hpcdist repl -p N`: an interactive Python with workers, as `julia -p N`."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import os
import sys
from types import ModuleType

from hpcdist import _config
from hpcdist._cli.starting import add_workers, fresh_main, lead_path

_HISTORY = 2000
_PRELUDE = "import hpcdist\nfrom hpcdist import *\n"


def main(options: argparse.Namespace) -> int:
    """Read and run what the user types, until the end of the input."""
    lead_path("")
    sys.argv = [""]
    main = fresh_main()
    pids = add_workers(options)
    exec(_PRELUDE, main.__dict__)
    shell = _plain if _ipython_is_missing() else _ipython
    shell(main, _banner(pids))
    return 0


def _banner(pids: list[int]) -> str:
    version = sys.version.split()[0]
    if not pids:
        return f"hpcdist on Python {version}: no workers yet; addprocs(4) adds some"
    return f"hpcdist on Python {version}: process 1, workers {', '.join(map(str, pids))}"


def _ipython_is_missing() -> bool:
    from importlib.util import find_spec

    return find_spec("IPython") is None


def _ipython(main: ModuleType, banner: str) -> None:
    import IPython
    from IPython.terminal.ipapp import load_default_config

    config = load_default_config()
    config.TerminalInteractiveShell.banner1 = banner + "\n"
    config.TerminalInteractiveShell.banner2 = ""
    IPython.start_ipython(argv=[], user_ns=main.__dict__, config=config)


def _plain(main: ModuleType, banner: str) -> None:
    import code

    _complete_names(main)
    _remember_lines()
    code.interact(banner, local=main.__dict__, exitmsg="")


def _complete_names(main: ModuleType) -> None:
    try:
        import readline
        import rlcompleter
    except ImportError:  # a Python built without it
        return
    readline.set_completer(rlcompleter.Completer(main.__dict__).complete)
    readline.parse_and_bind("tab: complete")


def _remember_lines() -> None:
    try:
        import readline
    except ImportError:
        return
    folder = _config.setting("dir")
    path = os.path.join(folder, "history")
    with contextlib.suppress(OSError):  # the first time there is none
        readline.read_history_file(path)
    readline.set_history_length(_HISTORY)

    def save() -> None:
        with contextlib.suppress(OSError):  # a full or read-only home ends nobody's session
            os.makedirs(folder, mode=0o700, exist_ok=True)
            readline.write_history_file(path)

    atexit.register(save)
