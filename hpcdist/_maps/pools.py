"""Pools: workers lent one at a time, first come, first served.

A pool lives on the process that made it, and is a reference everywhere else. Its owner serves it
on the progress side, so that a take from elsewhere works while a user's function hogs the owner;
a take that has to wait is an entry in a list and holds neither a thread nor a turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from hpcdist import _errors
from hpcdist._errors import ProcessExitedException
from hpcdist._frames import brief, cut
from hpcdist._hints import Hinting
from hpcdist._maps.pool_state import Pools, State, Taker
from hpcdist._public import public
from hpcdist._remote.calls import ANY, Lender, remote_do, remotecall_fetch
from hpcdist._remote.futures import Future
from hpcdist._runtime.node import Node, here
from hpcdist._runtime.references import Reference, References
from hpcdist._transport.contracts import Slot
from hpcdist._transport.interrupts import Section
from hpcdist._wire import codec
from hpcdist._wire.frames import FAILED, OUTCOME
from hpcdist._wire.messages import OperatePool

_EMPTY = "No active worker available in pool"
DEFAULT = (1, 0)  # the reference of the default pool: no process gives the number 0 to anything


# What multiprocessing.Pool and executors have, and how it is written here.
_ELSEWHERE = {
    "map": "pmap(f, xs, pool=pool)",
    "map_async": "imap(f, xs, pool=pool), or Executor(pool).map(f, xs)",
    "imap": "imap(f, xs, pool=pool)",
    "imap_unordered": "imap_unordered(f, xs, pool=pool)",
    "starmap": "pmap(f, xs, ys, pool=pool)",
    "apply": "remotecall_fetch(f, pool, x)",
    "apply_async": "remotecall(f, pool, x)",
    "submit": "remotecall(f, pool, x), or Executor(pool).submit(f, x)",
    **dict.fromkeys(("close", "join", "terminate", "shutdown"), "rmprocs(pool.workers())"),
    **dict.fromkeys(("append", "add"), "pool.push(pid)"),
    "get": "pool.take()",
}


@public
class AbstractWorkerPool(Hinting, Lender):
    """What can be named in place of a process in a call: it lends a worker for the call.

    A pool of your own defines at least `take`, `put` and `workers`.
    """

    _elsewhere = _ELSEWHERE
    tag = ""  # of its workers, if they were named by one

    def push(self, pid: int) -> None:
        """Add a worker."""
        raise NotImplementedError

    def put(self, pid: int) -> None:
        """Give back a worker that was taken."""
        raise NotImplementedError

    def take(self, timeout: float | None = None) -> int:
        """Wait for a free worker and take it."""
        raise NotImplementedError

    def wait(self, timeout: float | None = None) -> AbstractWorkerPool:
        """Wait until a worker is free."""
        raise NotImplementedError

    def isready(self) -> bool:
        """Tell whether a worker is free."""
        raise NotImplementedError

    def workers(self) -> list[int]:
        """List the members, busy or free."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.workers())

    def __bool__(self) -> bool:
        return True

    # What pmap uses

    def _usable(self) -> Sequence[int]:
        """List the workers a map may use now."""
        return self.workers()

    def _deserted(self) -> ProcessExitedException | None:
        """Make the error for a map that has no worker, if there were some and they died."""
        node = here.node
        deaths = [node.members.deserted(pid) for pid in self.workers() if pid != node.me]
        return next(filter(None, deaths), None)

    # What calls use

    def _named(self, f: Any, pid: int) -> Callee:
        """Return what to call on a worker for `f`."""
        return Callee(f)

    def _put_soon(self, pid: int, node: Node) -> None:
        """Give a worker back, on this process; called by the driver, so it may not wait."""
        node.turns.background(lambda: self.put(pid))

    def _hpcdist_lend(self, how: Callable[..., object], f: object, args: object, kw: object) -> Any:
        node = here.node
        with node.progress.interrupts.section():  # from the take to the put; its waits can end
            return self._lend_held(node, how, f, args, kw)

    def _lend_held(self, node: Node, how: Callable[..., Any], f: Any, args: Any, kw: Any) -> Any:
        pid = self.take()
        held = True
        try:
            g, first, called = self._named(f, pid)
            result = how(g, pid, *first, args, kw) if first else how(g, pid, *args, **kw)
            if how is remote_do:
                return None  # the worker is free again at once: nobody hears of the call's end
            if not isinstance(result, Future) or how is remotecall_fetch:
                called()
                return result
            held = not result._hook(lambda: self._ended(node, result, pid, called))
            if held:
                called()
            return result
        finally:
            if held:
                self.put(pid)

    def _ended(self, node: Node, future: Future[Any], pid: int, called: Callable[[], None]) -> None:
        if future.error is None:
            called()
        self._put_soon(pid, node)


