"""Code and functions on every process at once."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterable
from typing import Any

from hpcdist._errors import CompositeException, HpcdistError
from hpcdist._remote.calls import remote_do, remotecall
from hpcdist._runtime.node import node

_later: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []


class Everywhere:
    """Run code in every process.

    - `everywhere("import math; x = 3")`: source, in `__main__` of every process.
    - `@everywhere`: a function or class, defined under its name in `__main__` of every process.
    - `everywhere.call(f, *args)`: a function call on every process; `{pid: result}`.

    Example:
        >>> import hpcdist
        >>> hpcdist.everywhere("x = 3", pids=1)
        >>> hpcdist.everywhere("x + 1", pids=1)
        4
    """

    def __call__(self, what: Any = None, /, *, pids: Any = None, later: bool = False) -> Any:
        """Run source, or define a function or class, on every process.

        Args:
            what: Source text; or a function or class (then this is a decorator).
            pids: One pid (the value of the last expression is returned), or several; default all.
            later: Also on workers that join later.
        """
        if what is None:
            return lambda thing: self(thing, pids=pids, later=later)
        if isinstance(what, str):
            compile(what, "<everywhere>", "exec")  # what does not compile is not sent
            single = isinstance(pids, int) and not isinstance(pids, bool)
            return self._run(run_source, (what, single), pids, later)
        self._run(define, (what.__name__, what), pids, later)
        return what

    def call(self, f: Callable[..., Any], /, *args: Any, pids: Any = None, **kw: Any) -> dict[int, Any]:
        """Call a function on every process and return its results by pid."""
        return dict(_gather(f, args, kw, _listed(pids)))

    def _run(self, f: Callable[..., Any], args: tuple[Any, ...], pids: Any, later: bool) -> Any:
        single = isinstance(pids, int) and not isinstance(pids, bool)
        if later:
            _later.append((f, args))
        results = _gather(f, args, {}, _listed(pids), single)
        return results[0][1] if single else None

    def __repr__(self) -> str:
        return "<hpcdist.everywhere>"


everywhere = Everywhere()


def _listed(pids: Any) -> list[int]:
    if pids is None:
        node.start()
        if node.refusal:
            raise RuntimeError(node.refusal)
        return node.members.procs()
    if isinstance(pids, int):
        return [pids]
    listed = [int(p) for p in pids]
    return sorted(listed, key=lambda p: p != 1)  # pid 1 first, the others as named


def _gather(
    f: Callable[..., Any], args: Any, kw: Any, pids: Iterable[int], single: bool = False
) -> list[tuple[int, Any]]:
    """Call on all, remote ones first, so that our own share does not delay the sending."""
    pids = list(pids)
    started: dict[int, Any] = {}
    order = sorted(range(len(pids)), key=lambda k: pids[k] == node.me)
    errors: dict[int, Exception] = {}
    for k in order:
        try:
            started[k] = remotecall(f, pids[k], *args, **kw)
        except HpcdistError as exc:
            errors[k] = exc
    results = []
    for k, pid in enumerate(pids):
        if k not in started:
            continue
        try:
            results.append((pid, started[k].fetch()))
        except HpcdistError as exc:
            errors[k] = exc
    if errors:
        found = [errors[k] for k in sorted(errors)]
        if single or (len(found) == 1 and f is not run_source and f is not define):
            raise found[0]
        raise CompositeException("everywhere failed", found)
    return results


def run_source(source: str, wanted: bool) -> Any:
    """Run source in `__main__`; return the value of its last expression, if wanted."""
    main = sys.modules["__main__"].__dict__
    tree = ast.parse(source, "<everywhere>")
    last = tree.body[-1] if tree.body and wanted else None
    if not isinstance(last, ast.Expr):
        exec(compile(tree, "<everywhere>", "exec"), main)
        return None
    tree.body.pop()
    exec(compile(tree, "<everywhere>", "exec"), main)
    return eval(compile(ast.Expression(last.value), "<everywhere>", "eval"), main)


def define(name: str, thing: Any) -> None:
    """Define something under its name in `__main__`."""
    setattr(sys.modules["__main__"], name, thing)


def replay(pid: int) -> None:
    """Tell a worker that has just joined what was said to be for later ones too."""
    for f, args in _later:
        remote_do(f, pid, *args)
