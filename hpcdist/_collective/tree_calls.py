"""A call on many processes, handed down a tree: what `everywhere` is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hpcdist import _errors
from hpcdist._collective.function_packing import FunctionPacking
from hpcdist._collective.trees import CALL, DEAD, FAILED, OK, Job, Result, Root, Trees
from hpcdist._runtime.node import Node, Service
from hpcdist._runtime.references import Reference, References
from hpcdist._runtime.running import Runners, Unpacked
from hpcdist._runtime.turns import Call
from hpcdist._wire import codec, object_paths
from hpcdist._wire.codec import Payload
from hpcdist._wire.frames import Body, Buffer

_ASYNC = b"a"


class Failure:
    """An error in the place of a result: a result may be an exception as well."""

    __slots__ = ("error",)

    def __init__(self, error: Exception) -> None:
        self.error = error


class CallOnMany:
    """A call under way on several processes other than the caller's."""

    def __init__(self, tree_calls: TreeCalls, root: Root) -> None:
        self._tree_calls = tree_calls
        self._root = root

    def results(self) -> list[Any]:
        """Wait for all; return results and errors (instances of HpcdistError) by position."""
        outcomes = self._root.wait()
        return [self._tree_calls.result_of(outcomes[k]) for k in range(len(self._root.pids))]


class TreeCalls(Service):
    """The calls that this process sends down a tree, and its own share in those of others."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._references = node.service(References)
        self._trees = node.service(Trees)
        self._packing = node.service(FunctionPacking)
        self._trees.starters[CALL] = self._start
        self._runner = node.service(Runners).of(self._unpack, self._answer)

    # The caller

    def call(
        self, f: Callable[..., Any], args: object, kw: object, pids: Sequence[int]
    ) -> CallOnMany:
        """Send a call to several other processes.

        Args:
            f: The function; `args` and `kw` go with it.
            args: Its arguments.
            kw: Its keyword arguments.
            pids: Where to call it; one named twice calls it twice.
        """
        root = Root(self._trees, CALL, pids, combines=False)
        parcel = self._packing.pack_call(f, args, kw)
        body = (_ASYNC if self._packing.is_async(f) else b"-") + parcel.body
        branches = self._trees.fan_or_flat(pids)
        root.begin(Payload(body, parcel.buffers, parcel.refs), branches)
        return CallOnMany(self, root)

    def result_of(self, outcome: Result) -> Any:
        """Make the result, or the error, of an outcome."""
        status, body, buffers, with_refs = outcome
        if status == DEAD:
            return Failure(self._trees.death_of(body))
        if status == FAILED:
            return Failure(_errors.decode_error(bytes(body)))
        if not body:
            return None
        refs: Sequence[Reference] = ()
        if with_refs:
            refs, body = self._references.arrive(body)
        value = codec.loads(body, buffers)
        del refs
        return value

    # Those called

    def _start(
        self, job: Job, body: Body, buffers: Sequence[Buffer], refs: Sequence[Reference]
    ) -> None:
        """Queue the call; on the event loop, if it is a coroutine's."""
        call = Call(self._runner.run, None, 0, 0, 0, (job, body[1:]), buffers)
        call.refs = refs
        if bytes(body[:1]) == _ASYNC:
            self._runner.start(call)
        else:
            self.node.turns.submit(call)

    def _unpack(self, call: Call) -> Unpacked:
        f, args, kw = self._packing.unpack_call(call.body[1], call.buffers)
        return f, args, kw

    def _answer(self, call: Call, value: object, error: BaseException | None) -> None:
        self._hand_up(call.body[0], value, error)
        self.hurry(call)

    def hurry(self, call: Call) -> None:
        """See that what a call has posted leaves."""
        if self.node.turns.about_to_wait(call):
            self.node.progress.flush()  # now, rather than when the wait has begun
        else:
            self.node.progress.nudge()

    def _hand_up(self, job: Job, value: object, error: BaseException | None) -> None:
        if error is None:
            try:
                result = _EMPTY if value is None else object_paths.dumps(value, "the result")
            except Exception as exc:
                error = exc
            else:
                job.done(OK, *self._references.outgoing(result.own(), job.key.root))
                return
        job.done(FAILED, _errors.encode_error(error, self.node.me))


_EMPTY = Payload(b"")
