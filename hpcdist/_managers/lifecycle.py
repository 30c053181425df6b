"""Adding and removing workers: what users call on pid 1."""

from __future__ import annotations

import atexit
import os
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hpcdist import _config
from hpcdist._managers import mpi, roster, sections  # noqa: F401  (registers its handlers)
from hpcdist._managers.base import COMMON, ClusterManager, KeptManager, Settings
from hpcdist._managers.elastic import ElasticManager
from hpcdist._managers.launch import Launch
from hpcdist._managers.local import LocalManager
from hpcdist._runtime.node import node
from hpcdist._transport.contracts import Slot

_one_at_a_time = threading.Lock()  # one addprocs or rmprocs at a time
_launches: list[Launch] = []
_TOPOLOGIES = ("all_to_all", "master_worker", "custom")
_ISOLATIONS = ("auto", "world", "process")


def addprocs(what: Any = None, /, **params: Any) -> list[int]:
    """Add workers and return their pids once all have registered.

    Args:
        what: None: one per core this process may use; a number; a list of hosts, see
            `SSHManager`; or a ClusterManager.
        **params: `dir`, `env`, `python`, `exeflags`, `topology`, `concurrency`, `timeout`,
            `isolation`, `min_workers`, `enable_threaded_blas`, and the manager's own.

    Raises:
        LaunchError: Some did not come up. Those that did stay, and are in its `.pids`.
        RuntimeError: This is not process 1.

    Example:
        >>> import hpcdist
        >>> len(hpcdist.addprocs(2))
        2
        >>> hpcdist.shutdown()
    """
    manager = _manager(what)
    if isinstance(manager, mpi.MPIManager) and manager.inside:
        _settings(manager, params)
        mpi.enter(manager.comm)
        return sorted(node.members.living)
    started = _add(manager, params)
    return [] if started is None else started.pids


def _add(manager: ClusterManager, params: dict[str, Any]) -> Launch | None:
    """Start workers and wait for them; None where none are asked for."""
    with _one_at_a_time:
        settings = _settings(manager, params)
        if isinstance(manager, LocalManager) and manager.n == 0:
            return None
        started = _launch(manager, settings)
        try:
            started.wait(settings.min_workers)
        except KeyboardInterrupt:
            if not isinstance(manager, ElasticManager):  # its workers were not started by this
                started.cancel()
            raise
        return started


def launch(what: Any = None, /, **params: Any) -> Launch:
    """Start workers without waiting for them.

    Example:
        >>> import hpcdist
        >>> started = hpcdist.launch(1)
        >>> len(started.wait())
        1
        >>> hpcdist.shutdown()
    """
    manager = _manager(what)
    return _launch(manager, _settings(manager, params))


def _launch(manager: ClusterManager, settings: Settings) -> Launch:
    if isinstance(manager, ElasticManager) and manager.open_launch is not None:
        manager.renew(settings)
        return manager.open_launch
    started = Launch(manager, settings)
    _launches.append(started)
    try:
        started.begin()
    except Exception:
        if started.error is not None:
            raise started.error from None
        raise
    return started


def _manager(what: Any) -> ClusterManager:
    if node.me != 1:
        raise RuntimeError("Only process 1 can add and remove workers")
    if isinstance(what, ClusterManager):
        if node.refusal and not (isinstance(what, mpi.MPIManager) and what.inside):
            raise RuntimeError(node.refusal)
        return what
    if node.refusal:
        raise RuntimeError(node.refusal)
    if what is None:
        return LocalManager(len(os.sched_getaffinity(0)))
    if isinstance(what, int) and not isinstance(what, bool):
        return LocalManager(what)
    if isinstance(what, list):
        from hpcdist._managers.ssh import SSHManager

        return SSHManager(what) if what else LocalManager(0)
    raise TypeError(
        f"addprocs takes a number of workers, a list of hosts or a cluster manager, not {what!r}"
    )


def _settings(manager: ClusterManager, params: dict[str, Any]) -> Settings:
    own = manager.own_params
    known = COMMON | set(own or ())
    for name in params if own is not None else ():
        if name not in known:
            raise _config.unknown_option(name, sorted(known), "addprocs")
    settings = Settings.of(manager.default_addprocs_params(), params)
    _check(settings, folder=not (isinstance(manager, KeptManager) and manager.hosts_apart))
    if isinstance(manager, KeptManager):
        manager.prepare(settings)
    return settings


def _check(settings: Settings, *, folder: bool) -> None:
    for name, value, choices in (
        ("topology", settings.topology, _TOPOLOGIES),
        ("isolation", settings.isolation, _ISOLATIONS),
    ):
        if value not in choices:
            raise ValueError(f"{name} is one of {', '.join(map(repr, choices))}, not {value!r}")
    limit = settings.concurrency
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"concurrency is a positive number or None, not {limit!r}")
    if folder and not os.path.isdir(settings.dir):
        raise ValueError(f"dir={settings.dir!r} is not a directory")
    if node.members.living and settings.topology != node.topology:
        raise ValueError(
            f"workers with topology {node.topology!r} exist; {settings.topology!r} cannot be "
            "added to them"
        )
    node.topology = settings.topology


