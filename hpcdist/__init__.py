"""Julia's Distributed for Python, on MPI and batch clusters."""

from __future__ import annotations

TYPE_CHECKING = False  # `typing` itself costs a worker more than all of this module
if TYPE_CHECKING:
    from typing import Any

    from hpcdist._errors import ChannelClosed as ChannelClosed
    from hpcdist._errors import CompositeException as CompositeException
    from hpcdist._errors import HpcdistError as HpcdistError
    from hpcdist._errors import LaunchError as LaunchError
    from hpcdist._errors import ProcessExitedException as ProcessExitedException
    from hpcdist._errors import RemoteException as RemoteException
    from hpcdist._integrations.executor import Executor as Executor
    from hpcdist._integrations.joblib import register_joblib as register_joblib
    from hpcdist._managers.base import ClusterManager as ClusterManager
    from hpcdist._managers.base import WorkerConfig as WorkerConfig
    from hpcdist._managers.base import default_addprocs_params as default_addprocs_params
    from hpcdist._managers.batch.lsf import LSFManager as LSFManager
    from hpcdist._managers.batch.pbs import PBSManager as PBSManager
    from hpcdist._managers.batch.sge import SGEManager as SGEManager
    from hpcdist._managers.batch.slurm import SlurmManager as SlurmManager
    from hpcdist._managers.elastic import ElasticManager as ElasticManager
    from hpcdist._managers.launch import Launch as Launch
    from hpcdist._managers.lifecycle import Removal as Removal
    from hpcdist._managers.lifecycle import addprocs as addprocs
    from hpcdist._managers.lifecycle import cluster as cluster
    from hpcdist._managers.lifecycle import init as init
    from hpcdist._managers.lifecycle import launch as launch
    from hpcdist._managers.lifecycle import rmprocs as rmprocs
    from hpcdist._managers.lifecycle import shutdown as shutdown
    from hpcdist._managers.local import LocalManager as LocalManager
    from hpcdist._managers.lowlevel import cluster_cookie as cluster_cookie
    from hpcdist._managers.lowlevel import init_worker as init_worker
    from hpcdist._managers.lowlevel import process_messages as process_messages
    from hpcdist._managers.lowlevel import start_worker as start_worker
    from hpcdist._managers.lowlevel import worker_id_from_socket as worker_id_from_socket
    from hpcdist._managers.mpi import MPIManager as MPIManager
    from hpcdist._managers.ssh import SSHManager as SSHManager
    from hpcdist._managers.views import myid as myid
    from hpcdist._managers.views import nprocs as nprocs
    from hpcdist._managers.views import nworkers as nworkers
    from hpcdist._managers.views import procs as procs
    from hpcdist._managers.views import status as status
    from hpcdist._managers.views import workers as workers
    from hpcdist._monitor.status import WorkerStatus as WorkerStatus
    from hpcdist._parallel.everywhere import everywhere as everywhere
    from hpcdist._parallel.loops import distributed as distributed
    from hpcdist._parallel.pmap import ExponentialBackOff as ExponentialBackOff
    from hpcdist._parallel.pmap import imap as imap
    from hpcdist._parallel.pmap import imap_unordered as imap_unordered
    from hpcdist._parallel.pmap import pmap as pmap
    from hpcdist._parallel.pools import AbstractWorkerPool as AbstractWorkerPool
    from hpcdist._parallel.pools import CachingPool as CachingPool
    from hpcdist._parallel.pools import WorkerPool as WorkerPool
    from hpcdist._parallel.pools import clear as clear
    from hpcdist._parallel.pools import default_worker_pool as default_worker_pool
    from hpcdist._parallel.pools import remote as remote
    from hpcdist._parallel.reductions import reduce as reduce
    from hpcdist._parallel.spmd import comm as comm
    from hpcdist._parallel.spmd import spmd as spmd
    from hpcdist._parallel.values import RemoteValue as RemoteValue
    from hpcdist._parallel.values import bcast as bcast
    from hpcdist._parallel.values import gather as gather
    from hpcdist._parallel.values import scatter as scatter
    from hpcdist._remote.calls import ANY as ANY
    from hpcdist._remote.calls import fetchany as fetchany
    from hpcdist._remote.calls import fetchfrom as fetchfrom
    from hpcdist._remote.calls import interrupt as interrupt
    from hpcdist._remote.calls import remote_do as remote_do
    from hpcdist._remote.calls import remotecall as remotecall
    from hpcdist._remote.calls import remotecall_fetch as remotecall_fetch
    from hpcdist._remote.calls import remotecall_wait as remotecall_wait
    from hpcdist._remote.calls import sleep as sleep
    from hpcdist._remote.calls import spawn as spawn
    from hpcdist._remote.calls import spawnat as spawnat
    from hpcdist._remote.channels import Channel as Channel
    from hpcdist._remote.futures import Future as Future
    from hpcdist._remote.operations import close as close
    from hpcdist._remote.operations import fetch as fetch
    from hpcdist._remote.operations import isopen as isopen
    from hpcdist._remote.operations import isready as isready
    from hpcdist._remote.operations import put as put
    from hpcdist._remote.operations import take as take
    from hpcdist._remote.operations import wait as wait
    from hpcdist._remote.remote_channels import RemoteChannel as RemoteChannel
    from hpcdist._remote.remote_channels import channel_from_id as channel_from_id
    from hpcdist._remote.remote_channels import remoteref_id as remoteref_id

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
    "_managers.elastic": "ElasticManager",
    "_managers.launch": "Launch",
    "_managers.lifecycle": "Removal addprocs cluster init launch rmprocs shutdown",
    "_managers.batch.lsf": "LSFManager",
    "_managers.batch.sge": "SGEManager",
    "_managers.batch.pbs": "PBSManager",
    "_managers.batch.slurm": "SlurmManager",
    "_managers.local": "LocalManager",
    "_managers.lowlevel": (
        "cluster_cookie init_worker process_messages start_worker worker_id_from_socket"
    ),
    "_managers.mpi": "MPIManager",
    "_managers.ssh": "SSHManager",
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
        "ANY fetchany fetchfrom interrupt remote_do remotecall remotecall_fetch "
        "remotecall_wait sleep spawn spawnat"
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
__all__ = sorted(set(_HOME) - _SHADOWING)


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'hpcdist' has no attribute {name!r}")
    from importlib import import_module

    import_module("hpcdist._managers.lifecycle")
    value = getattr(import_module(f"hpcdist.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
