"""Code and functions on every process at once."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import CodeType
from typing import Any, TypeVar, overload

from hpcdist import _errors
from hpcdist._collective.tree_calls import Failure, TreeCalls
from hpcdist._errors import CompositeException, HpcdistError
from hpcdist._frames import brief
from hpcdist._hints import suggesting
from hpcdist._public import public
from hpcdist._remote.calls import Calls
from hpcdist._runtime.node import Node, Service
from hpcdist._typing import Pids

R = TypeVar("R")
Thing = TypeVar("Thing")


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

    @overload
    def __call__(self, what: str, /, *, pids: int, later: bool = False) -> Any: ...
    @overload
    def __call__(self, what: str, /, *, pids: Pids = None, later: bool = False) -> None: ...
    @overload
    def __call__(self, what: Thing, /, *, pids: Pids = None, later: bool = False) -> Thing: ...
    @overload
    def __call__(
        self, what: None = None, /, *, pids: Pids = None, later: bool = False
    ) -> Callable[[Thing], Thing]: ...
    @brief
    @suggesting
    def __call__(self, what: Any = None, /, *, pids: Pids = None, later: bool = False) -> Any:
        """Run source, or define a function or class, on every process.

        Args:
            what: Source text; or a function or class (then this is a decorator).
            pids: One pid (the value of the last expression is returned), or several; default all.
            later: Also on workers that join later.
        """
        if what is None:
            return lambda thing: self(thing, pids=pids, later=later)
        return CodeForAll.here().everywhere(what, pids, later)

    @brief
    def call(
        self, f: Callable[..., R], /, *args: Any, pids: Pids = None, **kw: Any
    ) -> dict[int, R]:
        """Call a function on every process and return its results by pid."""
        code = CodeForAll.here()
        return dict(code.gather(f, args, kw, code.listed(pids)))

    def __repr__(self) -> str:
        return "<hpcdist.everywhere>"


everywhere = public(Everywhere())


class CodeForAll(Service):
    """What this process runs on all others, and the code that workers get which join later."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._calls = node.service(Calls)
        self._tree_calls = node.service(TreeCalls)
        self._later: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def everywhere(self, what: Any, pids: Pids, later: bool) -> Any:
        """Do what the public `everywhere` says."""
        if isinstance(what, str):
            _compiled(what)  # what does not compile is not sent
            single = isinstance(pids, int) and not isinstance(pids, bool)
            return self._run(run_source, (what, single), pids, later)
        self._run(define, (what.__name__, what), pids, later)
        return what

    def _run(
        self, f: Callable[..., object], args: tuple[object, ...], pids: Pids, later: bool
    ) -> Any:
        single = isinstance(pids, int) and not isinstance(pids, bool)
        if later:
            self._later.append((f, args))
        results = self.gather(f, args, {}, self.listed(pids), single)
        return results[0][1] if single else None

    def replay(self, pid: int) -> None:
        """Tell a worker that has just joined what was said to be for later ones too."""
        for f, args in self._later:
            self._calls.tell(f, pid, args, {})

    def listed(self, pids: Pids) -> list[int]:
        """List the processes a user named; all, if none."""
        if pids is None:
            self.node.start()
            self.node.admit()
            return self.node.members.procs()
        if isinstance(pids, int):
            return [pids]
        listed = [int(p) for p in pids]
        return sorted(listed, key=lambda p: p != 1)  # pid 1 first, the others as named

    def gather(
        self,
        f: Callable[..., object],
        args: object,
        kw: object,
        pids: Sequence[int],
        single: bool = False,
    ) -> list[tuple[int, Any]]:
        """Call on all, remote ones first, so that our own share does not delay the sending."""
        me = self.node.me
        reachable = []
        failures: dict[int, Exception] = {}
        for k, pid in enumerate(pids):
            try:
                if pid != me:
                    self.node.peer(pid)
                    reachable.append(k)
            except HpcdistError as exc:
                failures[k] = exc
        results: dict[int, Any] = {}
        under_way = None
        if reachable:
            under_way = self._tree_calls.call(f, args, kw, [pids[k] for k in reachable])
        for k, pid in enumerate(pids):
            if pid == me:
                results[k] = self._call_here(f, args, kw)
        if under_way is not None:
            results.update(zip(reachable, under_way.results(), strict=True))
        failures.update((k, r.error) for k, r in results.items() if type(r) is Failure)
        if failures:
            found = list(failures.values())
            try:
                if single or (len(found) == 1 and f is not run_source and f is not define):
                    raise found[0]
                raise CompositeException.of_processes("everywhere failed", found)
            finally:
                del found, failures, results  # this frame is one of their traceback, and has `args`
        return [(pid, results[k]) for k, pid in enumerate(pids)]

    def _call_here(self, f: Callable[..., Any], args: Any, kw: Any) -> Any:
        """Do our own share on this very thread: nothing is gained by handing it to another."""
        me = self.node.me
        self.node.admit()
        if f is not run_source and f is not define:
            try:
                return self._calls.remotecall(f, me, args, kw).fetch()
            except HpcdistError as exc:
                return Failure(exc)
        try:
            return f(*args, **kw)
        except (Exception, SystemExit) as exc:
            return Failure(_errors.decode_error(_errors.encode_error(exc, me)))


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
    """Compile source; the same text is often run again, whichever process of ours runs it."""
    return compile(source, "<everywhere>", "exec")


def define(name: str, thing: object) -> None:
    """Define something under its name in `__main__`."""
    setattr(sys.modules["__main__"], name, thing)
