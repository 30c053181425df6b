"""Pools: workers lent one at a time, first come, first served.

A pool lives on the process that made it, and is a reference everywhere else. Its owner serves it
on the progress side, so that a take from elsewhere works while a user's function hogs the owner;
a take that has to wait is an entry in a list and holds neither a thread nor a turn.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hpcdist import _errors
from hpcdist._parallel import batches
from hpcdist._parallel.batches import Token
from hpcdist._parallel.lending import State, Taker, own, state_of
from hpcdist._remote.calls import Lender, remote_do, remotecall_fetch
from hpcdist._remote.futures import Future
from hpcdist._runtime import references
from hpcdist._runtime.controls import FORGET, POOL
from hpcdist._runtime.node import node, pack_head
from hpcdist._runtime.references import Reference
from hpcdist._transport.contracts import Slot
from hpcdist._wire import codec
from hpcdist._wire.frames import FAILED, OUTCOME

_EMPTY = "No active worker available in pool"
_DEFAULT = (1, 0)  # the reference of the default pool: no process gives the number 0 to anything


class AbstractWorkerPool(Lender):
    """What can be named in place of a process in a call: it lends a worker for the call.

    A pool of your own defines at least `take`, `put` and `workers`.
    """

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

    # What calls use

    def _named(self, f: Any, pid: int) -> tuple[Any, tuple[Any, ...], Callable[[], None]]:
        """Say what to call on a worker for `f`: a function, arguments that come first, and what
        to do once it has been called."""
        return f, (), _nothing

    def _put_soon(self, pid: int) -> None:
        """Give a worker back; called by the driver, so it may not wait."""
        node.turns.background(lambda: self.put(pid))

    def _hpcdist_lend(self, how: Callable[..., Any], f: Any, args: Any, kw: Any) -> Any:
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
            held = not result._hook(lambda: self._ended(result, pid, called))
            if held:
                called()
            return result
        finally:
            if held:
                self.put(pid)

    def _ended(self, future: Future, pid: int, called: Callable[[], None]) -> None:
        if future.error is None:
            called()
        self._put_soon(pid)


def _nothing() -> None:
    return None


class WorkerPool(Reference, AbstractWorkerPool):
    """Workers, lent to one call at a time in the order in which they are given back.

    Args:
        pids: The workers; by default all there are now.

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

    def __init__(self, pids: Iterable[int] | None = None) -> None:
        node.start()
        if node.refusal:
            raise RuntimeError(node.refusal)
        listed = node.members.workers() if pids is None else [int(p) for p in pids]
        self.where = self.whence = node.me
        self.id = next(node.ids)
        own(self.key, State(listed))
        self._held = 1
        self._begin()

    def _begin(self) -> None:
        pass

    @classmethod
    def _received(cls, where: int, whence: int, ident: int, facts: Any) -> WorkerPool:
        self = cls.__new__(cls)
        self.where, self.whence, self.id = where, whence, ident
        self._begin()
        return self

    def _facts(self) -> None:
        return None

    def __reduce__(self) -> Any:
        self._travels()
        return _handle, (type(self), self.where, self.whence, self.id)

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
        state = self._here()
        if state is not None:
            state.put(int(pid), node.me)
        else:
            self._put_soon(int(pid))
            node.progress.nudge()

    def _put_soon(self, pid: int) -> None:
        state = self._here()
        if state is not None:
            state.put(pid, node.me)
            return
        peer = node.peers.get(self.where)
        if peer is not None and peer.alive:
            peer.control(POOL, 0, pack_head((self.key, "put", pid)))
            node.progress.soon()

    def take(self, timeout: float | None = None) -> int:
        """Take the worker that has been free for longest; wait for one, first come first served.

        Raises:
            RuntimeError: The pool has no member left.
            TimeoutError: None became free in time.
        """
        return self._wait_for("take", timeout)

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

    def _here(self) -> State | None:
        return state_of(self.key) if self.where == node.me else None

    def _do(self, name: str, *args: Any) -> Any:
        state = self._here()
        if state is not None:
            return getattr(state, name)(*args)
        slot = node.request(self.where, POOL, (self.key, name, args[0] if args else None))
        node.wait(slot)
        return codec.loads(self._answer(slot))

    def _answer(self, slot: Any) -> Any:
        if slot.error is not None:
            raise slot.error
        outcome, body, _ = slot.value
        if outcome & OUTCOME == FAILED:
            raise _errors.decode_error(bytes(body))
        return body

    def _wait_for(self, name: str, timeout: float | None) -> int:
        state = self._here()
        pid = self._wait_here(state, name, timeout) if state else self._wait_there(name, timeout)
        if pid == 0:
            raise RuntimeError(_EMPTY)
        return pid

    def _wait_here(self, state: State, name: str, timeout: float | None) -> int:
        slot = Slot()

        def done(pid: int) -> None:
            slot.value = pid
            node.complete(slot)

        ident = next(node.ids)
        state.start(Taker(done, node.me, ident, name == "take"))
        try:
            node.wait(slot, timeout)
        except BaseException:
            state.withdraw(node.me, ident, give_back=True)
            raise
        return int(slot.value)

    def _wait_there(self, name: str, timeout: float | None) -> int:
        slot = node.request(self.where, POOL, (self.key, name, None))
        ident = slot.value
        try:
            node.wait(slot, timeout)
        except TimeoutError:
            withdrawn = self._do("withdraw", ident)
            if withdrawn:
                node.pending.pop(ident, None)
                raise
            node.wait(slot)
        except BaseException:  # Ctrl-C: if a worker is on its way, it goes back
            node.pending.pop(ident, None)
            peer = node.peers.get(self.where)
            if peer is not None and peer.alive:
                peer.control(POOL, 0, pack_head((self.key, "abandon", ident)))
                node.progress.nudge()
            raise
        return int.from_bytes(self._answer(slot), "little")


