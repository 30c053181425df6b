"""Adding and removing workers: what users call on pid 1."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hpcdist._cluster.begin import Launches
from hpcdist._cluster.launch import Launch
from hpcdist._cluster.roster import Roster, State
from hpcdist._contract.kept_managers import KeptManager
from hpcdist._contract.managers import ClusterManager
from hpcdist._frames import brief
from hpcdist._hints import suggesting
from hpcdist._managers.local import LocalManager
from hpcdist._managers.mpi import MPIManager
from hpcdist._managers.mpi_launch import MpiLaunch, launched_size
from hpcdist._public import public
from hpcdist._runtime.node import Node, here
from hpcdist._transport.contracts import Slot


@public
@brief
def addprocs(what: object = None, /, **params: object) -> list[int]:
    """Add workers and return their pids once all have registered.

    Args:
        what: None: one per core this process may use; a number; a list of hosts, see
            `SSHManager`; or a ClusterManager.
        **params: `dir`, `env`, `python`, `wrapper`, `container`, `container_args`, `exeflags`,
            `topology`, `concurrency`, `timeout`, `isolation`, `min_workers`,
            `enable_threaded_blas`, `renew`, `tag`, and the manager's.
            `python` may be a command: `["nice", "-n", "5", "python3"]`. With `renew=True` others
            come in place of workers that die: the number stays. With `adapt=(lo, hi)` there are
            as many jobs as the waiting work calls for (`max_queued`, `idle`). With `tag="gpu"`,
            or a list of tags, `"gpu"` may stand for the workers in place of a pid or a pool.

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
    inside = _inside(manager)
    if inside is not None:
        inside.enter(Launches.here().plan(manager, params).settings)
        return sorted(here.node.members.living)
    return _add(manager, params).pids


def _inside(manager: ClusterManager) -> KeptManager | None:
    """Return the manager if its workers are the other ranks of our own MPI launch."""
    return manager if isinstance(manager, KeptManager) and manager.inside else None


def _add(manager: ClusterManager, params: dict[str, Any]) -> Launch:
    """Start workers and wait for them."""
    launches = Launches.here()
    with launches.one_at_a_time:
        started = launches.begin(manager, params)
        try:
            started.wait(started.settings.min_workers)
        except KeyboardInterrupt:
            if manager.ends_when_interrupted:
                started.cancel()
            raise
        return started


@public
def launch(what: object = None, /, **params: object) -> Launch:
    """Start workers without waiting for them. `wait` of the launch raises their errors.

    Raises:
        TypeError, ValueError: The arguments are wrong.

    Example:
        >>> import hpcdist
        >>> started = hpcdist.launch(1)
        >>> len(started.wait())
        1
        >>> hpcdist.shutdown()
    """
    return Launches.here().begin(_manager(what), params)


def _manager(what: object) -> ClusterManager:
    node = here.node
    if node.me != 1:
        raise RuntimeError("Only process 1 can add and remove workers")
    if isinstance(what, ClusterManager):
        if node.refusal and _inside(what) is None:
            raise RuntimeError(node.refusal)
        return what
    node.admit()
    local = node.service(Launches).local or LocalManager
    if what is None:
        return local(len(os.sched_getaffinity(0)))
    if isinstance(what, int) and not isinstance(what, bool):
        return local(what)
    if isinstance(what, list):
        from hpcdist._managers.ssh import SSHManager

        return SSHManager(what) if what else local(0)
    raise TypeError(
        f"addprocs takes a number of workers, a list of hosts or a cluster manager, not {what!r}"
    )


@public
class Removal:
    """Workers on their way out."""

    def __init__(self, node: Node, pids: Sequence[int], slots: Sequence[Slot]) -> None:
        self._node = node
        self.pids = list(pids)
        self._slots = list(slots)

    def __repr__(self) -> str:
        return f"<Removal of {self.pids}: {'done' if self.done() else 'going on'}>"

    def done(self) -> bool:
        """Tell whether all of them are gone."""
        return all(slot.ready for slot in self._slots)

    @brief
    def wait(self, timeout: float | None = None) -> Removal:
        """Wait until all of them are gone.

        Raises:
            TimeoutError: Some are not; it names them, and their removal goes on.
        """
        now = self._node.machine.now
        deadline = None if timeout is None else now() + timeout
        for slot in self._slots:
            left = None if deadline is None else max(0.0, deadline - now())
            try:
                self._node.wait(slot, left)
            except TimeoutError:
                late = [s.where for s in self._slots if not s.ready]
                raise TimeoutError(f"rmprocs: pids {late} not gone after {timeout:g} s") from None
        return self


