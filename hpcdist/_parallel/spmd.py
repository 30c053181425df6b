"""One function on several workers at the same moment, with a communicator of their own.

Three parties. The *caller* asks pid 1 to let a set of workers enter, sends the function to each and
gathers the results. *Pid 1* keeps the order (`_managers.sections`): a set enters when no other with
a worker in common is inside, the function starts when every member holds a turn for it, and when a
member fails the others are freed. The *member* waits at the gate with its turn in its hand.

What they tell each other are controls, so that it works while user code sits in an MPI call.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from types import CoroutineType
from typing import TYPE_CHECKING, Any

from hpcdist import _errors
from hpcdist._errors import CompositeException, ProcessExitedException
from hpcdist._parallel.watching import Doing, look_at
from hpcdist._remote.calls import remotecall
from hpcdist._remote.cells import cell_of
from hpcdist._remote.futures import Future
from hpcdist._runtime.controls import (
    SECTION_DIE,
    SECTION_ENTER,
    SECTION_FREE,
    SECTION_GO,
    SECTION_HERE,
    SECTION_OVER,
    SECTION_STUCK,
    SECTION_VERDICT,
)
from hpcdist._runtime.node import node
from hpcdist._transport.contracts import Slot
from hpcdist._transport.router import Peer
from hpcdist._wire import codec
from hpcdist._wire.frames import FAILED, OK, OUTCOME, Buffer

if TYPE_CHECKING:
    from mpi4py import MPI

_ident = threading.get_ident


class Spmd:
    """Run a function on several workers at the same moment.

    - `spmd(f, *args)`: wait, and return the results in order of pid.
    - `spmd.submit(f, *args)`: the same as a future.

    Inside the function `comm()` is an mpi4py communicator over exactly these workers.
    """

    def __call__(
        self, f: Callable[..., Any], /, *args: Any, pids: Any = None, grace: float = 10, **kw: Any
    ) -> list[Any]:
        """Run `f(*args, **kw)` on all of these workers at once and return the results.

        Args:
            f: The function; inside it, `comm()` is the workers' communicator.
            *args: Its arguments, the same on each.
            pids: The workers, all of one world; default all there are.
            grace: When a member has failed: how long the others may stay inside MPI.
            **kw: Its keyword arguments.

        Raises:
            ValueError: The workers have no MPI world in common.
            RemoteException: A member raised. What its failure did to the others is not listed.
            ProcessExitedException: A member died.
            CompositeException: Several failed, each for a reason of its own.

        Example:
            >>> import hpcdist
            >>> pids = hpcdist.addprocs(2)
            >>> hpcdist.spmd(lambda: hpcdist.comm().allreduce(hpcdist.comm().rank + 1))
            [3, 3]
            >>> hpcdist.shutdown()
        """
        results: list[Any] = self.submit(f, *args, pids=pids, grace=grace, **kw).fetch()
        return results

    def submit(
        self, f: Callable[..., Any], /, *args: Any, pids: Any = None, grace: float = 10, **kw: Any
    ) -> Future:
        """Do the same without waiting; the future's value is the list of results."""
        if not callable(f):
            raise TypeError(f"a function is needed to call, not {f!r}")
        if isinstance(grace, bool) or not isinstance(grace, (int, float)) or grace < 0:
            raise ValueError(f"grace is a number of seconds, not {grace!r}")
        members = _listed(pids)
        _refuse_own_members(members)
        caller = _Caller(members, Sealed.of((f, args, kw)))
        caller.enter(float(grace))
        return caller.future

    def __repr__(self) -> str:
        return "<hpcdist.spmd>"


spmd = Spmd()


def comm() -> MPI.Intracomm:
    """Return the communicator of the `spmd` section this code runs in; ranks go by pid.

    It is the same object each time the same workers enter a section, so what is attached to it
    stays. Do not free it.

    Raises:
        RuntimeError: This code does not run inside `spmd`.
    """
    run = _run_here()
    if run is None:
        raise RuntimeError("comm() is for functions that spmd() runs, and this code is in none")
    if run.comm is None:  # process 1 on its own: MPI starts only if it is wanted
        from mpi4py import MPI

        run.comm = MPI.COMM_SELF
    found: MPI.Intracomm = run.comm
    return found


def _listed(pids: Any) -> list[int]:
    node.start()
    if node.refusal:
        raise RuntimeError(node.refusal)
    if pids is None:
        return node.members.workers()
    if hasattr(pids, "__index__"):
        pids = [pids]
    elif callable(getattr(pids, "workers", None)):  # a pool
        pids = pids.workers()
    listed = [int(pid.__index__()) for pid in pids]
    if not listed:
        raise ValueError("spmd needs at least one worker")
    if len(set(listed)) < len(listed):
        raise ValueError(f"spmd runs once on each worker, but {listed} names one twice")
    for pid in listed:
        if pid != node.me:
            node.peer(pid)
    return sorted(listed)