def _handle(kind: type[WorkerPool], where: int, whence: int, ident: int) -> WorkerPool:
    """Unpickle a pool."""
    found: WorkerPool = references.handle(kind, where, whence, ident, None)
    return found


class CachingPool(WorkerPool):
    """A pool that sends a function once to each worker, with the data it has captured.

    A function is known by its identity: the same object is not sent again, whatever has become
    of its data meanwhile; a new closure is another function. `clear` drops them all.

    Example:
        >>> import hpcdist
        >>> data = list(range(1000))
        >>> pool = hpcdist.CachingPool([1])
        >>> total = lambda n: sum(data[:n])
        >>> [hpcdist.remotecall_fetch(total, pool, n) for n in (1, 2, 3)]
        [0, 1, 3]
        >>> hpcdist.clear(pool)
    """

    def _begin(self) -> None:
        self._known: dict[Any, tuple[Any, Token, set[int]]] = {}
        weakref.finalize(self, _unused.append, self._known).atexit = False

    def _entry(self, *things: Any) -> tuple[Token, set[int]]:
        """Name what is sent once, and say which workers have it."""
        key = tuple(map(id, things))
        found = self._known.get(key)
        if found is None:
            # The things themselves are kept: their ids must not go to others.
            found = self._known[key] = (things, (node.me, next(node.ids)), set())
        return found[1], found[2]

    def _named(self, f: Any, pid: int) -> tuple[Any, tuple[Any, ...], Callable[[], None]]:
        if pid == node.me or not callable(f):
            return f, (), _nothing
        token, told = self._entry(f)
        if pid in told:
            return batches.call_kept, (token,), _nothing
        return batches.call_first, (token, f), lambda: told.add(pid)

    def _clear(self) -> None:
        known, self._known = self._known, {}
        weakref.finalize(self, _unused.append, self._known).atexit = False
        _drop(known)
        node.progress.nudge()


_unused: list[dict[Any, tuple[Any, Token, set[int]]]] = []  # what pools that are gone have sent


