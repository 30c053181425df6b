"""Julia's Distributed for Python, on MPI and batch clusters."""

from __future__ import annotations

from hpcdist import _version

TYPE_CHECKING = False  # `typing` itself costs a worker more than all of this module
if TYPE_CHECKING:
    from typing import Any

    from hpcdist._checkpoints.belonging import CheckpointMismatch as CheckpointMismatch
    from hpcdist._checkpoints.reading import read_checkpoint as read_checkpoint
    from hpcdist._cluster.launch import Launch as Launch
    from hpcdist._cluster.log_to import log_to as log_to
    from hpcdist._cluster.queries import myid as myid
    from hpcdist._cluster.queries import nprocs as nprocs
    from hpcdist._cluster.queries import nworkers as nworkers
    from hpcdist._cluster.queries import procs as procs
    from hpcdist._cluster.queries import status as status
    from hpcdist._cluster.queries import time_left as time_left
    from hpcdist._cluster.queries import workers as workers
    from hpcdist._cluster.stacks import stacks as stacks
    from hpcdist._cluster.tracing import trace as trace
    from hpcdist._cluster.worker_events import on_worker as on_worker
    from hpcdist._collective.everywhere import everywhere as everywhere
    from hpcdist._collective.loops import distributed as distributed
    from hpcdist._collective.reductions import reduce as reduce
    from hpcdist._collective.remote_values import RemoteValue as RemoteValue
    from hpcdist._collective.remote_values import bcast as bcast
    from hpcdist._collective.remote_values import gather as gather
    from hpcdist._collective.remote_values import scatter as scatter
    from hpcdist._collective.spmd import comm as comm
    from hpcdist._collective.spmd import spmd as spmd
    from hpcdist._contract.managers import ClusterManager as ClusterManager
    from hpcdist._contract.managers import WorkerConfig as WorkerConfig
    from hpcdist._contract.managers import default_addprocs_params as default_addprocs_params
    from hpcdist._dashboard.dashboard import Dashboard as Dashboard
    from hpcdist._dashboard.dashboard import dashboard as dashboard
    from hpcdist._errors import ChannelClosed as ChannelClosed
    from hpcdist._errors import CompositeException as CompositeException
    from hpcdist._errors import HpcdistError as HpcdistError
    from hpcdist._errors import LaunchError as LaunchError
    from hpcdist._errors import ProcessExitedException as ProcessExitedException
    from hpcdist._errors import RemoteException as RemoteException
    from hpcdist._integrations.executor import Executor as Executor
    from hpcdist._integrations.joblib import register_joblib as register_joblib
    from hpcdist._integrations.pool import Pool as Pool
    from hpcdist._items.random_numbers import rng as rng
    from hpcdist._jobs.executor import JobExecutor as JobExecutor
    from hpcdist._jobs.job_futures import JobFuture as JobFuture
    from hpcdist._jobs.job_futures import job as job
    from hpcdist._managers.elastic import ElasticManager as ElasticManager
    from hpcdist._managers.lifecycle import Removal as Removal
    from hpcdist._managers.lifecycle import addprocs as addprocs
    from hpcdist._managers.lifecycle import cluster as cluster
    from hpcdist._managers.lifecycle import init as init
    from hpcdist._managers.lifecycle import launch as launch
    from hpcdist._managers.lifecycle import rmprocs as rmprocs
    from hpcdist._managers.lifecycle import shutdown as shutdown
    from hpcdist._managers.local import LocalManager as LocalManager
    from hpcdist._managers.mpi import MPIManager as MPIManager
    from hpcdist._managers.ssh import SSHManager as SSHManager
    from hpcdist._maps.caching_pools import CachingPool as CachingPool
    from hpcdist._maps.caching_pools import clear as clear
    from hpcdist._maps.default_pool import default_worker_pool as default_worker_pool
    from hpcdist._maps.default_pool import remote as remote
    from hpcdist._maps.pmap import ExponentialBackOff as ExponentialBackOff
    from hpcdist._maps.pmap import imap as imap
    from hpcdist._maps.pmap import imap_unordered as imap_unordered
    from hpcdist._maps.pmap import pmap as pmap
    from hpcdist._maps.pools import AbstractWorkerPool as AbstractWorkerPool
    from hpcdist._maps.pools import WorkerPool as WorkerPool
    from hpcdist._monitor.status import WorkerStatus as WorkerStatus
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
    from hpcdist._remote.remote_objects import RemoteObject as RemoteObject
    from hpcdist._schedulers.lsf import LSFManager as LSFManager
    from hpcdist._schedulers.pbs import PBSManager as PBSManager
    from hpcdist._schedulers.sge import SGEManager as SGEManager
    from hpcdist._schedulers.slurm import SlurmManager as SlurmManager
    from hpcdist._worker.lowlevel import cluster_cookie as cluster_cookie
    from hpcdist._worker.lowlevel import init_worker as init_worker
    from hpcdist._worker.lowlevel import process_messages as process_messages
    from hpcdist._worker.lowlevel import start_worker as start_worker
    from hpcdist._worker.lowlevel import worker_id_from_socket as worker_id_from_socket

