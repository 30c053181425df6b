"""hpcdist's adapter for the side-by-side benchmark of its neighbours.

Copy it into the harness's `adapters/` folder. Four systems: under `mpiexec` and by `addprocs`, with
MPICH and with Open MPI. The two environments are `ours-mpich` and `ours-openmpi`.
"""

from __future__ import annotations

from typing import Any

import wl

from .base import Base

_OPENMPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_btl": "sm,self,tcp",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}
SYSTEMS: dict[str, dict[str, Any]] = {}
for _mpi, _env in (("mpich", {}), ("openmpi", _OPENMPI)):
    _common = {"venv": f"ours-{_mpi}", "env": _env}
    SYSTEMS[f"hpcdist-{_mpi}"] = {**_common, "launch": ["{py}"]}
    SYSTEMS[f"hpcdist-mpirun-{_mpi}"] = {
        **_common,
        "launch": ["{bin}/mpiexec", "-n", "{n1}", "{py}"],
        "opts": {"inside": True},
    }


class A(Base):
    """The harness's verbs, in ours."""

    addressed = True
    default_map = 'pmap, batch_size="auto"'
    bcast_how = "bcast, one copy a host"
    reduce_how = "reduce up a tree"

    def start(self, n: int) -> None:
        import hpcdist

        self.h = hpcdist
        if self.opts.get("inside"):
            hpcdist.init()
        else:
            hpcdist.addprocs(n)
        self.n = n
        self.workers = hpcdist.workers()

    def entry(self, main: Any) -> None:
        if self.opts.get("inside"):
            import hpcdist

            hpcdist.init()  # the other ranks stay in here
        main()

    def submit(self, i: int, f: Any, *args: Any) -> Any:
        return self.h.remotecall(f, self.workers[i], *args)

    def call(self, i: int, f: Any, *args: Any) -> Any:
        return self.h.remotecall_fetch(f, self.workers[i], *args)

    def gather(self, futures: Any) -> list[Any]:
        return [future.fetch() for future in futures]

    def map(self, f: Any, items: Any, chunksize: int | None = None) -> list[Any]:
        return self.h.pmap(f, items, batch_size="auto" if chunksize is None else chunksize)

    def bcast(self, obj: Any) -> set[int]:
        with self.h.bcast(obj) as value:
            held = [self.h.remotecall(wl.hold, pid, value) for pid in self.workers]
            return {future.fetch() for future in held}

    def reduce(self, n: int) -> Any:
        import operator

        return self.h.reduce(operator.add, wl.local_array, n)

    def mapreduce(self, f: Any, op: Any, items: Any) -> Any:
        return self.h.distributed(items, op)(f)

    def victims(self) -> list[int]:
        living = self.h.workers()
        return [self.h.remotecall_fetch(wl.pid, pid) for pid in living]

    def stop(self) -> None:
        self.h.shutdown()
