"""A call on many processes, handed down a tree: what `everywhere` is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import CoroutineType
from typing import Any

from hpcdist import _errors
from hpcdist._parallel import shipping, trees
from hpcdist._parallel.trees import CALL, DEAD, FAILED, OK, Job, Root
from hpcdist._remote import calls
from hpcdist._runtime import references
from hpcdist._runtime.node import node
from hpcdist._runtime.references import outgoing
from hpcdist._runtime.turns import MAIN, Call
from hpcdist._wire import codec
from hpcdist._wire.codec import Payload
from hpcdist._wire.frames import Buffer

_ASYNC = b"a"


class CallOnMany:
    """A call under way on several processes other than this one."""

    def __init__(self, f: Callable[..., Any], args: Any, kw: Any, pids: Sequence[int]) -> None:
        """Send it.

        Args:
            f: The function; `args` and `kw` go with it.
            pids: Where to call it; one named twice calls it twice.
        """
        self.pids = pids
        self._root = Root(CALL, pids, combines=False)
        parcel = shipping.pack_call(f, args, kw)
        body = (_ASYNC if shipping.is_async(f) else b"-") + parcel.body
        shape = trees.fan if node.topology == "all_to_all" else trees.flat
        self._root.begin(Payload(body, parcel.buffers, parcel.refs), shape(pids, range(len(pids))))

    def results(self) -> list[Any]:
        """Wait for all; return results and errors (instances of HpcdistError) by position."""
        outcomes = self._root.wait()
        return [result_of(outcomes[k]) for k in range(len(self.pids))]


def result_of(outcome: tuple[int, Any, Sequence[Buffer], bool]) -> Any:
    """Make the result, or the error, of an outcome."""
    status, body, buffers, with_refs = outcome
    if status == DEAD:
        return Failure(trees.death_of(body))
    if status == FAILED:
        return Failure(_errors.decode_error(bytes(body)))
    if not body:
        return None
    refs: Any = ()
    if with_refs:
        refs, body = references.arrive(body)
    value = codec.loads(body, buffers)
    del refs
    return value


class Failure:
    """An error in the place of a result: a result may be an exception as well."""

    __slots__ = ("error",)

    def __init__(self, error: Exception) -> None:
        self.error = error


def _start(job: Job, body: Any, buffers: Sequence[Buffer], refs: Any) -> None:
    """Queue the call; on the event loop, if it is a coroutine's."""
    call = Call(_run, None, 0, 0, 0, (job, body[1:]), buffers)
    call.refs = refs
    if bytes(body[:1]) == _ASYNC:

        async def begin() -> Any:
            f, args, kw = shipping.unpack_call(body[1:], buffers)
            return await f(*args, **kw)

        calls._event_loop().start(begin, lambda value, error: _end(call, value, error))
    else:
        node.turns.submit(call)


trees.starters[CALL] = _start


def _run(call: Call) -> None:
    error: BaseException | None = None
    value = None
    try:
        try:
            in_user(call, True)
            f, args, kw = shipping.unpack_call(call.body[1], call.buffers)
            value = f(*args, **kw)
        finally:
            in_user(call, False)
    except BaseException as exc:  # the edge of a call: it belongs to the caller
        error = exc
    if type(value) is CoroutineType:
        calls._event_loop().start(lambda: value, lambda v, e: _end(call, v, e))
        return
    _end(call, value, error)


def _end(call: Call, value: Any, error: BaseException | None) -> None:
    job: Job = call.body[0]
    while True:
        try:
            _hand_up(job, value, error)
            break
        except KeyboardInterrupt:  # an interrupt that came too late for the function
            continue
    hurry(call)


def hurry(call: Call) -> None:
    """See that what a call has posted leaves."""
    if node.turns.about_to_wait(call):
        node.progress.flush()  # now, rather than when the wait has begun
    else:
        node.progress.nudge()


def in_user(call: Call, inside: bool) -> None:
    """Say whether the main thread is in a user's function: only there is SIGINT for it."""
    if call.thread == MAIN:
        node.turns.main_in_call = inside


def _hand_up(job: Job, value: Any, error: BaseException | None) -> None:
    if error is None:
        try:
            parcel = codec.dumps(value).own() if value is not None else Payload(b"")
        except Exception as exc:
            error = exc
        else:
            job.done(OK, *outgoing(parcel, job.key[0]))
            return
    job.done(FAILED, _errors.encode_error(error, node.me))