# Where each public name lives. Names are loaded when first used, so that a keeper or a worker
# does not pay for what it never touches.
_HOMES = {
    "_errors": (
        "ChannelClosed CompositeException HpcdistError LaunchError ProcessExitedException "
        "RemoteException"
    ),
    "_checkpoints.belonging": "CheckpointMismatch",
    "_checkpoints.reading": "read_checkpoint",
    "_integrations.executor": "Executor",
    "_integrations.joblib": "register_joblib",
    "_integrations.pool": "Pool",
    "_contract.managers": "ClusterManager WorkerConfig default_addprocs_params",
    "_jobs.executor": "JobExecutor",
    "_jobs.job_futures": "JobFuture job",
    "_managers.elastic": "ElasticManager",
    "_cluster.launch": "Launch",
    "_managers.lifecycle": "Removal addprocs cluster init launch rmprocs shutdown",
    "_schedulers.lsf": "LSFManager",
    "_schedulers.sge": "SGEManager",
    "_schedulers.pbs": "PBSManager",
    "_schedulers.slurm": "SlurmManager",
    "_managers.local": "LocalManager",
    "_worker.lowlevel": (
        "cluster_cookie init_worker process_messages start_worker worker_id_from_socket"
    ),
    "_managers.mpi": "MPIManager",
    "_managers.ssh": "SSHManager",
    "_cluster.queries": "myid nprocs nworkers procs status time_left workers",
    "_monitor.status": "WorkerStatus",
    "_cluster.stacks": "stacks",
    "_cluster.log_to": "log_to",
    "_cluster.tracing": "trace",
    "_cluster.worker_events": "on_worker",
    "_dashboard.dashboard": "Dashboard dashboard",
    "_collective.everywhere": "everywhere",
    "_collective.loops": "distributed",
    "_maps.pmap": "ExponentialBackOff imap imap_unordered pmap",
    "_maps.caching_pools": "CachingPool clear",
    "_maps.default_pool": "default_worker_pool remote",
    "_maps.pools": "AbstractWorkerPool WorkerPool",
    "_items.random_numbers": "rng",
    "_collective.reductions": "reduce",
    "_collective.spmd": "comm spmd",
    "_collective.remote_values": "RemoteValue bcast gather scatter",
    "_remote.calls": (
        "ANY fetchany fetchfrom interrupt remote_do remotecall remotecall_fetch "
        "remotecall_wait sleep spawn spawnat"
    ),
    "_remote.channels": "Channel",
    "_remote.futures": "Future",
    "_remote.operations": "close fetch isopen isready put take wait",
    "_remote.remote_channels": "RemoteChannel channel_from_id remoteref_id",
    "_remote.remote_objects": "RemoteObject",
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

# Everyday names of other libraries, and ours.
_ELSEWHERE = {
    "map": "pmap",
    "starmap": "pmap",
    "get": "fetch",
    "submit": "spawn",
    "Client": "addprocs",
    "ProcessPoolExecutor": "Executor",
    "Queue": "RemoteChannel",
    "broadcast": "bcast",
    "Actor": "RemoteObject",
    "ThreadPool": "Pool",
}

__version__ = _version.VERSION
__all__ = sorted(set(_HOME) - _SHADOWING)


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise _no_such_name(name)
    import gc
    from importlib import import_module

    # Modules are no garbage: to look for some while they are made takes a seventh of the time.
    collects = gc.isenabled()
    gc.disable()
    try:
        from hpcdist._runtime.node import here

        if not here.node.has_begun:  # a worker has
            from hpcdist._managers.driver import begin

            begin(here.node)
        value = getattr(import_module(f"hpcdist.{home}"), name)
    finally:
        if collects:
            gc.enable()
    globals()[name] = value
    return value


def load_ipython_extension(shell: Any) -> None:
    """Give IPython our magics: `%load_ext hpcdist`."""
    __getattr__("everywhere")  # makes this process a driver
    from hpcdist._notebook.extension import load

    load(shell)


def unload_ipython_extension(shell: Any) -> None:
    """Take them away again: `%unload_ext hpcdist`."""
    from hpcdist._notebook.extension import unload

    unload(shell)


def _no_such_name(name: str) -> AttributeError:
    said = f"module 'hpcdist' has no attribute {name!r}"
    if not name.startswith("_"):
        from hpcdist._config import nearest

        meant = _ELSEWHERE.get(name) or nearest(name, _HOME)
        said += f"; did you mean {meant!r}?" if meant else ""
    return AttributeError(said, name=name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