def _refuse_own_members(members: Sequence[int]) -> None:
    """A section that waits for one of its own members to leave it would wait for ever."""
    run = _run_here()
    shared = sorted(set(run.pids) & set(members)) if run is not None else ()
    if shared:
        raise RuntimeError(
            f"workers {shared} are inside the spmd section that this call was made from: they "
            "cannot enter another before it ends"
        )


class Sealed:
    """Something pickled once, to be sent to several processes."""

    def __init__(self, body: bytes, buffers: Sequence[Buffer], refs: Sequence[Any]) -> None:
        self.body = body
        self.buffers = buffers
        self.refs = refs  # pickled again beside the body, so that each receiver is counted

    @classmethod
    def of(cls, value: Any) -> Sealed:
        """Pickle a value; what it was made of may be changed at once."""
        payload = codec.dumps(value).own()
        return cls(payload.body, payload.buffers, payload.refs)

    def open(self) -> Any:
        """Rebuild the value."""
        return codec.loads(self.body, self.buffers)

    def __reduce__(self) -> Any:
        buffers = [pickle.PickleBuffer(b) for b in self.buffers]
        return Sealed, (self.body, buffers, tuple(self.refs))


class _Failed:
    """What a member returns instead of a result."""

    def __init__(self, error: bytes, consequence: bool, from_mpi: bool = False) -> None:
        self.error = error
        self.consequence = consequence  # of another member's failure
        # MPI said so: after another member's failure, a consequence too. A revoked communicator
        # may give any error class (Open MPI 5.0.11: ERR_OTHER), and before we are told.
        self.from_mpi = from_mpi


# Telling


def tell(pid: int, op: int, what: Any) -> None:
    """Send a control, also to oneself; to the dead, nothing."""
    body = pickle.dumps(what, 5)
    if pid == node.me:
        node.handlers[op](_myself(), 0, body, ())
        return
    peer = node.peers.get(pid)
    if peer is not None and peer.alive:
        peer.control(op, 0, body)
        node.progress.nudge()


def _myself() -> Peer:
    return Peer(node.me, node.progress)


def _ask(op: int, what: Any, slot: Any) -> None:
    """Send a request to process 1; its answer completes the slot."""
    ident = next(node.ids)
    slot.where = 1
    node.pending[ident] = slot
    body = pickle.dumps(what, 5)
    if node.me == 1:
        node.handlers[op](_myself(), ident, body, ())
        return
    node.peer(1).control(op, ident, body)
    node.progress.nudge()


# The caller


