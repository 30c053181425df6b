"""`hpcdist run -n N driver.py`: workers, then the program, as if `python` had started it."""

from __future__ import annotations

import argparse
import io
import os
import runpy
import sys
from types import ModuleType, TracebackType

from hpcdist._cli.starting import add_workers, fresh_main, lead_path

_RUNPY = runpy.run_path.__code__.co_filename


def main(options: argparse.Namespace) -> int:
    """Run the program; its exceptions and its exit code become this process's."""
    if options.module is not None:
        sys.argv = list(options.module)
        lead_path(os.getcwd())
    else:
        sys.argv = list(options.program)
        lead_path(_folder_of(options.program[0]))
    add_workers(options)  # after sys.path is set: workers get it
    try:
        if options.module is not None:
            fresh_main()
            runpy.run_module(options.module[0], run_name="__main__", alter_sys=True)
        elif os.path.isdir(options.program[0]) or _is_archive(options.program[0]):
            fresh_main()
            runpy.run_path(options.program[0], run_name="__main__")
        else:
            run_file(options.program[0], fresh_main())
    except SystemExit:
        raise
    except BaseException as exc:  # printed by the interpreter, as ever, but without our frames
        _forget_our_frames(exc)
        raise
    return 0


def _folder_of(program: str) -> str:
    real = os.path.realpath(program)
    return real if os.path.isdir(real) or _is_archive(real) else os.path.dirname(real)


def _is_archive(path: str) -> bool:
    import zipfile

    return os.path.isfile(path) and zipfile.is_zipfile(path)


def run_file(program: str, main: ModuleType) -> None:
    """Run a file in a `__main__` that stays, for threads and exit functions that outlive it."""
    path = os.path.abspath(program)
    main.__dict__.update(__file__=path, __cached__=None)
    with io.open_code(path) as file:
        source = file.read()
    exec(compile(source, path, "exec"), main.__dict__)


def _forget_our_frames(exc: BaseException) -> None:
    theirs = _without_ours(exc.__traceback__)
    shown = sys.excepthook

    def hook(
        kind: type[BaseException], value: BaseException, traceback: TracebackType | None
    ) -> None:
        mine = value is exc
        shown(kind, value.with_traceback(theirs) if mine else value, theirs if mine else traceback)

    sys.excepthook = hook


def _without_ours(traceback: TracebackType | None) -> TracebackType | None:
    """Take off the frames that lie above the program's own."""
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if file not in (__file__, _RUNPY) and not file.startswith("<frozen runpy"):
            break
        traceback = traceback.tb_next
    return traceback
