"""Calls: a function runs on another process; its result comes back, stays there, or is dropped."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from types import CoroutineType
from typing import TYPE_CHECKING, Any

from hpcdist import _errors
from hpcdist._remote.cells import send_outcome, settle
from hpcdist._remote.futures import Future
from hpcdist._runtime import references
from hpcdist._runtime.controls import INTERRUPT
from hpcdist._runtime.node import node
from hpcdist._runtime.references import outgoing
from hpcdist._runtime.turns import MAIN, Call
from hpcdist._transport.contracts import Slot
from hpcdist._transport.router import Peer
from hpcdist._wire import codec, functions
from hpcdist._wire.codec import Payload
from hpcdist._wire.frames import (
    ASYNC,
    CALL,
    DEFINES,
    DO,
    EXTRAS,
    FAILED,
    FETCH,
    FUTURE,
    HEAD,
    KEYWORDS,
    OK,
    OURS,
    OUTCOME,
    REFS,
    RESULT,
    WANTS,
    Buffer,
    pack,
)

if TYPE_CHECKING:
    from hpcdist._runtime.loop import Loop

ANY = "any"

_describe = functions.describe
_head = HEAD.pack


class Lender:
    """What a call may name in place of a process: it lends one for as long as the call takes."""

    def _hpcdist_lend(self, how: Callable[..., Any], f: Any, args: Any, kw: Any) -> Any:
        """Make the call `how(f, pid, *args, **kw)` on a process of its choice."""
        raise NotImplementedError


def remotecall(f: Callable[..., Any], where: Any, /, *args: Any, **kw: Any) -> Future:
    """Start `f(*args, **kw)` on a process and return its future at once.

    Args:
        f: The function. Importable ones go by name, others by value.
        where: A pid, `ANY` for the workers in turn, or a pool.

    Raises:
        ValueError: There is no such process.
        ProcessExitedException: It is dead.

    Example:
        >>> import hpcdist
        >>> hpcdist.remotecall(sum, hpcdist.ANY, [1, 2, 3]).fetch()
        6
    """
    if type(where) is not int and isinstance(where, Lender):
        lent: Future = where._hpcdist_lend(remotecall, f, args, kw)
        return lent
    pid = where if type(where) is int else _resolve(where)
    ident = next(node.ids)
    future = Future._of_call(pid, ident)
    if pid == node.me:
        _call_here(f, args, kw, ident, FUTURE, future)
        return future
    peer = node.peer(pid)
    node.pending[ident] = future
    try:
        _send(peer, FUTURE, ident, f, args, kw)
    except BaseException:
        node.pending.pop(ident, None)
        future._held = 0
        raise
    if peer.alive:
        peer.hurry()
    else:
        node.fail(ident, future)
    return future


def remotecall_fetch(f: Callable[..., Any], where: Any, /, *args: Any, **kw: Any) -> Any:
    """Run `f(*args, **kw)` on a process and return its result.

    Raises:
        RemoteException: The function raised; it is also an instance of what was raised.
        ProcessExitedException: The process died.

    Example:
        >>> import hpcdist
        >>> hpcdist.remotecall_fetch(len, 1, "four")
        4
    """
    if type(where) is not int and isinstance(where, Lender):
        return where._hpcdist_lend(remotecall_fetch, f, args, kw)
    pid = where if type(where) is int else _resolve(where)
    slot = Slot(pid)
    ident = next(node.ids)
    if pid == node.me:
        _call_here(f, args, kw, ident, FETCH, slot)
    else:
        peer = node.peer(pid)
        if peer.plane is not None:
            peer.plane.rouse(peer.rank)  # it wakes while we get ready
        node.pending[ident] = slot
        try:
            known = _describe(f)
            if known is not None and known.plain and known.ident in peer.known and not (args or kw):
                # What a wait begins with is done while the call travels.
                peer.dispatch(_head(CALL, FETCH | known.flags, 0, 0, ident, known.ident))
            else:
                _send(peer, FETCH, ident, f, args, kw)
                node.progress.flush()
        except BaseException:
            node.pending.pop(ident, None)
            raise
        if not peer.alive:
            node.fail(ident, slot)
    try:
        node.wait(slot)
    except BaseException:  # Ctrl-C: the call goes on, nobody waits for it
        node.pending.pop(ident, None)
        raise
    if slot.error is not None:
        raise slot.error
    flags, body, buffers = slot.value
    if flags == OK:
        return codec.loads(body, buffers) if len(body) else None
    return _unusual(flags, body, buffers)


def _unusual(flags: int, body: Any, buffers: Sequence[Buffer]) -> Any:
    outcome = flags & OUTCOME
    if outcome == OURS:
        return body
    if outcome == FAILED:
        raise _errors.decode_error(bytes(body))
    refs: Any = ()
    if flags & REFS:
        refs, body = references.arrive(body)
    value = codec.loads(body, buffers) if len(body) else None
    del refs
    return value


def remotecall_wait(f: Callable[..., Any], where: Any, /, *args: Any, **kw: Any) -> Future:
    """Run `f(*args, **kw)` on a process, wait for its end and return its finished future."""
    return remotecall(f, where, *args, **kw).wait()


def remote_do(f: Callable[..., Any], where: Any, /, *args: Any, **kw: Any) -> None:
    """Start `f(*args, **kw)` on a process and forget it; an error is printed there."""
    if type(where) is not int and isinstance(where, Lender):
        where._hpcdist_lend(remote_do, f, args, kw)
        return
    pid = where if type(where) is int else _resolve(where)
    if pid == node.me:
        _call_here(f, args, kw, 0, DO, None)
        return
    peer = node.peer(pid)
    _send(peer, DO, 0, f, args, kw)
    peer.hurry()


def spawnat(p: Any, f: Callable[..., Any], /, *args: Any, **kw: Any) -> Future:
    """Start `f(*args, **kw)` on process `p`: `remotecall` with the process first."""
    return remotecall(f, p, *args, **kw)


def spawn(f: Callable[..., Any], /, *args: Any, **kw: Any) -> Future:
    """Start `f(*args, **kw)` on the next worker."""
    return remotecall(f, ANY, *args, **kw)


def fetchfrom(p: Any, f: Callable[..., Any], /, *args: Any, **kw: Any) -> Any:
    """Run `f(*args, **kw)` on process `p` and return its result."""
    return remotecall_fetch(f, p, *args, **kw)


def fetchany(f: Callable[..., Any], /, *args: Any, **kw: Any) -> Any:
    """Run `f(*args, **kw)` on the next worker and return its result."""
    return remotecall_fetch(f, ANY, *args, **kw)


def sleep(seconds: float) -> None:
    """Sleep, letting other calls of this worker run meanwhile."""
    try:
        node.wait(Slot(), max(0.0, seconds))
    except TimeoutError:
        pass


def interrupt(*pids: int | Sequence[int]) -> None:
    """End every started call of these workers (all, if none is named) with KeyboardInterrupt.

    Queued calls stay, an idle worker is not touched.
    """
    named = [p for item in pids for p in ([item] if isinstance(item, int) else item)]
    meant = named or list(node.members.living)
    for pid in meant:
        if pid == node.me:
            _interrupt_here()
        elif pid not in node.members.gone:
            peer = node.peer(pid)
            peer.control(INTERRUPT)
    node.progress.nudge()
    for pid in meant:
        for fn in node.on_interrupt:
            fn(pid)


def _interrupt_here() -> None:
    node.turns.interrupt()
    if _loop is not None:
        _loop.interrupt()


@node.control(INTERRUPT)
def _on_interrupt(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    _interrupt_here()


def _resolve(where: Any) -> int:
    """Turn what a user may say for a process into its pid."""
    node.start()
    if isinstance(where, str) and where == ANY:
        if node.refusal:
            raise RuntimeError(node.refusal)
        return node.members.next_worker()
    if isinstance(where, bool) or not hasattr(where, "__index__"):
        raise TypeError(f"where to call is a process id or ANY, not {where!r}")
    return int(where.__index__())


# Sending


def _send(peer: Peer, wants: int, ident: int, f: Any, args: Any, kw: Any) -> None:
    """Serialise a call completely, then post it."""
    known = _describe(f)
    if known is not None and known.plain and known.ident in peer.known and not kw:
        body = codec.dump_atoms(args) if args else b""
        if body is not None:
            _post(peer, wants | known.flags, ident, known.ident, body)
            return
    fresh = None
    if known is None:
        if not callable(f):
            raise TypeError(f"a function is needed to call, not {f!r}")
        payload, flags, aux = codec.dumps((f, args, kw)), wants, 0
    else:
        flags, aux = wants | known.flags, known.ident
        fresh = functions.news(known.names, peer.bound) if known.names else None
        if known.varies or fresh:
            variable = functions.captured(f) if known.varies else None
            payload = codec.dumps(((fresh, variable), args, kw))
            flags |= EXTRAS
        elif kw:
            payload = codec.dumps((args, kw))
            flags |= KEYWORDS
        elif args:
            payload = codec.dumps(args)
        else:
            payload = _EMPTY
    if payload.buffers and wants != FETCH:
        payload.own()  # the caller goes on, and may change what it sent
    body = payload.body
    if payload.refs:
        body = references.announce(payload.refs, peer.pid) + body
        flags |= REFS
    if known is not None and known.ident not in peer.known:
        body = len(known.definition).to_bytes(4, "little") + known.definition + body
        flags |= DEFINES
        peer.post(*pack(CALL, flags, ident, aux, body, payload.buffers))
        peer.known.add(known.ident)  # only now: another thread's call must not overtake it
    else:
        _post(peer, flags, ident, aux, body, payload.buffers)
    for name in payload.names:  # functions among the arguments assign these there
        peer.bound.pop(name, None)
    if fresh:
        peer.bound.update(fresh)


def _post(
    peer: Peer, flags: int, ident: int, aux: int, body: bytes, buffers: Sequence[Buffer] = ()
) -> None:
    if buffers or len(body) > _SHORT:
        peer.post(*pack(CALL, flags, ident, aux, body, buffers))
    else:
        peer.post(_head(CALL, flags, 0, len(body), ident, aux) + body)


_EMPTY = Payload(b"")
_SHORT = 1024  # bytes that are cheaper to copy than to look after


# Running


def _on_call(
    peer: Peer, flags: int, ident: int, aux: int, body: Any, buffers: Sequence[Buffer]
) -> None:
    if flags & DEFINES:
        view = memoryview(body)
        size = int.from_bytes(view[:4], "little")
        functions.define(aux, bytes(view[4 : 4 + size]))
        body = view[4 + size :]
    refs: Any = ()
    if flags & REFS:
        refs, body = references.arrive(body)
    call = Call(_run, peer, flags, ident, aux, body, buffers)
    call.refs = refs
    if flags & ASYNC:
        _run_async(call)
    else:
        node.turns.submit(call)


node.on_call = _on_call


def _unpack(call: Call) -> tuple[Any, Any, Any]:
    body, flags = call.body, call.flags
    if not call.aux:
        f, args, kw = codec.loads(body, call.buffers)
        return f, args, kw
    value = codec.loads(body, call.buffers)
    if flags & EXTRAS:
        (fresh, variable), args, kw = value
        if fresh:
            codec.main_globals().update(fresh)
        return functions.function(call.aux, variable), args, kw
    f = functions.function(call.aux)
    if flags & KEYWORDS:
        return f, value[0], value[1]
    return f, value, {}


def _run(call: Call) -> None:
    """Run a call on a thread that holds a turn, and answer."""
    turns = node.turns
    error: BaseException | None = None
    value = None
    # SIGINT is for the user's function alone: what comes before or after must not be torn.
    main = call.thread == MAIN
    try:
        try:
            if main:
                turns.main_in_call = True
            if len(call.body):
                f, args, kw = _unpack(call)
                value = f(*args, **kw) if kw else f(*args)
            else:
                value = functions.function(call.aux)()
        finally:
            if main:
                turns.main_in_call = False
    except BaseException as exc:  # the edge of this process: it belongs to the caller
        error = exc
    if type(value) is CoroutineType:
        _event_loop().start(lambda: value, lambda v, e: _answer(call, v, e))
        return
    _answer(call, value, error)


def _answer(call: Call, value: Any, error: BaseException | None) -> None:
    while True:
        try:
            if error is None:
                _reply(call, value)
            else:
                _reply_error(call, error)
            return
        except KeyboardInterrupt:  # an interrupt that came too late for the function
            continue


def _reply(call: Call, value: Any) -> None:
    wants = call.flags & WANTS
    peer = call.peer
    if wants == DO:
        return
    if value is None and wants == FETCH:
        data = _head(RESULT, OK, 0, 0, call.ident, 0)
        if node.turns.about_to_wait(call):
            peer.dispatch(data)
        else:
            peer.post(data)
            peer.hurry()
        return
    try:
        if type(value) is Payload:  # a batch of results, which pickles itself
            payload = value
        else:
            payload = codec.dumps(value) if value is not None else _EMPTY
    except Exception as exc:
        _reply_error(call, exc)
        return
    if wants == FETCH:
        body, plain, with_refs = outgoing(payload, peer.pid)
        flags = OK | (REFS if with_refs else 0)
        data, parts = pack(RESULT, flags, call.ident, 0, body, plain)
        if parts:
            _post_and_wait(peer, data, parts)
            return
        peer.post(data)
    else:
        settle(peer.pid, call.ident, OK, payload)
        send_outcome(peer, call.ident, OK, payload, whole=False)
    _hurry(call)


def _hurry(call: Call) -> None:
    if node.turns.about_to_wait(call):
        node.progress.flush()
    else:
        call.peer.hurry()


def _post_and_wait(peer: Peer, data: bytes, buffers: Sequence[Buffer]) -> None:
    """Send a large result, and hold this thread until it is through.

    The buffers may be an array that the worker keeps; its next call may write to it.
    """
    through = Slot()
    peer.post(data, buffers, lambda: node.progress.complete(through))
    while peer.alive and not through.ready:
        try:
            node.progress.wait(through)
        except KeyboardInterrupt:  # too late for the function, whose answer this is
            continue


def _reply_error(call: Call, error: BaseException) -> None:
    wants, peer = call.flags & WANTS, call.peer
    if wants == DO:
        _print_error(error)
        return
    data = _errors.encode_error(error, node.me)
    if wants == FUTURE:
        settle(peer.pid, call.ident, FAILED, data)
    peer.post(*pack(RESULT, FAILED, call.ident, 0, data))
    peer.hurry()


def _print_error(error: BaseException) -> None:
    print("".join(traceback.format_exception(error)), end="", file=sys.stderr, flush=True)


# Calls to oneself: nothing is pickled


def _call_here(f: Any, args: Any, kw: Any, ident: int, wants: int, waiter: Any) -> None:
    if node.refusal:
        raise RuntimeError(node.refusal)
    if not callable(f):
        raise TypeError(f"a function is needed to call, not {f!r}")
    node.start()
    for item in (*args, *kw.values()):
        if type(item) in _stays_here:
            raise TypeError(_stays_here[type(item)])
    if arrives_as:
        args = [arrives_as[type(a)](a) if type(a) in arrives_as else a for a in args]
        kw = {k: arrives_as[type(a)](a) if type(a) in arrives_as else a for k, a in kw.items()}
    call = Call(_run_here, None, wants, ident, 0, (f, args, kw, waiter), ())
    known = _describe(f)
    if known is not None and known.flags & ASYNC:
        _event_loop().start(lambda: f(*args, **kw), lambda v, e: _end_here(call, v, e))
    else:
        node.turns.submit(call)


_stays_here: dict[type, str] = {}
# Types whose instances arrive as something else, as they do when they are pickled.
arrives_as: dict[type, Callable[[Any], Any]] = {}


def _run_here(call: Call) -> None:
    f, args, kw, _ = call.body
    value, error = None, None
    turns = node.turns
    main = call.thread == MAIN
    try:
        try:
            if main:
                turns.main_in_call = True
            value = f(*args, **kw)
        finally:
            if main:
                turns.main_in_call = False
    except BaseException as exc:  # the edge of a call: it belongs to the caller
        error = exc
    if type(value) is CoroutineType:
        _event_loop().start(lambda: value, lambda v, e: _end_here(call, v, e))
        return
    _end_here(call, value, error)


def _end_here(call: Call, value: Any, error: BaseException | None) -> None:
    waiter = call.body[3]
    if call.flags == DO:
        if error is not None:
            _print_error(error)
        return
    outcome = (OURS, value) if error is None else (FAILED, _errors.encode_error(error, node.me))
    if call.flags == FUTURE:
        settle(node.me, call.ident, *outcome)
    waiter.value = (*outcome, ())
    node.complete(waiter)


# Coroutines

_loop: Loop | None = None


def _event_loop() -> Loop:
    global _loop
    if _loop is None:
        from hpcdist._runtime.loop import Loop

        _loop = Loop()
    return _loop


def _run_async(call: Call) -> None:
    async def begin() -> Any:
        f, args, kw = _unpack(call)
        return await f(*args, **kw)

    _event_loop().start(begin, lambda v, e: _answer(call, v, e))


def counts() -> tuple[int, int]:
    """How many calls have started, and how many wait for a turn."""
    return node.turns.running + (_loop.running if _loop is not None else 0), node.turns.queued
