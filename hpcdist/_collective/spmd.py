"""One function on several workers at the same moment, with a communicator of their own.

Three parties. The *caller* asks pid 1 to let a set of workers enter, sends the function to each and
gathers the results. *Pid 1* keeps the order (`_cluster.sections`): a set enters when no other with
a worker in common is inside, the function starts when every member holds a turn for it, and when a
member fails the others are freed. The *member* (`section_members`) waits at the gate with its turn
in its hand.

What they tell each other are controls, so that it works while user code sits in an MPI call.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, overload

from hpcdist import _errors
from hpcdist._collective.function_packing import FunctionPacking, Sealed
from hpcdist._collective.section_members import (
    Failed,
    SectionMembers,
    in_short,
    run_member,
    send_now,
)
from hpcdist._errors import CompositeException, ProcessExitedException
from hpcdist._frames import brief
from hpcdist._items import random_numbers
from hpcdist._public import public
from hpcdist._remote.calls import Calls
from hpcdist._remote.futures import Future, Futures
from hpcdist._runtime.node import Node, Service
from hpcdist._transport.contracts import Slot, Waitable
from hpcdist._typing import Async
from hpcdist._wire import messages
from hpcdist._wire.frames import FAILED, OK, OUTCOME
from hpcdist._wire.messages import (
    AskVerdict,
    Entered,
    SectionEnter,
    SectionOver,
    SectionWithdraw,
    Verdict,
)

if TYPE_CHECKING:
    from mpi4py import MPI

R = TypeVar("R")


class Spmd:
    """Run a function on several workers at the same moment.

    - `spmd(f, *args)`: wait, and return the results in order of pid.
    - `spmd.submit(f, *args)`: the same as a future.

    Inside the function `comm()` is an mpi4py communicator over exactly these workers.
    """

    @overload
    def __call__(
        self,
        f: Async[R],
        /,
        *args: object,
        pids: object = None,
        ranks: int | None = None,
        grace: float = 10,
        seed: int | None = None,
        **kw: object,
    ) -> list[R]: ...
    @overload
    def __call__(
        self,
        f: Callable[..., R],
        /,
        *args: object,
        pids: object = None,
        ranks: int | None = None,
        grace: float = 10,
        seed: int | None = None,
        **kw: object,
    ) -> list[R]: ...
    @brief
    def __call__(
        self,
        f: Callable[..., Any],
        /,
        *args: object,
        pids: object = None,
        ranks: int | None = None,
        grace: float = 10,
        seed: int | None = None,
        **kw: object,
    ) -> list[Any]:
        """Run `f(*args, **kw)` on all of these workers at once and return the results.

        Args:
            f: The function; inside it, `comm()` is the workers' communicator.
            *args: Its arguments, the same on each.
            pids: The workers, all of one world; default all there are.
            ranks: Run on any so many of them instead, on one host where so many are free.
            grace: When a member has failed: how long the others may stay inside MPI.
            seed: Of the numbers that `rng()` gives each rank; by default drawn anew.
            **kw: Its keyword arguments.

        Raises:
            ValueError: The workers have no MPI world in common, or no world has so many ranks.
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
        terms = SectionTerms(pids, ranks, grace, seed, wants_all=True)
        future: Future[list[Any]] = SectionCalls.here().submit(f, args, kw, terms)
        return future.fetch()

    @overload
    def submit(
        self,
        f: Async[R],
        /,
        *args: object,
        ranks: int,
        pids: object = None,
        grace: float = 10,
        seed: int | None = None,
        **kw: object,
    ) -> Future[R]: ...
    @overload
    def submit(
        self,
        f: Callable[..., R],
        /,
        *args: object,
        ranks: int,
        pids: object = None,
        grace: float = 10,
        seed: int | None = None,
        **kw: object,
    ) -> Future[R]: ...
    @overload
    def submit(
        self,
        f: Async[R],
        /,
        *args: object,
        ranks: None = None,
        pids: object = None,
        grace: float = 10,
        seed: int | None = None,
        **kw: object,
    ) -> Future[list[R]]: ...
    @overload
    def submit(
        self,
        f: Callable[..., R],
        /,
        *args: object,
        ranks: None = None,
        pids: object = None,
        grace: float = 10,
        seed: int | None = None,
        **kw: object,
    ) -> Future[list[R]]: ...
    def submit(
        self,
        f: Callable[..., Any],
        /,
        *args: object,
        ranks: int | None = None,
        pids: object = None,
        grace: float = 10,
        seed: int | None = None,
        **kw: object,
    ) -> Future[Any]:
        """Do the same without waiting; the future's value is the list of results.

        With `ranks` it is the result of rank 0 alone: many such tasks run side by side.

        Example:
            >>> import hpcdist
            >>> pids = hpcdist.addprocs(4)
            >>> size = lambda: hpcdist.comm().size
            >>> [f.fetch() for f in [hpcdist.spmd.submit(size, ranks=2) for _ in range(3)]]
            [2, 2, 2]
            >>> hpcdist.shutdown()
        """
        terms = SectionTerms(pids, ranks, grace, seed, wants_all=ranks is None)
        return SectionCalls.here().submit(f, args, kw, terms)

    def __repr__(self) -> str:
        return "<hpcdist.spmd>"


