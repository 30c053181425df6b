"""The extension that `%load_ext hpcdist` loads."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from typing import Any, NoReturn

from hpcdist._cluster.queries import status
from hpcdist._collective.everywhere import everywhere, run_source
from hpcdist._monitor.status import StatusTable
from hpcdist._notebook.cells import NotebookCells
from hpcdist._runtime.node import Node, here

_NUMBERS = re.compile(r"[\d,\-]+")


class _Usage(Exception):
    """What was typed after a magic's name is wrong."""


class _Parser(argparse.ArgumentParser):
    """A parser that raises instead of ending the kernel."""

    def error(self, message: str) -> NoReturn:
        raise _Usage(f"{message}\n{self.format_usage()}")


def _px_parser() -> _Parser:
    parser = _Parser(prog="%%px", add_help=False)
    parser.add_argument("workers", nargs="*", help="pids as 2 3 or 2,3 or 2-5, or a tag")
    parser.add_argument("--on", choices=("all", "one"), default="all")
    return parser


def px(line: str, cell: str) -> None:
    """Run the cell on workers, and show what they print and the value of its last expression.

    %%px                 on all workers
    %%px 2,4-6           on these
    %%px gpu             on those with this tag
    %%px --on one        on one of them
    """
    options = _px_parser().parse_args(shlex.split(line))
    node = here.node
    pids = _chosen(options.workers, node)
    if options.on == "one":
        pids = pids[:1]
    for pid, shown in node.service(NotebookCells).code.gather(run_and_show, (cell,), {}, pids):
        if shown is not None:
            print(f"Out[{pid}]: {shown}")


def run_and_show(source: str) -> str | None:
    """Run source in `__main__`; return what its last expression shows."""
    value = run_source(source, True)
    return None if value is None else repr(value)


def _chosen(words: Sequence[str], node: Node) -> list[int]:
    """Read which workers are meant."""
    if not words:
        return node.workers()
    if all(_NUMBERS.fullmatch(word) for word in words):
        return [pid for word in words for part in word.split(",") if part for pid in _range(part)]
    (tag, *more) = words
    if more:
        raise _Usage(f"workers are pids, or one tag, not {' '.join(words)!r}")
    return node.members.tagged(tag)


def _range(part: str) -> range:
    first, dash, last = part.partition("-")
    try:
        return range(int(first), int(last if dash else first) + 1)
    except ValueError:
        raise _Usage(f"workers are pids such as 2,4-6, not {part!r}") from None


def everywhere_magic(line: str, cell: str) -> None:
    """Run the cell in every process; with --later, also in those that join later."""
    parser = _Parser(prog="%%everywhere", add_help=False)
    parser.add_argument("--later", action="store_true")
    everywhere(cell, later=parser.parse_args(shlex.split(line)).later)


def pids_magic(line: str) -> StatusTable:
    """Show the processes: their pids, hosts, and what they do."""
    return status()


def load(shell: Any) -> None:
    """Give an IPython shell our magics."""
    here.node.admit()
    shell.register_magic_function(px, "cell", "px")
    shell.register_magic_function(everywhere_magic, "cell", "everywhere")
    shell.register_magic_function(pids_magic, "line", "pids")
    here.node.service(NotebookCells).watch(shell)


def unload(shell: Any) -> None:
    """Take them away again."""
    here.node.service(NotebookCells).forget(shell)
    for kind, name in (("cell", "px"), ("cell", "everywhere"), ("line", "pids")):
        shell.magics_manager.magics[kind].pop(name, None)
