"""joblib's `Parallel`, and with it scikit-learn's `n_jobs`, on our workers."""

from __future__ import annotations

from typing import Any

from hpcdist._integrations.executor import Executor
from hpcdist._runtime.node import node


def register_joblib() -> None:
    """Make the backend "hpcdist" known to joblib.

    `with joblib.parallel_config("hpcdist"):` then runs every `Parallel` in the block on the
    workers; `n_jobs=-1`, the default there, means all of them. A `Parallel` inside a task runs on
    threads of its worker, one inside that in sequence.

    Raises:
        ImportError: joblib is not installed.

    Example:
        >>> import hpcdist, joblib
        >>> pids = hpcdist.addprocs(2)
        >>> hpcdist.register_joblib()
        >>> with joblib.parallel_config("hpcdist"):
        ...     joblib.Parallel()(joblib.delayed(pow)(k, 2) for k in range(4))
        [0, 1, 4, 9]
        >>> hpcdist.shutdown()
    """
    from joblib import register_parallel_backend

    register_parallel_backend("hpcdist", _backend_class())


_made: type | None = None


def _backend_class() -> type:
    """Make the backend; its base classes are joblib's, which is imported only when wanted."""
    global _made
    if _made is None:
        from joblib._parallel_backends import AutoBatchingMixin, ParallelBackendBase

        members = {name: value for name, value in vars(_Backend).items() if name not in _OF_A_CLASS}
        _made = type("HpcdistBackend", (AutoBatchingMixin, ParallelBackendBase), members)
    return _made


_OF_A_CLASS = ("__dict__", "__weakref__", "__module__", "__qualname__")


class _Backend:
    """What joblib calls; see joblib's `ParallelBackendBase` for the contract."""

    supports_retrieve_callback = True
    default_n_jobs = -1

    nesting_level: int | None
    _executor: Executor | None = None

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Tell how many tasks run at once."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        number = len(node.members.workers())
        if n_jobs is None:
            return number
        if n_jobs < 0:
            return max(number + 1 + n_jobs, 1)
        return min(n_jobs, number)

    def configure(
        self, n_jobs: int = 1, parallel: Any = None, pool: Any = None, **others: Any
    ) -> int:
        """Get ready for one `Parallel`."""
        given = getattr(self, "backend_kwargs", {})
        self.parallel = parallel
        pool = pool if pool is not None else given.get("pool")
        count = self.effective_n_jobs(n_jobs)
        self._executor = Executor(pool, max_workers=count)
        return count

    def submit(self, func: Any, callback: Any = None) -> Any:
        """Run one batch."""
        assert self._executor is not None
        future = self._executor.submit(func)
        if callback is not None:
            future.add_done_callback(callback)
        return future

    apply_async = submit  # its name before joblib 1.5

    def retrieve_result_callback(self, future: Any) -> Any:
        """Take the result of a batch, or its original exception."""
        return future.result()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Cancel what has not started: a task has failed."""
        if self._executor is None:
            return
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._executor = None
        if ensure_ready:
            self.configure(n_jobs=self.parallel.n_jobs, parallel=self.parallel)

    def terminate(self) -> None:
        """End one `Parallel`; the workers stay."""
        if self._executor is not None:
            self._executor.shutdown(wait=False)
            self._executor = None
        self.reset_batch_stats()  # type: ignore[attr-defined]
