"""joblib's `Parallel`, and with it scikit-learn's `n_jobs`, on our workers."""

from __future__ import annotations

from functools import cache
from typing import Any

from hpcdist._integrations.executor import Executor
from hpcdist._public import public
from hpcdist._runtime.node import here


@public
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
    here.node.admit()
    from joblib import register_parallel_backend

    register_parallel_backend("hpcdist", _backend_class())


@cache
def _backend_class() -> type:
    """Make the backend; its base classes are joblib's, which is imported only when wanted."""
    from joblib._parallel_backends import AutoBatchingMixin, ParallelBackendBase

    return type("HpcdistBackend", (_Backend, AutoBatchingMixin, ParallelBackendBase), {})


class _Backend:
    """What joblib calls; see joblib's `ParallelBackendBase` for the contract."""

    supports_retrieve_callback = True
    default_n_jobs = -1

    nesting_level: int | None
    _workers: Executor | None = None  # so named in joblib's own backends

    def __init__(
        self,
        nesting_level: int | None = None,
        inner_max_num_threads: int | None = None,
        **backend_kwargs: Any,
    ) -> None:
        # joblib's own classes take what is given to `parallel_config` from 1.5 on only.
        super().__init__(  # type: ignore[call-arg]
            nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads
        )
        self.backend_kwargs = backend_kwargs

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Tell how many tasks run at once."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        number = len(here.node.members.workers())
        if n_jobs is None:
            return number
        if n_jobs < 0:
            return max(number + 1 + n_jobs, 1)
        return min(n_jobs, number)

    def configure(
        self, n_jobs: int = 1, parallel: Any = None, pool: Any = None, **others: Any
    ) -> int:
        """Get ready for one `Parallel`."""
        given = {**self.backend_kwargs, **others}
        self.parallel = parallel
        pool = pool if pool is not None else given.get("pool")
        count = self.effective_n_jobs(n_jobs)
        self._workers = Executor(
            pool,
            max_workers=count,
            initializer=given.get("initializer"),
            initargs=given.get("initargs", ()),
        )
        return count

    def submit(self, func: Any, callback: Any = None) -> Any:
        """Run one batch."""
        assert self._workers is not None
        future = self._workers.submit(func)
        if callback is not None:
            future.add_done_callback(callback)
        return future

    apply_async = submit  # its name before joblib 1.5

    def retrieve_result_callback(self, future: Any) -> Any:
        """Take the result of a batch, or its original exception."""
        return future.result()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Cancel what has not started: a task has failed."""
        if self._workers is None:
            return
        self._workers.shutdown(wait=False, cancel_futures=True)
        self._workers = None
        if ensure_ready:
            self.configure(n_jobs=self.parallel.n_jobs, parallel=self.parallel)

    def terminate(self) -> None:
        """End one `Parallel`; the workers stay."""
        if self._workers is not None:
            self._workers.shutdown(wait=False)
            self._workers = None
        self.reset_batch_stats()  # type: ignore[attr-defined]