def _drop(known: dict[Any, tuple[Any, Token, set[int]]]) -> None:
    """Let workers drop the functions they were sent."""
    by_worker: dict[int, list[Token]] = {}
    for _, token, told in known.values():
        for pid in told:
            by_worker.setdefault(pid, []).append(token)
    for pid, tokens in by_worker.items():
        peer = node.peers.get(pid)
        if peer is not None and peer.alive:
            peer.control(FORGET, 0, pack_head((tokens, [])))


def _before_sleep() -> None:
    while _unused:
        _drop(_unused.pop())


node.progress.before_sleep.append(_before_sleep)


def clear(pool: Any, /) -> None:
    """Drop every function a CachingPool has sent to its workers.

    Example:
        >>> import hpcdist
        >>> hpcdist.clear(hpcdist.CachingPool([1]))
    """
    if not isinstance(pool, CachingPool):
        raise TypeError(f"only a CachingPool keeps functions to clear, not {pool!r}")
    pool._clear()


_replaced: AbstractWorkerPool | None = None  # what a user has put in the default pool's place
_default: WorkerPool | None = None


def _on_join(pid: int) -> None:
    if node.me == 1:
        entry = state_of(_DEFAULT)
        if entry is not None:
            entry.push(pid)
        if _replaced is not None:
            remote_do(_replace_here, pid, _replaced)


node.on_join.append(_on_join)


def default_worker_pool(pool: AbstractWorkerPool | None = None, /) -> AbstractWorkerPool:
    """Return the pool of all workers, which those that join later enter by themselves.

    Args:
        pool: Let this one be the default from now on, on every process.

    Example:
        >>> import hpcdist
        >>> hpcdist.default_worker_pool().workers() == hpcdist.workers()
        True
    """
    node.start()
    if node.refusal:
        raise RuntimeError(node.refusal)
    if pool is not None:
        if not isinstance(pool, AbstractWorkerPool):
            raise TypeError(f"the default pool must be a pool, not {pool!r}")
        if node.me == 1:
            _replace(pool)
        else:
            remotecall_fetch(_replace, 1, pool)
            _replace_here(pool)
        return pool
    if _replaced is not None:
        return _replaced
    if node.me == 1:
        return _default_here()
    found: AbstractWorkerPool = remotecall_fetch(default_worker_pool, 1)
    return found


def _default_here() -> WorkerPool:
    global _default
    if _default is None:
        made: WorkerPool = WorkerPool._received(1, *_DEFAULT, None)
        made._held = 1
        own(_DEFAULT, State(sorted(node.members.living), is_default=True))
        for pid in node.members.living:  # one that joined while we were here
            made.push(pid)
        _default = made
    return _default


def _replace(pool: AbstractWorkerPool) -> None:
    _replace_here(pool)
    for pid in list(node.members.living):
        remote_do(_replace_here, pid, pool)


def _replace_here(pool: AbstractWorkerPool) -> None:
    global _replaced
    _replaced = None if pool is _default or getattr(pool, "key", None) == _DEFAULT else pool


def replaced() -> AbstractWorkerPool | None:
    """Return what a user has put in the default pool's place, if anything."""
    return _replaced


def remote(f: Callable[..., Any], pool: AbstractWorkerPool | None = None, /) -> Callable[..., Any]:
    """Make a function that runs `f` on a worker of a pool and returns its result.

    Args:
        f: The function.
        pool: Where; by default the default pool, as it is when the function is called.

    Example:
        >>> import hpcdist
        >>> hpcdist.remote(max)(3, 7, 5)
        7
    """
    if not callable(f):
        raise TypeError(f"a function is needed to call, not {f!r}")

    def remotely(*args: Any, **kw: Any) -> Any:
        where = default_worker_pool() if pool is None else pool
        return remotecall_fetch(f, where, *args, **kw)

    remotely.__name__ = getattr(f, "__name__", "remotely")
    return remotely
