"""A member of an `spmd` section: the gate, the function, its communicator, and a way out.

It comes to the gate with its turn in its hand. When a colleague fails, what can be freed of its
share is freed; where that cannot be done, it asks process 1 to be killed.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from types import CoroutineType
from typing import Any, NamedTuple

from hpcdist import _errors
from hpcdist._collective.function_packing import FunctionPacking, Sealed
from hpcdist._collective.thread_probe import Doing, look_at
from hpcdist._items.random_numbers import Streams
from hpcdist._runtime.node import Mail, Node, Service, on
from hpcdist._runtime.turns import Call
from hpcdist._transport.contracts import Slot
from hpcdist._wire.messages import (
    SectionDie,
    SectionFree,
    SectionGo,
    SectionHere,
    SectionOver,
    SectionStuck,
)

_ident = threading.get_ident


class Failed:
    """What a member returns instead of a result."""

    def __init__(self, error: bytes, consequence: bool, from_mpi: bool = False) -> None:
        self.error = error
        self.consequence = consequence  # of another member's failure
        # MPI said so: after another member's failure, a consequence too. A revoked communicator
        # may give any error class (Open MPI 5.0.11: ERR_OTHER), and before we are told.
        self.from_mpi = from_mpi


class Run:
    """A section that this process is a member of."""

    def __init__(self, number: int, pids: Sequence[int]) -> None:
        self.number = number
        self.pids = tuple(pids)
        self.gate = Slot()
        self.comm: Any = None
        self.thread = _ident()
        self.native = threading.get_native_id()
        self.freed = False


class SectionMembers(Service):
    """The sections that this process is a member of, and the communicators it has kept of them."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._packing = node.service(FunctionPacking)
        self._runs: dict[int, Run] = {}  # by number
        self._kept: dict[tuple[int, ...], tuple[int, Any]] = {}  # by who is in them
        node.on_death.append(self._forget_the_dead)

    def _current_call(self) -> Call | None:
        return self.node.turns.calls.get(_ident())

    def run_here(self) -> Run | None:
        """Find the section that this thread runs in."""
        me = _ident()
        for run in list(self._runs.values()):
            if run.thread == me:
                return run
        if len(self._runs) == 1 and self._current_call() is None and self.node.turns.serving:
            return next(iter(self._runs.values()))  # a thread that the function has started
        return None

    def rank_here(self) -> int | None:
        """Tell the rank of this process in the section that this thread runs in."""
        run = self.run_here()
        return None if run is None else run.pids.index(self.node.me)

    def take_part(self, number: int, pids: Sequence[int], wants_all: bool, sealed: Sealed) -> Any:
        """Come to the gate with a turn in hand, run the function, say that it is over.

        Args:
            number: The section's.
            pids: Its members.
            wants_all: Whether every member's result is wanted, not only that of rank 0.
            sealed: The function and its arguments.
        """
        run = Run(number, pids)
        failed = "it did not start"
        self._runs[number] = run
        try:
            f, args, kw, seed = sealed.open(self._packing)
            del sealed
            go = self._pass_gate(run)
            if go.culprit:
                why = RuntimeError(f"process {go.culprit} failed before the section could start")
                return Failed(_errors.encode_error(why, self.node.me), True)
            run.comm = self._communicator(run.pids, go)
            with Streams.of_item(seed, run.pids.index(self.node.me)):
                value = f(*args, **kw)
                if type(value) is CoroutineType:
                    value = self._awaited(value)
            failed = ""
            return value if wants_all or run.pids[0] == self.node.me else None
        except BaseException as exc:  # the edge of a call: it belongs to the caller
            failed = in_short(exc)
            from_mpi = self._mpi_error(exc)
            consequence = run.freed or _says_that_another_failed(from_mpi)
            return Failed(self._encoded(exc), consequence, from_mpi is not None)
        finally:
            if failed:
                # Somebody may still be sending in it, and what was sent may never be received. Not
                # freed: that is for all members together, and some of them may be dead.
                self._kept.pop(run.pids, None)
            del self._runs[number]
            self._tell(SectionOver(number, self.node.me, failed))

    def _pass_gate(self, run: Run) -> SectionGo:
        """Wait until every member is here. The turn is kept: this is no wait of the user's."""
        number, comm = self._kept.get(run.pids, (0, None))
        if comm is not None and not comm:  # the user has freed it
            number = 0
        self._tell(SectionHere(run.number, number))
        call = self._current_call()
        if call is not None:
            call.waits = True  # so that `interrupt` ends the wait
        try:
            self.node.progress.wait(run.gate)
        finally:
            if call is not None:
                call.waits = False
        go: SectionGo = run.gate.value
        return go

    def _communicator(self, pids: tuple[int, ...], go: SectionGo) -> Any:
        """Find the communicator of these workers, or make it: a collective call of theirs alone."""
        plane = self.node.progress.plane
        if plane is None:
            return None
        for members, (number, comm) in list(self._kept.items()) if go.unkept else ():
            if number in go.unkept:
                del self._kept[members]
                plane.free_comm(comm)
        if not go.fresh:
            return self._kept[pids][1]
        made = plane.make_comm(pids, go.comm)
        self._kept[pids] = (go.comm, made)
        return made

    def _awaited(self, coroutine: CoroutineType[Any, Any, Any]) -> Any:
        import asyncio  # 20 ms: not at start-up

        with asyncio.Runner(loop_factory=self.node.machine.event_loop) as runner:
            return runner.run(coroutine)

    def _tell(self, message: NamedTuple) -> None:
        """Tell process 1."""
        send_now(self.node, 1, message)

    def _encoded(self, exc: BaseException) -> bytes:
        """Encode a member's error. MPI's own class travels only to processes that have MPI anyway.

        Unpickling it imports mpi4py.MPI, which would start MPI in a driver that is in no world.
        """
        call = self._current_call()
        peer = call.peer if call is not None else None
        mpi = sys.modules.get("mpi4py.MPI")
        by_link = peer is not None and peer.plane is None
        if by_link and mpi is not None and isinstance(exc, mpi.Exception):
            stand_in = _errors.RemoteCause("mpi4py.MPI.Exception", f"mpi4py.MPI.Exception: {exc}")
            return _errors.encode_error(stand_in.with_traceback(exc.__traceback__), self.node.me)
        return _errors.encode_error(exc, self.node.me)

    def _mpi_error(self, exc: BaseException | None) -> BaseException | None:
        """Find MPI's exception in an error, or in what led to it."""
        plane = self.node.progress.plane
        for _ in range(20):
            if plane is None or exc is None or isinstance(exc, plane.failure):
                return exc if plane is not None else None
            exc = exc.__cause__ or exc.__context__
        return None

    def _forget_the_dead(self, pid: int) -> None:
        for pids in list(self._kept):
            if pid in pids:
                del self._kept[pids]

    @on(SectionGo)
    def _on_go(self, said: SectionGo, mail: Mail) -> None:
        run = self._runs.get(said.number)
        if run is not None:
            run.gate.value = said
            self.node.complete(run.gate)

    # A colleague has failed

    @on(SectionFree)
    def _on_free(self, said: SectionFree, mail: Mail) -> None:
        run = self._runs.get(said.number)
        if run is not None:
            run.freed = True
            self.node.turns.background(lambda: self._free(run))

    def _free(self, run: Run) -> None:
        """Get this process's share of a section out of MPI; ask to be killed where that fails."""
        self._tell(SectionStuck(run.number, False))
        if run.comm is not None:
            try:
                run.comm.Revoke()
            except Exception:  # MPICH: not implemented; others: as they like. Then we are killed
                pass
        while run.number in self._runs:
            state = look_at(self.node, run.thread, run.native, lambda: run.number in self._runs)
            if state is Doing.C_CODE:
                self._tell(SectionStuck(run.number, True))
                return
            if state is Doing.OUR_WAIT and run.number in self._runs:
                self.node.progress.interrupts.note(run.thread)

    @on(SectionDie)
    def _on_die(self, said: SectionDie, mail: Mail) -> None:
        if said.number in self._runs:
            self.node.machine.die()


def run_member(number: int, pids: Sequence[int], wants_all: bool, sealed: Sealed) -> Any:
    """Run a section's function here, as one of its members."""
    return SectionMembers.here().take_part(number, pids, wants_all, sealed)


def send_now(node: Node, pid: int, message: NamedTuple, ident: int = 0) -> None:
    """Send a control at once, also to oneself; to the dead, nothing."""
    if node.send(pid, message, ident):
        node.progress.nudge()


def in_short(exc: BaseException) -> str:
    """Name an error in short, for those that need it before its future has it."""
    try:
        text = str(exc.cause if isinstance(exc, _errors.RemoteException) else exc)
    except Exception:  # the user's __str__
        text = ""
    return f"{type(exc).__name__}: {text.splitlines()[0][:200] if text else ''}"


def _says_that_another_failed(error: Any) -> bool:
    """Tell whether MPI says in its own words that another process has failed."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not isinstance(error, mpi.Exception):
        return False
    names = ("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING", "ERR_REVOKED")
    classes = {getattr(mpi, name, None) for name in names} - {None, mpi.ERR_UNKNOWN}
    return error.Get_error_class() in classes
