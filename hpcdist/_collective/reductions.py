"""Parts combined up a tree, in order; arrays in place."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType
from typing import Any, TypeVar

from hpcdist import _errors
from hpcdist._collective import trees
from hpcdist._collective.function_packing import FunctionPacking
from hpcdist._collective.tree_calls import TreeCalls
from hpcdist._collective.trees import (
    DEAD,
    FAILED,
    OK,
    REDUCE,
    Job,
    Outcome,
    Result,
    Root,
    Starter,
    Trees,
)
from hpcdist._errors import CompositeException, RemoteException
from hpcdist._frames import brief
from hpcdist._hints import suggesting
from hpcdist._items import item_names
from hpcdist._items.timings import Timings
from hpcdist._public import public
from hpcdist._runtime.node import Node, Service
from hpcdist._runtime.references import Reference, References
from hpcdist._runtime.running import Runners
from hpcdist._runtime.turns import Call
from hpcdist._transport.contracts import Slot
from hpcdist._typing import Pids
from hpcdist._wire import codec, generators, object_paths
from hpcdist._wire.codec import Payload
from hpcdist._wire.frames import Body, Buffer

_FLAT_MOST = 8  # the root sends to up to so many itself: quicker than from hand to hand
_HERE_MOST = 8  # the small parts of so many are combined by the root itself

# Operators whose result on two arrays can be written over one of them, and numpy's name for each.
# `min` and `max` of two arrays have no other meaning than element by element.
_IN_PLACE: dict[Any, str] = {
    operator.add: "add",
    operator.iadd: "add",
    operator.mul: "multiply",
    operator.imul: "multiply",
    operator.and_: "bitwise_and",
    operator.or_: "bitwise_or",
    operator.xor: "bitwise_xor",
    min: "minimum",
    max: "maximum",
}
_UFUNCS = {"add", "multiply", "maximum", "minimum", "fmax", "fmin", "bitwise_and", "bitwise_or"}


R = TypeVar("R")


@public
@brief
@suggesting
def reduce(
    op: Callable[[Any, Any], Any], f: Callable[..., R], /, *args: object, pids: Pids = None
) -> R:
    """Call `f(*args)` on each process and combine the results with `op` on the way back.

    Args:
        op: A function of two results, associative. Arrays are added, multiplied, compared in
            place where it is one of Python's or numpy's operators for that.
        f: What each process calls.
        pids: Which processes, in the order of combining; default all workers.

    Raises:
        RemoteException: A call failed; several failures are a CompositeException.
        ProcessExitedException: A process died.

    Example:
        >>> import operator, hpcdist
        >>> hpcdist.reduce(operator.add, hpcdist.myid, pids=[1])
        1
    """
    combined: R = Reductions.here().reduce(op, f, args, pids)
    return combined


def listed_pids(node: Node, pids: Pids) -> list[int]:
    """List the processes a user named; all workers, if none."""
    node.start()
    node.admit()
    if pids is None:
        return node.workers()
    listed = [pids] if isinstance(pids, int) else [int(p) for p in pids]
    if not listed:
        raise ValueError("no process is named")
    for pid in listed:
        if pid != node.me:
            node.peer(pid)
    return listed


class Reductions(Service):
    """The reductions that this process begins, and its own share in those of others."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._references = node.service(References)
        self._runners = node.service(Runners)
        self._packing = node.service(FunctionPacking)
        self._trees = node.service(Trees)
        self._tree_calls = node.service(TreeCalls)
        self._timings = node.service(Timings)
        self._trees.starters[REDUCE] = self.starter(self._unpack)

    # The root

    def reduce(self, op: Any, f: Any, args: tuple[object, ...], pids: Pids) -> Any:
        """Do what the public `reduce` says."""
        listed = listed_pids(self.node, pids)
        if not callable(op):
            raise TypeError(f"an operator of two arguments is needed, not {op!r}")
        shipped = self._packing.ship(f), self._packing.ship(op), args
        parcel = object_paths.dumps_call(shipped, f, args)
        generators.warn_of_copies(f, [parcel.body])
        return self.run(REDUCE, listed, parcel, lambda _: parcel, f, op, "reduce failed")

    def run(
        self,
        kind: int,
        pids: Sequence[int],
        common: Payload | None,
        payloads: Callable[[int], Payload],
        f: object,
        op: Callable[[Any, Any], Any],
        message: str,
        sizes: Sequence[int] = (),
    ) -> Any:
        """Have a job done by all and return its combined result.

        Args:
            kind: What is to be done.
            pids: The processes that do it, in the order of combining.
            common: The payload for all, if it is the same.
            payloads: The payload for each, by position.
            f: What they run.
            op: Combines two results.
            message: Of the error, when several fail.
            sizes: How many items of a loop each has.
        """
        count = len(pids)
        here = count <= _HERE_MOST and _is_known(op) and self._timings.are_light(f)
        if self.node.topology == "all_to_all" and not here:
            root = Root(self._trees, kind, pids, combines=True)
            branches = [trees.doubling(pids, 0, count)]
        else:  # or workers may not talk to each other: their parts are combined here
            root = Root(self._trees, kind, pids, combines=False)
            branches = trees.flat(pids, range(count))
        if common is None or count <= _FLAT_MOST or not root.combines:
            root.begin_flat(payloads, branches)
        else:
            root.begin(common, branches)
        outcomes = root.wait()
        self.raise_failures(outcomes, message, sizes)
        results = [self._tree_calls.result_of(outcome) for outcome in outcomes.values()]
        self._timings.weigh(f, root.nbytes)
        try:
            return _as_up_a_tree(op, results, 0, len(results))
        except (Exception, SystemExit) as exc:  # as if a worker had combined them
            error = _errors.encode_error(exc, self.node.me)
        raise _errors.decode_error(error)

    def raise_failures(
        self, outcomes: dict[int, Any], message: str, sizes: Sequence[int] = ()
    ) -> None:
        """Raise what went wrong, if anything did: one error by itself, several together."""
        found = [
            self._error_of(position, outcome, sizes)
            for position, outcome in outcomes.items()
            if outcome.how in (FAILED, DEAD)
        ]
        try:
            if len(found) > 1:
                raise CompositeException.of_processes(message, found)
            if found:
                raise found[0]
        finally:
            found.clear()  # this frame is one of their traceback

    def _error_of(self, position: int, outcome: Result, sizes: Sequence[int]) -> Exception:
        error: Exception = self._tree_calls.result_of(outcome).error
        if isinstance(error, RemoteException):
            item_names.take_over(error, error.cause)
        elif sizes:
            start = sum(sizes[:position])
            last = start + sizes[position] - 1
            error.add_note(f"It had the items {start} to {last} of the loop")
        return error

    # On each process

    def starter(self, unpack: Callable[[Any, Sequence[Buffer], int], tuple[Any, Any]]) -> Starter:
        """Make the starter of a job whose parts are combined.

        Args:
            unpack: Makes (thunk of our own part, operator) of a body, buffers and position.
        """

        def start(
            job: Job, body: Body, buffers: Sequence[Buffer], refs: Sequence[Reference]
        ) -> None:
            call = Call(self._run, None, 0, 0, 0, (job, unpack, body), buffers)
            call.refs = refs
            self.node.turns.submit(call)

        return start

    def _run(self, call: Call) -> None:
        """Do our share, and put the shares below behind it. Runs on a thread that holds a turn."""
        job: Job = call.body[0]
        failures: list[Outcome] = []
        value = op = None
        try:
            value, op = self._runners.openly(call, _part_of, call)
        except BaseException as exc:  # the edge of a call: it belongs to the caller
            failures.append(self._failure(job, exc))
        ours = False  # whether `value` is memory of ours, which may be written to
        for slot in job.slots.values():
            try:
                self.node.wait(slot)
                bad = [o for o in slot.value[0] if o.how != OK]
                if bad or failures:
                    failures += bad
                    continue
                value, ours = self._runners.openly(call, self._put_behind, op, value, ours, slot)
            except BaseException as exc:  # as above
                failures.append(self._failure(job, exc))
        if not failures:
            try:
                parcel = (
                    object_paths.dumps(value, "the result") if value is not None else Payload(b"")
                )
            except Exception as exc:
                failures.append(self._failure(job, exc))
        if failures:
            job.fail(failures)
            self._tree_calls.hurry(call)
        else:
            self._hand_up(call, parcel, ours)

    def _unpack(self, body: Body, buffers: Sequence[Buffer], position: int) -> tuple[Any, Any]:
        f, op, args = codec.loads(body, buffers)
        made = self._packing.unship(f)
        return lambda: made(*args), self._packing.unship(op)

    def _failure(self, job: Job, error: BaseException) -> Outcome:
        return Outcome(job.key.position, FAILED, _errors.encode_error(error, self.node.me))

    def _put_behind(self, op: object, left: object, ours: bool, slot: Slot) -> tuple[Any, bool]:
        outcomes, buffers = slot.value
        slot.value = None
        body = outcomes[0].what
        refs: Sequence[Reference] = ()
        if outcomes[0].with_refs:
            refs, body = self._references.arrive(body)
        right = codec.loads(body, buffers) if len(body) else None
        combined = combine(op, left, right, ours)
        del refs
        return combined, ours or combined is right

    def _hand_up(self, call: Call, parcel: Payload, ours: bool) -> None:
        job: Job = call.body[0]
        assert job.above is not None
        held = None
        if parcel.buffers and not ours:
            # The worker may go on using this array: hold the thread until it has been sent.
            held = Slot()
            job.through = lambda: self.node.progress.complete(held)
        job.done(OK, *self._references.outgoing(parcel, job.above[0]))
        self._tree_calls.hurry(call)
        while held is not None and not held.ready:
            try:
                self.node.progress.wait(held)
            except KeyboardInterrupt:  # too late for the function
                continue