@public
@brief
@suggesting
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
    node = here.node
    if node.me != 1:
        raise RuntimeError("Only process 1 can add and remove workers")
    node.admit()
    roster = node.service(Roster)
    named = [p for item in pids for p in ([item] if isinstance(item, int) else item)]
    slots = []
    leaving = []
    for pid in dict.fromkeys(named):
        if pid == 1:
            warnings.warn("rmprocs: process 1 is not removed", stacklevel=2)
            continue
        record = roster.book.get(pid)
        if record is None or record.state is State.GONE:
            continue
        slot = roster.slot_of_end(record)
        if slot is not None:
            slot.where = pid
            slots.append(slot)
            leaving.append(record)
    roster.dismiss(leaving)
    removal = Removal(node, [record.pid for record in leaving], slots)
    if waitfor is None or waitfor > 0:
        removal.wait(waitfor)
    return removal


@public
@brief
def shutdown(*, release: bool = False) -> None:
    """End all workers in good order. Done at exit too; `addprocs` works again afterwards.

    Args:
        release: Whether to end the jobs with them that were started with `linger=`.

    Example:
        >>> import hpcdist
        >>> hpcdist.shutdown()
        >>> hpcdist.workers()
        [1]
    """
    node = here.node
    if node.me != 1:
        raise RuntimeError("Only process 1 can add and remove workers")
    node.admit()
    _end_all(node, patience=2.0, release=release)
    node.members.dismissed()


def _end_all(node: Node, patience: float, *, release: bool = False) -> None:
    roster, launches = node.service(Roster), node.service(Launches).launches
    for started in launches:
        if not release:
            started.outlive()
        started.cancel()
    node.service(MpiLaunch).leave_world()
    records = [r for r in roster.book.values() if r.state is not State.GONE]
    slots = [s for s in map(roster.slot_of_end, records) if s is not None]
    roster.dismiss(records)
    for step in (None, roster.interrupt, roster.force):
        for record in records:
            if step is not None and record.state is not State.GONE:
                step(record)
        if _all_within(node, slots, patience / 2):
            break
    _await_keepers(node, launches)
    launches.clear()


def _all_within(node: Node, slots: Sequence[Slot], seconds: float) -> bool:
    deadline = node.machine.now() + seconds
    for slot in slots:
        try:
            node.wait(slot, max(0.0, deadline - node.machine.now()))
        except TimeoutError:
            return False
    return True


def _await_keepers(node: Node, launches: Sequence[Launch]) -> None:
    """Wait for the keepers, which remove what their worlds leave behind."""
    for started in launches:
        started.close()
    deadline = node.machine.now() + 3.0
    for started in launches:
        while not started.ended() and node.machine.now() < deadline:
            try:
                node.wait(Slot(), 0.01)
            except TimeoutError:
                pass
        started.end_jobs()


def end(node: Node) -> None:
    """End what a process has begun, at its own end."""
    inside = node.service(MpiLaunch).inside_world()
    if node.me != 1 or (node.refusal and not inside):
        return
    if not (node.service(Roster).book or node.service(Launches).launches or inside):
        return
    _end_all(node, patience=2.0)
    node.progress.stop()


@public
@brief
def init(n: int | None = None) -> None:
    """Make this script run in every way: under `mpirun`, by itself, by `hpcdist run`.

    In an MPI launch rank 0 goes on as process 1, the other ranks become its workers and never
    return. Otherwise `n` workers are added, if a number is given and there are none; where there
    are fewer, a line on stderr says so.
    """
    node = here.node
    if node.service(MpiLaunch).inside_world() or node.me != 1:
        return
    if launched_size() > 1 and node.refusal:
        node.service(MpiLaunch).enter(MPIManager(), None)
    elif n is not None and not node.members.living:
        addprocs(n)
    elif n is not None and len(node.members.living) < n:
        there = len(node.members.living)
        print(
            f"hpcdist: init({n}) adds no workers, as {there} are there already; "
            f"addprocs({n - there}) adds more",
            file=sys.stderr,
        )


@public
@contextmanager
def cluster(what: object = None, /, **params: object) -> Iterator[list[int] | None]:
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
    inside = _inside(manager)
    if inside is not None:
        settings = Launches.here().plan(manager, params).settings
        with inside.block(settings) as pids:
            yield pids
        return
    started = _add(manager, params)
    try:
        yield started.pids
    finally:
        started.outlive()
        started.cancel()
        rmprocs(started.everyone)