spmd = public(Spmd())


@public
def comm() -> MPI.Intracomm:
    """Return the communicator of the `spmd` section this code runs in; ranks go by pid.

    It is the same object each time the same workers enter a section, so what is attached to it
    stays. Do not free it.

    Raises:
        RuntimeError: This code does not run inside `spmd`.
    """
    members = SectionMembers.here()
    members.node.admit()
    run = members.run_here()
    if run is None:
        raise RuntimeError("comm() is for functions that spmd() runs, and this code is in none")
    if run.comm is None:
        run.comm = _comm_self()
    found: MPI.Intracomm = run.comm
    return found


def _comm_self() -> MPI.Intracomm:
    """Give process 1 on its own a communicator: MPI starts only if it is wanted."""
    from mpi4py import MPI

    return MPI.COMM_SELF


class SectionTerms(NamedTuple):
    """How a section is to be run, as users say it: see `spmd`."""

    pids: object = None
    ranks: int | None = None
    grace: float = 10
    seed: int | None = None
    wants_all: bool = False  # the results of all members, not only that of rank 0


def checked_ranks(ranks: object) -> int:
    """Check how many ranks a task is to have."""
    if isinstance(ranks, bool) or not hasattr(ranks, "__index__"):
        raise TypeError(f"ranks is a whole number, not {ranks!r}")
    number = int(ranks.__index__())
    if number < 1:
        raise ValueError(f"ranks is 1 or more, not {number}")
    return number


