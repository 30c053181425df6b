"""Julia's Distributed for Python, on MPI and batch clusters."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpcdist._errors import (
        ChannelClosed,
        CompositeException,
        HpcdistError,
        LaunchError,
        ProcessExitedException,
        RemoteException,
    )
    from hpcdist._integrations.executor import Executor
    from hpcdist._integrations.joblib import register_joblib
    from hpcdist._managers.base import ClusterManager, WorkerConfig, default_addprocs_params
    from hpcdist._managers.launch import Launch
    from hpcdist._managers.lifecycle import (
        Removal,
        addprocs,
        cluster,
        init,
        launch,
        rmprocs,
        shutdown,
    )
    from hpcdist._managers.local import LocalManager
    from hpcdist._managers.lowlevel import (
        cluster_cookie,
        init_worker,
        process_messages,
        start_worker,
        worker_id_from_socket,
    )
    from hpcdist._managers.mpi import MPIManager
    from hpcdist._managers.views import (
        myid,
        nprocs,
        nworkers,
        procs,
        status,
        workers,
    )
    from hpcdist._monitor.status import WorkerStatus
    from hpcdist._parallel.everywhere import everywhere
    from hpcdist._parallel.loops import distributed
    from hpcdist._parallel.pmap import ExponentialBackOff, imap, imap_unordered, pmap
    from hpcdist._parallel.pools import (
        AbstractWorkerPool,
        CachingPool,
        WorkerPool,
        clear,
        default_worker_pool,
        remote,
    )
    from hpcdist._parallel.reductions import reduce
    from hpcdist._parallel.spmd import comm, spmd
    from hpcdist._parallel.values import RemoteValue, bcast, gather, scatter
    from hpcdist._remote.calls import (
        ANY,
        fetchany,
        fetchfrom,
        interrupt,
        remote_do,
        remotecall,
        remotecall_fetch,
        remotecall_wait,
        sleep,
        spawn,
        spawnat,
    )
    from hpcdist._remote.channels import Channel
    from hpcdist._remote.futures import Future
    from hpcdist._remote.operations import close, fetch, isopen, isready, put, take, wait
    from hpcdist._remote.remote_channels import RemoteChannel, channel_from_id, remoteref_id

# Where each public name lives. Names are loaded when first used, so that a keeper or a worker
# does not pay for what it never touches.
_HOMES = {
    "_errors": (
        "ChannelClosed CompositeException HpcdistError LaunchError ProcessExitedException "
        "RemoteException"
    ),
    "_integrations.executor": "Executor",
    "_integrations.joblib": "register_joblib",
    "_managers.base": "ClusterManager WorkerConfig default_addprocs_params",
    "_managers.launch": "Launch",
    "_managers.lifecycle": "Removal addprocs cluster init launch rmprocs shutdown",
    "_managers.local": "LocalManager",
    "_managers.lowlevel": (
        "cluster_cookie init_worker process_messages start_worker worker_id_from_socket"
    ),
    "_managers.mpi": "MPIManager",
    "_managers.views": "myid nprocs nworkers procs status workers",
    "_monitor.status": "WorkerStatus",
    "_parallel.everywhere": "everywhere",
    "_parallel.loops": "distributed",
    "_parallel.pmap": "ExponentialBackOff imap imap_unordered pmap",
    "_parallel.pools": (
        "AbstractWorkerPool CachingPool WorkerPool clear default_worker_pool remote"
    ),
    "_parallel.reductions": "reduce",
    "_parallel.spmd": "comm spmd",
    "_parallel.values": "RemoteValue bcast gather scatter",
    "_remote.calls": (
        "ANY fetchany fetchfrom interrupt remote_do remotecall remotecall_fetch remotecall_wait "
        "sleep spawn spawnat"
    ),
    "_remote.channels": "Channel",
    "_remote.futures": "Future",
    "_remote.operations": "close fetch isopen isready put take wait",
    "_remote.remote_channels": "RemoteChannel channel_from_id remoteref_id",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

# What a star import leaves out: everyday names that it would shadow.
_SHADOWING = {
    "clear",
    "close",
    "cluster",
    "comm",
    "init",
    "launch",
    "reduce",
    "shutdown",
    "sleep",
    "status",
    "wait",
}

__version__ = "0.1.0"
__all__ = sorted(set(_HOME) - _SHADOWING)  # pyright: ignore


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'hpcdist' has no attribute {name!r}")
    import_module("hpcdist._managers.lifecycle")
    value = getattr(import_module(f"hpcdist.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
