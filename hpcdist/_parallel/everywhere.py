"""Code and functions on every process at once."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache
from types import CodeType
from typing import Any

from hpcdist import _errors
from hpcdist._errors import CompositeException, HpcdistError
from hpcdist._parallel.calling import CallOnMany, Failure
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
            _compiled(what)  # what does not compile is not sent
            single = isinstance(pids, int) and not isinstance(pids, bool)
            return self._run(run_source, (what, single), pids, later)
        self._run(define, (what.__name__, what), pids, later)
        return what

    def call(
        self, f: Callable[..., Any], /, *args: Any, pids: Any = None, **kw: Any
    ) -> dict[int, Any]:
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
    reachable = []
    failures: dict[int, Exception] = {}
    for k, pid in enumerate(pids):
        try:
            if pid != node.me:
                node.peer(pid)
                reachable.append(k)
        except HpcdistError as exc:
            failures[k] = exc
    results: dict[int, Any] = {}
    under_way = CallOnMany(f, args, kw, [pids[k] for k in reachable]) if reachable else None
    for k, pid in enumerate(pids):
        if pid == node.me:
            results[k] = _call_here(f, args, kw)
    if under_way is not None:
        results.update(zip(reachable, under_way.results(), strict=True))
    failures.update((k, r.error) for k, r in results.items() if type(r) is Failure)
    if failures:
        found = [failures[k] for k in sorted(failures)]
        if single or (len(found) == 1 and f is not run_source and f is not define):
            raise found[0]
        raise CompositeException("everywhere failed", found)
    return [(pid, results[k]) for k, pid in enumerate(pids)]


def _call_here(f: Callable[..., Any], args: Any, kw: Any) -> Any:
    """Do our own share on this very thread: nothing is gained by handing it to another."""
    if node.refusal:
        raise RuntimeError(node.refusal)
    if f is not run_source and f is not define:
        try:
            return remotecall(f, node.me, *args, **kw).fetch()
        except HpcdistError as exc:
            return Failure(exc)
    try:
        return f(*args, **kw)
    except (Exception, SystemExit) as exc:
        return Failure(_errors.decode_error(_errors.encode_error(exc, node.me)))


def run_source(source: str, wanted: bool) -> Any:
    """Run source in `__main__`; return the value of its last expression, if wanted."""
    main = sys.modules["__main__"].__dict__
    if not wanted:
        exec(_compiled(source), main)
        return None
    tree = ast.parse(source, "<everywhere>")
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, ast.Expr):
        exec(compile(tree, "<everywhere>", "exec"), main)
        return None
    tree.body.pop()
    exec(compile(tree, "<everywhere>", "exec"), main)
    return eval(compile(ast.Expression(last.value), "<everywhere>", "eval"), main)


@lru_cache(64)
def _compiled(source: str) -> CodeType:
    """Compile source; the same text is often run again."""
    return compile(source, "<everywhere>", "exec")


def define(name: str, thing: Any) -> None:
    """Define something under its name in `__main__`."""
    setattr(sys.modules["__main__"], name, thing)


def replay(pid: int) -> None:
    """Tell a worker that has just joined what was said to be for later ones too."""
    for f, args in _later:
        remote_do(f, pid, *args)