class SectionCall(Waitable):
    """One section as its caller sees it; in its first life, the request to enter."""

    def __init__(
        self, section_calls: SectionCalls, asked: SectionEnter, sealed: Sealed, *, wants_all: bool
    ) -> None:
        self._section_calls = section_calls
        self._node = section_calls.node
        self._asked = asked
        self._ident = 0  # of the request
        self._is_withdrawn = False
        self._wants_all = wants_all
        self.future: Future[Any] = Future()
        self.members: list[int] = []
        self.number = 0
        self._sealed: Sealed | None = sealed
        self._calls: dict[int, Future[Any]] = {}
        self._outcomes: dict[int, Any] = {}
        self._left = 0  # members that have not ended
        self._lock = self._node.machine.lock()  # guards the count
        self.where = 1

    @property
    def body(self) -> bytes:
        """The function and its arguments, pickled, until they have been sent."""
        return self._sealed.body if self._sealed is not None else b""

    def enter(self) -> None:
        """Ask to enter.

        Raises:
            ValueError: Process 1 has refused already, as it is this process.
        """
        asked = self._asked
        self._ident = self._section_calls.ask(asked, self)
        if asked.ranks and self.ready and self.error is None and self.value[0] & OUTCOME != OK:
            raise pickle.loads(self.value[1])

    def withdraw(self) -> None:
        """Do not run it, if it has not entered; the future is cancelled then."""
        self._is_withdrawn = True
        if self._ident in self._node.pending:
            send_now(self._node, 1, SectionWithdraw(self._ident))

    def arrived(self) -> None:
        """Go on in a thread that may block: the driver calls this."""
        self._node.turns.background(self._entered)

    def _entered(self) -> None:
        if self.error is not None:
            self._fail(self.error)
            return
        flags, body, _ = self.value
        if flags & OUTCOME != OK:
            self._fail(pickle.loads(body))
            return
        (self.number, self.members), _ = messages.decode(Entered, body)
        self._left = len(self.members)
        if self._is_withdrawn:  # the two have crossed
            for pid in self.members:
                send_now(self._node, 1, SectionOver(self.number, pid, ""))
            self._fail(CancelledError())
            return
        sealed, self._sealed = self._sealed, None
        args = (self.number, self.members, self._wants_all, sealed)
        for pid in self.members:
            try:
                future = self._section_calls.calls.remotecall(run_member, pid, args, {})
            except Exception as exc:  # the worker has died since
                self._outcomes[pid] = exc
                self._one_less(pid, failed=True)
                continue
            self._calls[pid] = future
            self._section_calls.idents.add(future.id)
            hook = partial(self._member_ended, pid, future)
            if not future._hook(hook):
                hook()

    def _member_ended(self, pid: int, future: Future[Any]) -> None:
        """Count. Called by the driver: what came is looked at elsewhere."""
        self._section_calls.idents.discard(future.id)
        self._one_less(pid, future.error is not None or future._outcome() == FAILED)

    def _one_less(self, pid: int, failed: bool) -> None:
        with self._lock:
            self._left -= 1
            last = not self._left
        if last:
            self._node.turns.background(self._finish)
        elif failed:
            self._node.turns.background(lambda: self._outcome_of(pid))

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
            send_now(self._node, 1, SectionOver(self.number, pid, in_short(outcome)))
        return outcome

    def _finish(self) -> None:
        outcomes = [self._outcome_of(pid) for pid in self.members]
        self._calls.clear()
        if not any(isinstance(o, (Failed, Exception)) for o in outcomes):
            self.future.put(outcomes if self._wants_all else outcomes[0])
            return
        try:
            self._fail(self._judge())
        except Exception as exc:  # process 1 is gone, and we with it
            self._fail(exc)

    def _judge(self) -> BaseException:
        """Make the error of the members that failed by themselves, not of those they drew in."""
        slot = Slot()
        self._section_calls.ask(AskVerdict(self.number), slot)
        self._node.wait(slot)
        if slot.error is not None:
            raise slot.failure()
        (culprit, killed, grace), _ = messages.decode(Verdict, slot.value[1])
        first = self._outcomes.get(culprit)
        by_itself = not (isinstance(first, Failed) and (first.consequence or first.from_mpi))
        own: list[Exception] = []
        drawn: dict[int, Exception] = {}
        for pid in self.members:
            outcome = self._outcomes[pid]
            if isinstance(outcome, Failed):
                if outcome.consequence or (outcome.from_mpi and by_itself and pid != culprit):
                    drawn[pid] = _errors.decode_error(outcome.error)
                else:
                    own.append(_errors.decode_error(outcome.error))
            elif isinstance(outcome, ProcessExitedException) and pid in killed:
                drawn[pid] = outcome
            elif isinstance(outcome, Exception):
                own.append(outcome)
        if not own:  # a process that is no longer a member drew all in
            own = [drawn[culprit]] if culprit in drawn else list(drawn.values())
        if killed:
            who = ", ".join(map(str, sorted(killed)))
            own[0].add_note(f"Still inside MPI {grace:g} s later, and killed: {who}.")
        return own[0] if len(own) == 1 else CompositeException.of_processes("spmd failed", own)

    def _fail(self, error: BaseException) -> None:
        self._section_calls.futures.fail(self.future, error)