class _Caller:
    """One section as its caller sees it; in its first life, the request to enter."""

    def __init__(self, members: list[int], sealed: Sealed) -> None:
        self.future = Future()
        self.members = members
        self.number = 0
        self._sealed: Sealed | None = sealed
        self._calls: dict[int, Future] = {}
        self._outcomes: dict[int, Any] = {}
        self._left = len(members)
        self._lock = threading.Lock()  # guards the count
        # what node.complete expects of something that is waited for
        self.ready = False
        self.latch: Any = None
        self.value: Any = None
        self.error: BaseException | None = None
        self.where = 1

    def enter(self, grace: float) -> None:
        _ask(SECTION_ENTER, (self.members, grace), self)

    def arrived(self) -> None:
        """Go on in a thread that may block: the driver calls this."""
        node.turns.background(self._entered)

    def _entered(self) -> None:
        if self.error is not None:
            self._fail(self.error)
            return
        flags, body, _ = self.value
        answer = pickle.loads(body)
        if flags & OUTCOME != OK:
            self._fail(answer)
            return
        self.number = answer
        sealed, self._sealed = self._sealed, None
        for pid in self.members:
            try:
                future = remotecall(run_member, pid, self.number, self.members, sealed)
            except Exception as exc:  # the worker has died since
                self._outcomes[pid] = exc
                self._one_less(pid, failed=True)
                continue
            self._calls[pid] = future
            hook = partial(self._member_ended, pid, future)
            if not future._hook(hook):
                hook()

    def _member_ended(self, pid: int, future: Future) -> None:
        """Count. Called by the driver: what came is looked at elsewhere."""
        self._one_less(pid, future.error is not None or future._outcome() == FAILED)

    def _one_less(self, pid: int, failed: bool) -> None:
        with self._lock:
            self._left -= 1
            last = not self._left
        if last:
            node.turns.background(self._finish)
        elif failed:
            node.turns.background(lambda: self._outcome_of(pid))

    def _outcome_of(self, pid: int) -> Any:
        if pid not in self._outcomes:
            try:
                outcome = self._calls[pid].fetch()
            except Exception as exc:  # whatever the member's end was, the result says
                outcome = exc
            self._outcomes[pid] = outcome
        outcome = self._outcomes[pid]
        if isinstance(outcome, Exception) and not isinstance(outcome, ProcessExitedException):
            # It failed before it came to the gate, or its result did not travel.
            tell(1, SECTION_OVER, (self.number, pid, _in_short(outcome)))
        return outcome

    def _finish(self) -> None:
        outcomes = [self._outcome_of(pid) for pid in self.members]
        self._calls.clear()
        if not any(isinstance(o, (_Failed, Exception)) for o in outcomes):
            self.future.put(outcomes)
            return
        try:
            self._fail(self._judge())
        except Exception as exc:  # process 1 is gone, and we with it
            self._fail(exc)

    def _judge(self) -> BaseException:
        """Make the error: who failed by itself, not who was drawn into it."""
        slot = Slot()
        _ask(SECTION_VERDICT, self.number, slot)
        node.wait(slot)
        if slot.error is not None:
            raise slot.error
        culprit, killed, grace = pickle.loads(slot.value[1])
        first = self._outcomes.get(culprit)
        by_itself = not (isinstance(first, _Failed) and (first.consequence or first.from_mpi))
        own: list[Exception] = []
        drawn: dict[int, Exception] = {}
        for pid in self.members:
            outcome = self._outcomes[pid]
            if isinstance(outcome, _Failed):
                if outcome.consequence or (outcome.from_mpi and by_itself and pid != culprit):
                    drawn[pid] = _errors.decode_error(outcome.error)
                else:
                    own.append(_errors.decode_error(outcome.error))
            elif isinstance(outcome, ProcessExitedException) and pid in killed:
                drawn[pid] = outcome
            elif isinstance(outcome, Exception):
                own.append(outcome)
        if not own:  # all were drawn into it by one who is not a member any more
            own = [drawn[culprit]] if culprit in drawn else list(drawn.values())
        if killed:
            who = ", ".join(map(str, sorted(killed)))
            own[0].add_note(f"Still inside MPI {grace:g} s later, and killed: {who}.")
        return own[0] if len(own) == 1 else CompositeException("spmd failed", own)

    def _fail(self, error: BaseException) -> None:
        self.future.error = error
        cell_of(self.future.key).set(FAILED, _errors.encode_error(error, node.me))
        if not self.future.ready:
            node.complete(self.future)


# The member


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


def _current_call() -> Any:
    return node.turns.calls.get(_ident())


_runs: dict[int, Run] = {}
_kept: dict[tuple[int, ...], tuple[int, Any]] = {}  # communicators, by who is in them


def _run_here() -> Run | None:
    me = _ident()
    for run in list(_runs.values()):
        if run.thread == me:
            return run
    if len(_runs) == 1 and _current_call() is None and node.serving:
        return next(iter(_runs.values()))  # a thread that the function has started
    return None


def run_member(number: int, pids: Sequence[int], sealed: Sealed) -> Any:
    """Be a member: come to the gate with a turn in hand, run the function, say that it is over."""
    run = Run(number, pids)
    failed = "it did not start"
    _runs[number] = run
    try:
        f, args, kw = sealed.open()
        del sealed
        fresh, comm_number, culprit, worn = _pass_gate(run)
        if culprit:
            why = RuntimeError(f"process {culprit} failed before the section could start")
            return _Failed(_errors.encode_error(why, node.me), True)
        if node.progress.plane is not None:
            run.comm = _communicator(run.pids, comm_number, fresh, worn)
        value = f(*args, **kw)
        if type(value) is CoroutineType:
            import asyncio  # 20 ms: not at start-up

            value = asyncio.run(value)
        failed = ""
        return value
    except BaseException as exc:  # the edge of a call: it belongs to the caller
        failed = _in_short(exc)
        consequence = run.freed or _is_consequence(exc)
        return _Failed(_encoded(exc), consequence, _is_from_mpi(exc))
    finally:
        if failed:
            # Somebody may still be sending in it, and what was sent may never be received. Not
            # freed: that is for all members together, and some of them may be dead.
            _kept.pop(run.pids, None)
        del _runs[number]
        tell(1, SECTION_OVER, (number, node.me, failed))


def _pass_gate(run: Run) -> tuple[bool, int, int, bool]:
    """Wait until every member is here. The turn is kept: this is no wait of the user's."""
    number, comm = _kept.get(run.pids, (0, None))
    if comm is not None and not comm:  # the user has freed it
        number = 0
    tell(1, SECTION_HERE, (run.number, number))
    call = _current_call()
    if call is not None:
        call.waits = True  # so that `interrupt` ends the wait
    try:
        node.progress.wait(run.gate)
    finally:
        if call is not None:
            call.waits = False
    answer: tuple[bool, int, int, bool] = run.gate.value
    return answer


