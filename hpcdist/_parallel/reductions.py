"""Parts combined up a tree, in order; arrays in place."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType
from typing import Any

from hpcdist import _errors
from hpcdist._errors import CompositeException
from hpcdist._parallel import habits, shipping, trees
from hpcdist._parallel.calling import hurry, in_user, result_of
from hpcdist._parallel.trees import DEAD, FAILED, OK, REDUCE, Job, Outcome, Root
from hpcdist._runtime import references
from hpcdist._runtime.node import node
from hpcdist._runtime.references import outgoing
from hpcdist._runtime.turns import Call
from hpcdist._transport.contracts import Slot
from hpcdist._wire import codec
from hpcdist._wire.codec import Payload
from hpcdist._wire.frames import Buffer

_FLAT_MOST = 8  # up to so many are told by the root itself: quicker than from hand to hand
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


def reduce(
    op: Callable[[Any, Any], Any], f: Callable[..., Any], /, *args: Any, pids: Any = None
) -> Any:
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
    listed = listed_pids(pids)
    if not callable(op):
        raise TypeError(f"an operator of two arguments is needed, not {op!r}")
    parcel = codec.dumps((shipping.ship(f), shipping.ship(op), args))
    return run(REDUCE, listed, parcel, lambda _: parcel, f, op, "reduce failed")


def listed_pids(pids: Any) -> list[int]:
    """List the processes a user named; all workers, if none."""
    node.start()
    if node.refusal:
        raise RuntimeError(node.refusal)
    if pids is None:
        return node.members.workers()
    listed = [pids] if isinstance(pids, int) else [int(p) for p in pids]
    if not listed:
        raise ValueError("no process is named")
    for pid in listed:
        if pid != node.me:
            node.peer(pid)
    return listed


def run(
    kind: int,
    pids: Sequence[int],
    common: Payload | None,
    payloads: Callable[[int], Payload],
    f: Any,
    op: Callable[[Any, Any], Any],
    message: str,
) -> Any:
    """Have a job done by all and return its combined result.

    Args:
        kind: What is to be done.
        pids: Who does it, in the order of combining.
        common: What all are told, if they are told the same.
        payloads: What each is told, by position.
        f: What they run.
        op: Combines two results.
        message: Of the error, when several fail.
    """
    count = len(pids)
    here = count <= _HERE_MOST and _is_known(op) and habits.are_light(f)
    if node.topology == "all_to_all" and not here:
        root = Root(kind, pids, combines=True)
        branches = [trees.doubling(pids, 0, count)]
    else:  # or workers may not talk to each other: their parts are combined here
        root = Root(kind, pids, combines=False)
        branches = trees.flat(pids, range(count))
    if common is None or count <= _FLAT_MOST or not root.combines:
        root.begin_flat(payloads, branches)
    else:
        root.begin(common, branches)
    outcomes = root.wait()
    raise_failures(outcomes, message)
    results = [result_of(outcome) for outcome in outcomes.values()]
    habits.weigh(f, root.nbytes)
    try:
        return _as_up_a_tree(op, results, 0, len(results))
    except (Exception, SystemExit) as exc:  # as if a worker had combined them
        error = _errors.encode_error(exc, node.me)
    raise _errors.decode_error(error)


def _is_known(op: Any) -> bool:
    """Tell whether an operator is Python's or numpy's own; others are run on the workers."""
    if type(op) is BuiltinFunctionType:
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and type(op) is numpy.ufunc


def _as_up_a_tree(op: Callable[[Any, Any], Any], parts: Sequence[Any], first: int, end: int) -> Any:
    """Combine parts in the pairs in which `trees.doubling` does: sums of floats are the same."""
    value = parts[first]
    start, size = first + 1, 1
    while start < end:
        value = combine(op, value, _as_up_a_tree(op, parts, start, min(start + size, end)))
        start, size = start + size, 2 * size
    return value


def raise_failures(outcomes: dict[int, Any], message: str) -> None:
    """Raise what went wrong, if anything did: one error by itself, several together."""
    found = [
        result_of(outcome).error for outcome in outcomes.values() if outcome[0] in (FAILED, DEAD)
    ]
    if len(found) > 1:
        raise CompositeException(message, found)
    if found:
        raise found[0]


# On each process


def start(unpack: Callable[[Any, Sequence[Buffer], int], tuple[Any, Any]]) -> trees.Starter:
    """Make the starter of a job whose parts are combined.

    Args:
        unpack: Makes (thunk of our own part, operator) of a body, buffers and position.
    """

    def starter(job: Job, body: Any, buffers: Sequence[Buffer], refs: Any) -> None:
        call = Call(_run, None, 0, 0, 0, (job, unpack, body), buffers)
        call.refs = refs
        node.turns.submit(call)

    return starter


def _unpack(body: Any, buffers: Sequence[Buffer], position: int) -> tuple[Any, Any]:
    f, op, args = codec.loads(body, buffers)
    made = shipping.unship(f)
    return lambda: made(*args), shipping.unship(op)


trees.starters[REDUCE] = start(_unpack)


def _run(call: Call) -> None:
    """Do our share, and put the shares below behind it. Runs on a thread that holds a turn."""
    job: Job = call.body[0]
    failures: list[Outcome] = []
    value = op = None
    try:
        try:
            in_user(call, True)
            part, op = call.body[1](call.body[2], call.buffers, job.key[2])
            value = part()
        finally:
            in_user(call, False)
    except BaseException as exc:  # the edge of a call: it belongs to the caller
        failures.append(_failure(job, exc))
    ours = False  # whether `value` is memory of ours, which may be written to
    for slot in job.slots.values():
        try:
            node.wait(slot)
            bad = [o for o in slot.value[0] if o[1] != OK]
            if bad or failures:
                failures += bad
                continue
            try:
                in_user(call, True)
                value, ours = _put_behind(op, value, ours, slot)
            finally:
                in_user(call, False)
        except BaseException as exc:  # as above
            failures.append(_failure(job, exc))
    if not failures:
        try:
            parcel = codec.dumps(value) if value is not None else Payload(b"")
        except Exception as exc:
            failures.append(_failure(job, exc))
    if failures:
        job.fail(failures)
        hurry(call)
    else:
        _hand_up(call, parcel, ours)


def _failure(job: Job, error: BaseException) -> Outcome:
    return job.key[2], FAILED, _errors.encode_error(error, node.me), 0, False


def _put_behind(op: Any, left: Any, ours: bool, slot: Slot) -> tuple[Any, bool]:
    outcomes, buffers = slot.value
    slot.value = None
    _, _, body, _, with_refs = outcomes[0]
    refs: Any = ()
    if with_refs:
        refs, body = references.arrive(body)
    right = codec.loads(body, buffers) if len(body) else None
    combined = combine(op, left, right, ours)
    del refs
    return combined, ours or combined is right


def _hand_up(call: Call, parcel: Payload, ours: bool) -> None:
    job: Job = call.body[0]
    assert job.above is not None
    held = None
    if parcel.buffers and not ours:
        # The worker may go on using this array: hold the thread until it has been sent.
        held = Slot()
        job.through = lambda: node.progress.complete(held)
    job.done(OK, *outgoing(parcel, job.above[0]))
    hurry(call)
    while held is not None and not held.ready:
        try:
            node.progress.wait(held)
        except KeyboardInterrupt:  # too late for the function
            continue


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