def _part_of(call: Call) -> tuple[Any, Any]:
    """Make our own part; return it and the operator."""
    job, unpack, body = call.body
    part, op = unpack(body, call.buffers, job.key.position)
    return part(), op


def _is_known(op: object) -> bool:
    """Tell whether an operator is Python's or numpy's own; others are run on the workers."""
    if type(op) is BuiltinFunctionType:
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and type(op) is numpy.ufunc


def _as_up_a_tree(
    op: Callable[[Any, Any], Any], parts: Sequence[object], first: int, end: int
) -> Any:
    """Combine parts in the pairs in which `trees.doubling` does: sums of floats are the same."""
    value = parts[first]
    start, size = first + 1, 1
    while start < end:
        value = combine(op, value, _as_up_a_tree(op, parts, start, min(start + size, end)))
        start, size = start + size, 2 * size
    return value


def combine(op: Any, left: Any, right: Any, left_is_ours: bool = False) -> Any:
    """Combine two parts; two like arrays in the memory of the second, which is always ours."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and type(left) is numpy.ndarray and type(right) is numpy.ndarray:
        ufunc = _in_place(numpy, op)
        if ufunc is not None and left.dtype == right.dtype and left.shape == right.shape:
            out = left if left_is_ours else right
            if out.flags.writeable and out.ndim:
                return ufunc(left, right, out=out)
    return op(left, right)


def _in_place(numpy: Any, op: Any) -> Any:
    try:
        name = _IN_PLACE.get(op)
    except TypeError:  # a callable that cannot be hashed
        return None
    if name is not None:
        return getattr(numpy, name)
    if isinstance(op, numpy.ufunc) and op.__name__ in _UFUNCS:
        return op
    return None