class SectionCalls(Service):
    """The sections that this process asks for."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.futures = node.service(Futures)
        self.calls = node.service(Calls)
        self.idents: set[int] = set()  # of the calls to members
        self._members = node.service(SectionMembers)
        self._packing = node.service(FunctionPacking)

    def submit(
        self,
        f: Callable[..., object],
        args: tuple[object, ...],
        kw: dict[str, object],
        terms: SectionTerms,
    ) -> Future[Any]:
        """Do what the public `spmd.submit` says."""
        section = self.prepare(f, args, kw, terms)
        section.enter()
        return section.future

    def prepare(
        self,
        f: Callable[..., object],
        args: tuple[object, ...],
        kw: dict[str, object],
        terms: SectionTerms,
    ) -> SectionCall:
        """Check and pickle a section that has still to ask to enter."""
        if not callable(f):
            raise TypeError(f"a function is needed to call, not {f!r}")
        grace, seed = terms.grace, terms.seed
        if isinstance(grace, bool) or not isinstance(grace, (int, float)) or grace < 0:
            raise ValueError(f"grace is a number of seconds, not {grace!r}")
        ranks = 0 if terms.ranks is None else checked_ranks(terms.ranks)
        machine = self.node.machine
        number = random_numbers.draw(machine) if seed is None else random_numbers.checked(seed)
        members = self._listed(terms.pids, any_will_do=bool(ranks))
        self._refuse_own_members(members, ranks)
        sealed = self._packing.seal(f, args, kw, number)
        asked = SectionEnter(members, float(grace), ranks)
        return SectionCall(self, asked, sealed, wants_all=terms.wants_all)

    def _listed(self, pids: Any, *, any_will_do: bool) -> list[int]:
        """List the workers that are named; none are, if any will do: process 1 knows them."""
        self.node.start()
        self.node.admit()
        if pids is None:
            self.node.await_workers()
            return [] if any_will_do else self.node.workers()
        if isinstance(pids, str):
            pids = self.node.members.tagged(pids)
        elif hasattr(pids, "__index__"):
            pids = [pids]
        elif callable(getattr(pids, "workers", None)):  # a pool
            pids = pids.workers()
        listed = [int(pid.__index__()) for pid in pids]
        if not listed:
            raise ValueError("spmd needs at least one worker")
        if len(set(listed)) < len(listed):
            raise ValueError(f"spmd runs once on each worker, but {listed} names one twice")
        for pid in listed if not any_will_do else ():
            if pid != self.node.me:
                self.node.peer(pid)
        return sorted(listed)

    def _refuse_own_members(self, members: Sequence[int], ranks: int) -> None:
        """Refuse a section that would wait for ever for one of its own members to leave it."""
        run = self._members.run_here()
        inside = set(run.pids) if run is not None else set()
        if ranks:
            others = set(members or self.node.workers()) - inside
            if inside and len(others) < ranks:
                raise RuntimeError(
                    f"{ranks} ranks are needed, and only {len(others)} workers are outside of the "
                    "spmd section that this call was made from: the others cannot enter another "
                    "before it ends"
                )
            return
        shared = sorted(inside & set(members))
        if shared:
            raise RuntimeError(
                f"workers {shared} are inside the spmd section that this call was made from: they "
                "cannot enter another before it ends"
            )

    def ask(self, message: NamedTuple, slot: Waitable) -> int:
        """Send a request to process 1; its answer completes the slot. Return its number."""
        node = self.node
        if node.me != 1:
            node.peer(1)  # or its error
        ident = next(node.ids)
        slot.where = 1
        node.pending[ident] = slot
        send_now(node, 1, message, ident)
        return ident