class Removal:
    """Workers on their way out."""

    def __init__(self, pids: Sequence[int], slots: Sequence[Slot]) -> None:
        self.pids = list(pids)
        self._slots = list(slots)

    def __repr__(self) -> str:
        return f"<Removal of {self.pids}: {'done' if self.done() else 'going on'}>"

    def done(self) -> bool:
        """Tell whether all of them are gone."""
        return all(slot.ready for slot in self._slots)

    def wait(self, timeout: float | None = None) -> Removal:
        """Wait until all of them are gone.

        Raises:
            TimeoutError: Some are not; it names them, and their removal goes on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        for slot in self._slots:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                node.wait(slot, left)
            except TimeoutError:
                late = [s.where for s in self._slots if not s.ready]
                raise TimeoutError(f"rmprocs: pids {late} not gone after {timeout:g} s") from None
        return self


def rmprocs(*pids: int | Iterable[int], waitfor: float | None = None) -> Removal:
    """Remove workers.

    Args:
        *pids: Their ids, or lists of them. Dead and unknown ones are ignored.
        waitfor: None waits for their end, 0 not at all, a time so long and no longer.

    Raises:
        TimeoutError: Some are not gone in time; it names them, and their removal goes on.

    Example:
        >>> import hpcdist
        >>> pids = hpcdist.addprocs(1)
        >>> hpcdist.rmprocs(pids).done()
        True
    """
    if node.me != 1:
        raise RuntimeError("Only process 1 can add and remove workers")
    if node.refusal:
        raise RuntimeError(node.refusal)
    named = [p for item in pids for p in ([item] if isinstance(item, int) else item)]
    slots = []
    removed = []
    for pid in dict.fromkeys(named):
        if pid == 1:
            warnings.warn("rmprocs: process 1 is not removed", stacklevel=2)
            continue
        record = roster.book.get(pid)
        if record is None or record.state is roster.State.GONE:
            continue
        slot = roster.slot_of_end(record)
        if slot is not None:
            slot.where = pid
            slots.append(slot)
            removed.append(pid)
            roster.dismiss(record)
    removal = Removal(removed, slots)
    if waitfor is None or waitfor > 0:
        removal.wait(waitfor)
    return removal


def shutdown() -> None:
    """End all workers in good order. Done at exit too; `addprocs` works again afterwards.

    Example:
        >>> import hpcdist
        >>> hpcdist.shutdown()
        >>> hpcdist.workers()
        [1]
    """
    if node.me != 1:
        raise RuntimeError("Only process 1 can add and remove workers")
    _end_all(patience=2.0)


def _end_all(patience: float) -> None:
    for started in _launches:
        started.cancel()
    mpi.leave_world()
    records = [r for r in roster.book.values() if r.state is not roster.State.GONE]
    slots = [s for s in map(roster.slot_of_end, records) if s is not None]
    for record in records:
        roster.dismiss(record)
    for step in (None, roster.interrupt, roster.force):
        for record in records:
            if step is not None and record.state is not roster.State.GONE:
                step(record)
        if _all_within(slots, patience / 2):
            break
    _await_keepers()
    _launches.clear()


def _all_within(slots: Sequence[Slot], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    for slot in slots:
        try:
            node.wait(slot, max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            return False
    return True


def _await_keepers() -> None:
    """Wait for the keepers, which remove what their worlds leave behind."""
    for started in _launches:
        started.close()
    deadline = time.monotonic() + 3.0
    for started in _launches:
        while not started.ended() and time.monotonic() < deadline:
            try:
                node.wait(Slot(), 0.01)
            except TimeoutError:
                pass
        started.end_jobs()


def _at_exit() -> None:
    if node.me != 1 or (node.refusal and not mpi.inside_world()):
        return
    if not (roster.book or _launches or mpi.inside_world()):
        return
    _end_all(patience=2.0)
    node.progress.stop()


atexit.register(_at_exit)


def init(n: int | None = None) -> None:
    """Make this script run in every way: under `mpirun`, by itself, by `hpcdist run`.

    In an MPI launch rank 0 goes on as process 1, the other ranks become its workers and never
    return. Otherwise `n` workers are added, if a number is given and there are none.
    """
    if mpi.inside_world() or node.me != 1:
        return
    if mpi.launched_size() > 1 and node.refusal:
        mpi.enter(None)
    elif n is not None and not node.members.living:
        addprocs(n)


@contextmanager
def cluster(what: Any = None, /, **params: Any) -> Iterator[list[int] | None]:
    """Add workers for the length of a block.

    With `MPIManager()` in an MPI launch rank 0 runs the block; the others serve meanwhile, get
    None, and all ranks go on after the block.

    Example:
        >>> import hpcdist
        >>> with hpcdist.cluster(2) as pids:
        ...     hpcdist.remotecall_fetch(hpcdist.myid, pids[0]) == pids[0]
        True
    """
    manager = _manager(what)
    if isinstance(manager, mpi.MPIManager) and manager.inside:
        _settings(manager, params)
        pids = mpi.enter_block(manager.comm)
        try:
            yield pids
        finally:
            mpi.leave_block()
        return
    started = _add(manager, params)
    try:
        yield [] if started is None else started.pids
    finally:
        if started is not None:
            started.cancel()  # those that would come later
            rmprocs(started.pids)
