"""The default pool: all workers, or what a user has put in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, overload

from hpcdist._frames import brief
from hpcdist._maps.pool_state import Pools
from hpcdist._maps.pools import DEFAULT, AbstractWorkerPool, WorkerPool
from hpcdist._public import public
from hpcdist._remote.calls import Calls
from hpcdist._runtime.node import Node, Service, here
from hpcdist._typing import Async

R = TypeVar("R")


class DefaultPool(Service):
    """The default pool, as one process knows it."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._pools = node.service(Pools)
        self._calls = node.service(Calls)
        self.replaced: AbstractWorkerPool | None = None  # what a user has put in its place
        self._made: WorkerPool | None = None  # on process 1, which owns it
        node.on_join.append(self._on_join)

    def get(self) -> AbstractWorkerPool:
        """Return the pool that is the default now."""
        self.node.start()
        self.node.admit()
        if self.replaced is not None:
            return self.replaced
        if self.node.me == 1:
            return self._of_all()
        found: AbstractWorkerPool = self._calls.remotecall_fetch(default_worker_pool, 1, (), {})
        return found

    def set(self, pool: AbstractWorkerPool) -> AbstractWorkerPool:
        """Let a pool be the default from now on, on every process."""
        self.node.start()
        self.node.admit()
        if not isinstance(pool, AbstractWorkerPool):
            raise TypeError(f"the default pool must be a pool, not {pool!r}")
        if self.node.me == 1:
            self.replace_everywhere(pool)
        else:
            self._calls.remotecall_fetch(_replace_everywhere, 1, (pool,), {})
            self.replace(pool)
        return pool

    def _of_all(self) -> WorkerPool:
        """Return the pool of all workers, on process 1."""
        if self._made is None:
            made: WorkerPool = WorkerPool._received(1, *DEFAULT, None)
            members = self.node.members
            made._own(sorted(members.living), is_default=True)
            for pid in list(members.living):  # one that joined while we were here
                made.push(pid)
            self._made = made
        return self._made

    def replace(self, pool: AbstractWorkerPool) -> None:
        """Let a pool take its place; or none any more, if it is the default pool itself."""
        self.replaced = None if is_default(pool) else pool

    def replace_everywhere(self, pool: AbstractWorkerPool) -> None:
        """Let a pool take its place on every process. Called on process 1."""
        self.replace(pool)
        for pid in list(self.node.members.living):
            self._calls.tell(_replace, pid, (pool,), {})

    def _on_join(self, pid: int) -> None:
        if self.node.me != 1:
            return
        state = self._pools.state_of(DEFAULT)
        if state is not None:
            state.push(pid)
        if self.replaced is not None:
            self._calls.tell(_replace, pid, (self.replaced,), {})


def _replace(pool: AbstractWorkerPool) -> None:
    DefaultPool.here().replace(pool)


def _replace_everywhere(pool: AbstractWorkerPool) -> None:
    DefaultPool.here().replace_everywhere(pool)


@public
def default_worker_pool(pool: AbstractWorkerPool | None = None, /) -> AbstractWorkerPool:
    """Return the pool of all workers, which those that join later enter by themselves.

    Args:
        pool: Let this one be the default from now on, on every process.

    Example:
        >>> import hpcdist
        >>> hpcdist.default_worker_pool().workers() == hpcdist.workers()
        True
    """
    default = DefaultPool.here()
    return default.get() if pool is None else default.set(pool)


def is_default(pool: AbstractWorkerPool | None) -> bool:
    """Tell whether a pool has all workers, also those that join later. None has."""
    return pool is None or getattr(pool, "key", None) == DEFAULT


@overload
def remote(f: Async[R], pool: AbstractWorkerPool | str | None = None, /) -> Callable[..., R]: ...
@overload
def remote(
    f: Callable[..., R], pool: AbstractWorkerPool | str | None = None, /
) -> Callable[..., R]: ...
@public
def remote(
    f: Callable[..., Any], pool: AbstractWorkerPool | str | None = None, /
) -> Callable[..., Any]:
    """Make a function that runs `f` on a worker of a pool and returns its result.

    Args:
        f: The function.
        pool: Where: a pool, or a tag; by default the default pool, as it is at each call.

    Example:
        >>> import hpcdist
        >>> hpcdist.remote(max)(3, 7, 5)
        7
    """
    here.node.admit()
    if not callable(f):
        raise TypeError(f"a function is needed to call, not {f!r}")

    @brief
    def remotely(*args: object, **kw: object) -> Any:
        where = default_worker_pool() if pool is None else pool
        return Calls.here().remotecall_fetch(f, where, args, kw)

    remotely.__name__ = getattr(f, "__name__", "remotely")
    return remotely