def _nothing() -> None:
    return None


class Callee(NamedTuple):
    """What is called on a lent worker in place of the user's function."""

    f: Callable[..., Any]
    first: tuple[Any, ...] = ()  # arguments that come before the user's
    called: Callable[[], None] = _nothing  # what to do once it has been called


@public
class WorkerPool(Reference, AbstractWorkerPool):
    """Workers, lent to one call at a time in the order in which they are given back.

    Args:
        pids: The workers, by default all there are now; or a tag: then those that have it, also
            those that join later.

    Raises:
        ValueError: There is no such tag.

    Example:
        >>> import hpcdist
        >>> pool = hpcdist.WorkerPool([1])
        >>> hpcdist.remotecall_fetch(sum, pool, [1, 2, 3])
        6
        >>> pool.take()
        1
        >>> pool.isready()
        False
    """

    _pools: Pools  # of the process that has this handle
    _node: Node  # that process

    def __init__(self, pids: Iterable[int] | str | None = None) -> None:
        node = here.node
        node.start()
        node.admit()
        self.tag = pids if isinstance(pids, str) and pids != ANY else ""
        if self.tag:
            listed = node.members.tagged(self.tag)
        elif pids is None or isinstance(pids, str):
            listed = node.workers()
        else:
            listed = [int(p) for p in pids]
        self._begin(node, (node.me, node.me, next(node.ids)))
        self._own(listed)

    def _begin(self, node: Node, name: tuple[int, int, int]) -> None:
        """Become the handle of a pool on a process: where the pool is, and its reference."""
        self.where, self.whence, self.id = name
        self._node, self._pools = node, node.service(Pools)

    def _own(self, pids: Iterable[int], *, is_default: bool = False) -> None:
        """Make the pool itself, on this process."""
        with self._node.progress.interrupts.section():  # an interrupt lets go of what was made
            self._pools.own(self.key, pids, is_default=is_default, tag=self.tag)
            self._references = self._node.service(References)
            self._held = 1

    @classmethod
    def _received(cls, where: int, whence: int, ident: int, facts: object) -> WorkerPool:
        self = cls.__new__(cls)
        self._begin(here.node, (where, whence, ident))
        self.tag = str(facts or "")
        return self

    def _facts(self) -> str:
        return self.tag

    def __reduce__(self) -> Any:
        self._travels()
        return _handle, (type(self), self.where, self.whence, self.id, self.tag)

    def __del__(self) -> None:
        if self._held:
            self._let_go()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of process {self.where}, id {self.key}>"

    def push(self, pid: int) -> None:
        """Add a worker, which is free from the start."""
        self._do("push", int(pid))

    def put(self, pid: int) -> None:
        """Give back a worker that was taken; one that is no member is ignored."""
        node = self._node
        with node.progress.interrupts.section():
            self._put_soon(int(pid), node)
            if self.where != node.me:
                node.progress.nudge()

    def _put_soon(self, pid: int, node: Node) -> None:
        state = self._here()
        if state is not None:
            state.put(pid, node.me)
            return
        peer = node.peers.get(self.where)
        if peer is not None and peer.alive:
            peer.send(OperatePool(self.key, "put", pid))
            node.progress.soon()

    def take(self, timeout: float | None = None) -> int:
        """Take the worker that has been free for longest; wait for one, first come first served.

        Raises:
            RuntimeError: The pool has no member left.
            TimeoutError: None became free in time.
        """
        try:  # not @brief: CPython looks for signals after a call with `*`
            return self._wait_for("take", timeout)
        except BaseException as exc:
            cut(exc)
            raise

    @brief
    def wait(self, timeout: float | None = None) -> WorkerPool:
        """Wait until a worker is free, without taking it."""
        self._wait_for("wait", timeout)
        return self

    def isready(self) -> bool:
        """Tell whether a worker is free."""
        return bool(self._do("isready"))

    def workers(self) -> list[int]:
        """List the members, busy or free."""
        return list(self._do("workers"))

    def __len__(self) -> int:
        return int(self._do("size"))

    def _usable(self) -> Sequence[int]:
        return list(self._do("usable"))

    def _deserted(self) -> ProcessExitedException | None:
        members = self._node.members
        if self.key == DEFAULT and self._node.me == 1:
            return members.deserted()
        last = self._do("last_left")
        if self.tag and not self.workers():  # never process 1 instead
            return members.death(last or members.last_with(self.tag))
        return members.deserted(last) if last else None

    def _here(self) -> State | None:
        return self._pools.state_of(self.key) if self.where == self._node.me else None

    def _do(self, name: str, *args: object) -> Any:
        state = self._here()
        if state is not None:
            return getattr(state, name)(*args)
        message = OperatePool(self.key, name, args[0] if args else None)
        slot = self._node.request(self.where, message)
        self._node.wait(slot)
        return codec.loads(self._answer(slot))

    def _answer(self, slot: Slot) -> Any:
        if slot.error is not None:
            raise slot.failure()
        outcome, body, _ = slot.value
        if outcome & OUTCOME == FAILED:
            raise _errors.decode_error(bytes(body))
        return body

    def _wait_for(self, name: str, timeout: float | None) -> int:
        state = self._here()
        with self._node.progress.interrupts.section() as section:
            if state is not None:
                pid = self._wait_here(section, state, name, timeout)
            else:
                pid = self._wait_there(section, name, timeout)
        if pid == 0:
            raise RuntimeError(_EMPTY)
        return pid

    def _wait_here(self, section: Section, state: State, name: str, timeout: float | None) -> int:
        node, slot = self._node, Slot()

        def done(pid: int) -> None:
            slot.value = pid
            node.complete(slot)

        ident = next(node.ids)
        state.start(Taker(done, node.me, ident, name == "take"))
        try:
            node.wait(slot, timeout)
            section.decide()
        except BaseException:
            state.withdraw(node.me, ident, give_back=True)
            raise
        return int(slot.value)

    def _wait_there(self, section: Section, name: str, timeout: float | None) -> int:
        node = self._node
        slot = node.request(self.where, OperatePool(self.key, name, None))
        ident = slot.value
        try:
            try:
                node.wait(slot, timeout)
            except TimeoutError:
                if self._do("withdraw", ident):
                    raise
                node.wait(slot)
            section.decide()
        except BaseException:  # Ctrl-C: if a worker is on its way, it goes back
            node.pending.pop(ident, None)
            peer = node.peers.get(self.where)
            if peer is not None and peer.alive:
                peer.send(OperatePool(self.key, "abandon", ident))
                node.progress.nudge()
            raise
        return int.from_bytes(self._answer(slot), "little")


def named(pool: object) -> AbstractWorkerPool | None:
    """Return what `pool=` says: a pool, that of a tag; None for all workers."""
    if isinstance(pool, str):
        return None if pool == ANY else WorkerPool(pool)
    if pool is not None and not isinstance(pool, AbstractWorkerPool):
        raise TypeError(f"pool is a WorkerPool or the like, or a tag, not {pool!r}")
    return pool


def _handle(kind: type[WorkerPool], where: int, whence: int, ident: int, tag: str) -> WorkerPool:
    """Unpickle a pool."""
    found: WorkerPool = References.here().handle(kind, where, whence, ident, tag)
    return found