def _communicator(pids: tuple[int, ...], number: int, fresh: bool, worn: bool) -> Any:
    """Find the communicator of these workers, or make it: a collective call of theirs alone.

    Args:
        pids: Who is in it.
        number: Its number; no two have the same.
        fresh: Make it.
        worn: The world has lost a worker.
    """
    if not fresh:
        return _kept[pids][1]
    from mpi4py import MPI

    plane: Any = node.progress.plane
    rank_of = {peer.pid: rank for rank, peer in plane.peers.items()}
    rank_of[node.me] = plane.rank
    everyone = plane.comm.Get_group()
    group = everyone.Incl([rank_of[pid] for pid in pids])
    plane.paused = True
    try:
        if worn and "Open MPI" in MPI.Get_library_version():
            # Create_group fails in every world that has noticed a death (5.0.11: PROC_FAILED, as
            # it would on the dead rank); this, which knows of no world, does not.
            made = MPI.Intracomm.Create_from_group(group, f"hpcdist-{number}")
        else:
            # The tag keeps apart what happens at the same time.
            made = plane.comm.Create_group(group, number % 32768)
    finally:
        plane.paused = False
        group.Free()
        everyone.Free()
    made.Set_errhandler(MPI.ERRORS_RETURN)
    _kept[pids] = (number, made)
    return made


def _encoded(exc: BaseException) -> bytes:
    """Encode a member's error. MPI's own class travels only to processes that have MPI anyway.

    Unpickling it imports mpi4py.MPI, which would start MPI in a driver that is in no world.
    """
    call = _current_call()
    peer = call.peer if call is not None else None
    mpi = sys.modules.get("mpi4py.MPI")
    by_link = peer is not None and peer.plane is None
    if by_link and mpi is not None and isinstance(exc, mpi.Exception):
        stand_in = _errors.RemoteCause("mpi4py.MPI.Exception", f"mpi4py.MPI.Exception: {exc}")
        return _errors.encode_error(stand_in.with_traceback(exc.__traceback__), node.me)
    return _errors.encode_error(exc, node.me)


def _in_short(exc: BaseException) -> str:
    """Name an error for whoever must be told of it before its future says so."""
    try:
        text = str(exc.cause if isinstance(exc, _errors.RemoteException) else exc)
    except Exception:  # the user's __str__
        text = ""
    return f"{type(exc).__name__}: {text.splitlines()[0][:200] if text else ''}"


def _mpi_error(exc: BaseException | None) -> Any:
    """Find MPI's exception in an error, or in what led to it."""
    mpi = sys.modules.get("mpi4py.MPI")
    for _ in range(20):
        if mpi is None or exc is None or isinstance(exc, mpi.Exception):
            return exc if mpi is not None else None
        exc = exc.__cause__ or exc.__context__
    return None


def _is_from_mpi(exc: BaseException) -> bool:
    return _mpi_error(exc) is not None


def _is_consequence(exc: BaseException) -> bool:
    """Tell whether an error says that another process has failed: MPI's own words for it."""
    found = _mpi_error(exc)
    if found is None:
        return False
    mpi = sys.modules["mpi4py.MPI"]
    names = ("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING", "ERR_REVOKED")
    classes = {getattr(mpi, name, None) for name in names} - {None, mpi.ERR_UNKNOWN}
    return found.Get_error_class() in classes


def _forget_the_dead(pid: int) -> None:
    for pids in list(_kept):
        if pid in pids:
            del _kept[pids]


node.on_death.append(_forget_the_dead)


@node.control(SECTION_GO)
def _on_go(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    number, comm_number, fresh, culprit, worn = pickle.loads(body)
    run = _runs.get(number)
    if run is not None:
        run.gate.value = (fresh, comm_number, culprit, worn)
        node.complete(run.gate)


# A colleague has failed


@node.control(SECTION_FREE)
def _on_free(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    run = _runs.get(pickle.loads(body))
    if run is not None:
        run.freed = True
        node.turns.background(lambda: _free(run))


def _free(run: Run) -> None:
    """Get this process's share of a section out of MPI; ask to be killed where that fails."""
    tell(1, SECTION_STUCK, (run.number, False))
    if run.comm is not None:
        try:
            run.comm.Revoke()
        except Exception:  # MPICH: not implemented; others: as they like. Then we are killed
            pass
    while run.number in _runs:
        state = look_at(run.thread, run.native, lambda: run.number in _runs)
        if state is Doing.C_CODE:
            tell(1, SECTION_STUCK, (run.number, True))
            return
        if state is Doing.OUR_WAIT and run.number in _runs:
            node.progress.interrupt(run.thread)


@node.control(SECTION_DIE)
def _on_die(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    if pickle.loads(body) in _runs:
        os.kill(os.getpid(), 9)
