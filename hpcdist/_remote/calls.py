"""Calls: a function runs on another process; its result comes back, stays there, or is dropped.

This is the caller's side; `answers` is the other one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar, overload

from hpcdist import _errors
from hpcdist._errors import ProcessExitedException
from hpcdist._frames import brief, cut
from hpcdist._public import public
from hpcdist._remote.answers import NOTHING, Answers
from hpcdist._remote.futures import Future, Futures
from hpcdist._remote.pacing import CALL_SIZE, Pacing
from hpcdist._runtime.node import Mail, Node, Service, here, on
from hpcdist._runtime.references import Reference, References
from hpcdist._runtime.running import Runners
from hpcdist._runtime.turns import Call
from hpcdist._transport.contracts import Slot, Waitable
from hpcdist._transport.router import Peer
from hpcdist._typing import Async
from hpcdist._wire import codec, functions, generators, object_paths
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
    Buffer,
    pack,
)
from hpcdist._wire.functions import Description
from hpcdist._wire.messages import Interrupt
from hpcdist._wire.resending import Resending

R = TypeVar("R")
ANY = "any"

Arguments = tuple[Any, ...]
Keywords = Mapping[str, Any]

_SHORT = 1024  # bytes that are cheaper to copy than to look after
_head = HEAD.pack


class Lender:
    """What a call may name in place of a process: it lends one for as long as the call takes."""

    def _hpcdist_lend(self, how: Callable[..., object], f: object, args: object, kw: object) -> Any:
        """Make the call `how(f, pid, *args, **kw)` on a process of its choice."""
        raise NotImplementedError


class StandIn:
    """What arrives as something else, where it is given as an argument."""

    def _hpcdist_arrive(self) -> Any:
        """Give what arrives, for a call to this process: nothing is pickled."""
        raise NotImplementedError


@overload
def remotecall(f: Async[R], where: Any, /, *args: object, **kw: object) -> Future[R]: ...
@overload
def remotecall(f: Callable[..., R], where: Any, /, *args: object, **kw: object) -> Future[R]: ...
@public
def remotecall(f: Callable[..., Any], where: Any, /, *args: object, **kw: object) -> Future[Any]:
    """Start `f(*args, **kw)` on a process and return its future at once.

    Args:
        f: The function. Importable ones go by name, others by value.
        where: A pid, `ANY` for the workers in turn, a tag for those that have it, or a pool.

    Raises:
        ValueError: There is no such process.
        ProcessExitedException: It is dead.

    Example:
        >>> import hpcdist
        >>> hpcdist.remotecall(sum, hpcdist.ANY, [1, 2, 3]).fetch()
        6
    """
    calls = here.node.services.get(Calls) or Calls.here()  # `here()` alone is one more call
    return calls.remotecall(f, where, args, kw)


@overload
def remotecall_fetch(f: Async[R], where: Any, /, *args: object, **kw: object) -> R: ...
@overload
def remotecall_fetch(f: Callable[..., R], where: Any, /, *args: object, **kw: object) -> R: ...
@public
def remotecall_fetch(f: Callable[..., Any], where: Any, /, *args: object, **kw: object) -> Any:
    """Run `f(*args, **kw)` on a process and return its result.

    Raises:
        RemoteException: The function raised; it is also an instance of what was raised.
        ProcessExitedException: The process died.

    Example:
        >>> import hpcdist
        >>> hpcdist.remotecall_fetch(len, 1, "four")
        4
    """
    try:  # not @brief: it would be one more call
        calls = here.node.services.get(Calls) or Calls.here()
        return calls.remotecall_fetch(f, where, args, kw)
    except BaseException as exc:
        cut(exc)
        raise


@overload
def remotecall_wait(f: Async[R], where: Any, /, *args: object, **kw: object) -> Future[R]: ...
@overload
def remotecall_wait(
    f: Callable[..., R], where: Any, /, *args: object, **kw: object
) -> Future[R]: ...
@public
@brief
def remotecall_wait(
    f: Callable[..., Any], where: Any, /, *args: object, **kw: object
) -> Future[Any]:
    """Run `f(*args, **kw)` on a process, wait for its end and return its finished future."""
    return Calls.here().remotecall(f, where, args, kw).wait()


@public
def remote_do(f: Callable[..., object], where: Any, /, *args: object, **kw: object) -> None:
    """Start `f(*args, **kw)` on a process and forget it; an error is printed there."""
    Calls.here().remote_do(f, where, args, kw)


@overload
def spawnat(p: Any, f: Async[R], /, *args: object, **kw: object) -> Future[R]: ...
@overload
def spawnat(p: Any, f: Callable[..., R], /, *args: object, **kw: object) -> Future[R]: ...
@public
def spawnat(p: Any, f: Callable[..., Any], /, *args: object, **kw: object) -> Future[Any]:
    """Start `f(*args, **kw)` on process `p`: `remotecall` with the process first."""
    return Calls.here().remotecall(f, p, args, kw)


@overload
def spawn(f: Async[R], /, *args: object, **kw: object) -> Future[R]: ...
@overload
def spawn(f: Callable[..., R], /, *args: object, **kw: object) -> Future[R]: ...
@public
def spawn(f: Callable[..., Any], /, *args: object, **kw: object) -> Future[Any]:
    """Start `f(*args, **kw)` on the next worker."""
    return Calls.here().remotecall(f, ANY, args, kw)


@overload
def fetchfrom(p: Any, f: Async[R], /, *args: object, **kw: object) -> R: ...
@overload
def fetchfrom(p: Any, f: Callable[..., R], /, *args: object, **kw: object) -> R: ...
@public
@brief
def fetchfrom(p: Any, f: Callable[..., Any], /, *args: object, **kw: object) -> Any:
    """Run `f(*args, **kw)` on process `p` and return its result."""
    return Calls.here().remotecall_fetch(f, p, args, kw)


@overload
def fetchany(f: Async[R], /, *args: object, **kw: object) -> R: ...
@overload
def fetchany(f: Callable[..., R], /, *args: object, **kw: object) -> R: ...
@public
@brief
def fetchany(f: Callable[..., Any], /, *args: object, **kw: object) -> Any:
    """Run `f(*args, **kw)` on the next worker and return its result."""
    return Calls.here().remotecall_fetch(f, ANY, args, kw)


@public
@brief
def sleep(seconds: float) -> None:
    """Sleep, letting other calls of this worker run meanwhile."""
    Calls.here().sleep(seconds)


@public
def interrupt(*pids: int | Sequence[int]) -> None:
    """End every started call of these workers (all, if none is named) with KeyboardInterrupt.

    Queued calls stay, an idle worker is not touched.
    """
    Calls.here().interrupt(pids)


class Calls(Service):
    """The calls that this process makes."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._references = node.service(References)
        self._answers = node.service(Answers)
        self._futures = node.service(Futures)
        self._turns = node.turns
        self._progress = node.progress
        self._now = node.machine.now
        self._runners = node.service(Runners)
        self.functions = self._answers.functions
        self.functions.on_reload.append(self._reload_on_workers)
        self._describe = self.functions.describe
        self._resending = Resending()
        self._pacing = Pacing(node, self.ask)

    # What users call

    def remotecall(self, f: Any, where: Any, args: Arguments, kw: Keywords) -> Future[Any]:
        """Start a call and return its future at once."""
        if type(where) is int:
            pid = where
        elif isinstance(where, Lender):
            lent: Future[Any] = where._hpcdist_lend(remotecall, f, args, kw)
            return lent
        else:
            pid = self.resolve(where)
        node = self.node
        ident = next(node.ids)
        future = self._futures.of_call(pid, ident, getattr(f, "__qualname__", ""))
        if pid == node.me:
            self._call_here(f, args, kw, ident, FUTURE, future)
            return future
        peer = node.peer(pid)
        future.since = self._now()
        node.pending[ident] = future
        try:
            self._send(peer, FUTURE, ident, f, args, kw, future)
        except BaseException:
            node.pending.pop(ident, None)
            raise
        if peer.alive:
            peer.hurry()
        else:
            node.fail(ident, future)
        self.keep_pace(peer)
        return future

    def remotecall_fetch(self, f: Any, where: Any, args: Arguments, kw: Keywords) -> Any:
        """Make a call, wait for its result and return it."""
        if type(where) is int:
            pid = where
        elif isinstance(where, Lender):
            return where._hpcdist_lend(remotecall_fetch, f, args, kw)
        else:
            pid = self.resolve(where)
        node = self.node
        slot = Slot(pid)
        ident = next(node.ids)
        if pid == node.me:
            self._call_here(f, args, kw, ident, FETCH, slot)
        else:
            peer = node.peer(pid)
            if peer.plane is not None:
                peer.plane.rouse(peer.rank)  # it wakes while we get ready
            slot.since = self._now()
            node.pending[ident] = slot
            try:
                known = self._describe(f)
                if (
                    known is not None
                    and known.plain
                    and known.ident in peer.known
                    and not (args or kw)
                ):
                    slot.called = known.name
                    # What a wait begins with is done while the call travels.
                    peer.dispatch(_head(CALL, FETCH | known.flags, 0, 0, ident, known.ident))
                else:
                    slot.called = getattr(f, "__qualname__", "")
                    self._send(peer, FETCH, ident, f, args, kw)
                    self._progress.flush()
            except BaseException:
                node.pending.pop(ident, None)
                raise
            if not peer.alive:
                node.fail(ident, slot)
        try:
            node.wait(slot)
        except BaseException:  # Ctrl-C: the call goes on, nothing waits for it
            node.pending.pop(ident, None)
            raise
        if slot.error is not None:
            raise slot.failure()
        flags, body, buffers = slot.value
        if flags == OK:
            return codec.loads(body, buffers) if len(body) else None
        return self.result_of(flags, body, buffers)

    def ask(self, slot: Slot, f: Any, pid: int, args: Arguments) -> None:
        """Send a call whose answer fills a slot, whether or not it is still waited for."""
        node = self.node
        slot.called = getattr(f, "__qualname__", "")
        ident = next(node.ids)
        if pid == node.me:
            self._call_here(f, args, {}, ident, FETCH, slot)
            return
        peer = node.peer(pid)
        slot.since = self._now()
        node.pending[ident] = slot
        try:
            self._send(peer, FETCH, ident, f, args, {})
            self._progress.flush()
        except BaseException:
            node.pending.pop(ident, None)
            raise
        if not peer.alive:
            node.fail(ident, slot)

    def result_of(self, flags: int, body: Any, buffers: Sequence[Buffer]) -> Any:
        """Return the result, or raise the error, that an answer holds."""
        outcome = flags & OUTCOME
        if outcome == OURS:
            return body
        if outcome == FAILED:
            raise _errors.decode_error(bytes(body))
        refs: Sequence[Reference] = ()
        if flags & REFS:
            refs, body = self._references.arrive(body)
        value = codec.loads(body, buffers) if len(body) else None
        del refs
        return value

    def remote_do(self, f: Any, where: Any, args: Arguments, kw: Keywords) -> None:
        """Start a call that is not answered."""
        if type(where) is not int and isinstance(where, Lender):
            where._hpcdist_lend(remote_do, f, args, kw)
            return
        pid = where if type(where) is int else self.resolve(where)
        self.tell(f, pid, args, kw)
        peer = self.node.peers.get(pid)
        if peer is not None:
            self.keep_pace(peer)

    def tell(self, f: Any, pid: int, args: Arguments, kw: Keywords) -> None:
        """Start a call that is not answered; waits for nothing, so that handlers may do it."""
        if pid == self.node.me:
            self._call_here(f, args, kw, 0, DO, None)
            return
        peer = self.node.peer(pid)
        self._send(peer, DO, 0, f, args, kw)
        peer.hurry()

    def keep_pace(self, peer: Peer) -> None:
        """Wait behind a call that has just left, if too many have not begun there."""
        peer.calls += 1
        if peer.sent + CALL_SIZE * peer.calls >= peer.next_mark:
            self._pacing.keep(peer)

    def sleep(self, seconds: float) -> None:
        """Give the turn of the call on this thread away for a while."""
        self.node.admit()
        with suppress(TimeoutError):
            self.node.wait(Slot(), max(0.0, seconds))

    def interrupt(self, pids: Sequence[int | Sequence[int]]) -> None:
        """End the started calls of workers; of all, if none is named."""
        node = self.node
        node.admit()
        named = [p for item in pids for p in ([item] if isinstance(item, int) else item)]
        meant = named or list(node.members.living)
        for pid in meant:
            if pid == node.me:
                self._runners.interrupt()
            elif pid not in node.members.gone:
                node.peer(pid).send(Interrupt())
        self._progress.nudge()
        for pid in meant:
            for fn in node.on_interrupt:
                fn(pid)

    @on(Interrupt)
    def _on_interrupt(self, said: Interrupt, mail: Mail) -> None:
        self._runners.interrupt()

    def _reload_on_workers(self, module: str) -> None:
        """Have all workers reload a module that process 1 has reloaded."""
        if self.node.me == 1:
            for pid in list(self.node.members.living):
                with suppress(ProcessExitedException):
                    self.tell(_reload, pid, (module,), {})

    def resolve(self, where: object) -> int:
        """Turn what a user may say for a process into its pid."""
        node = self.node
        node.start()
        if isinstance(where, str):
            node.admit()
            tag = "" if where == ANY else where
            node.await_workers(tag)
            if not tag:
                node.workers()  # a word to one who is alone
            return node.members.next_worker(tag)
        if isinstance(where, bool) or not hasattr(where, "__index__"):
            raise TypeError(f"where to call is a process id, a tag or ANY, not {where!r}")
        return int(where.__index__())

    # Sending

    def _send(
        self,
        peer: Peer,
        wants: int,
        ident: int,
        f: Any,
        args: Arguments,
        kw: Keywords,
        future: Future[Any] | None = None,
    ) -> None:
        """Serialise a call completely, then post it; a future holds its result from then on."""
        known = self._describe(f)
        if known is not None and known.plain and known.ident in peer.known and not kw:
            body = codec.dump_atoms(args) if args else b""
            if body is not None:
                flags, size = wants | known.flags, len(body)
                if size <= _SHORT:
                    data = _head(CALL, flags, 0, size, ident, known.ident) + body
                    peer.post(data, (), None, future)
                else:
                    _post(peer, flags, ident, known.ident, body, (), future)
                return
        fresh = None
        value: tuple[Any, ...]
        if known is None:
            if not callable(f):
                raise TypeError(f"a function is needed to call, not {f!r}")
            flags, value = wants, (f, args, kw)
        else:
            flags = wants
            fresh = self.functions.news(known.names, peer.bound) if known.names else None
            if known.varies or fresh:
                variable = functions.captured(f) if known.varies else None
                value = ((fresh, variable), args, kw)
                flags |= EXTRAS
            elif kw:
                value = (args, kw)
                flags |= KEYWORDS
            else:
                value = args
        payload = object_paths.dumps_call(value, f, args, kw) if value else NOTHING
        if known is None or flags & EXTRAS:
            generators.warn_of_copies(f, [payload.body])
            self._resending.note(f, payload)
        if payload.buffers and wants != FETCH:
            payload.own()  # the caller goes on, and may change what it sent
        self.post(peer, flags, ident, known, payload, future)
        for name in payload.names:  # functions among the arguments assign these there
            peer.bound.pop(name, None)
        if fresh:
            peer.bound.update(fresh)

    def post(
        self,
        peer: Peer,
        flags: int,
        ident: int,
        known: Description | None,
        payload: Payload,
        future: Future[Any] | None = None,
    ) -> None:
        """Post a call that is pickled already.

        Args:
            peer: The process that is called.
            flags: What is wanted of it, and what the payload is made of.
            ident: What its answer names.
            known: The function; None: it is in the payload.
            payload: The arguments.
            future: It holds the result from then on.
        """
        if not payload.refs:
            self._post(peer, flags, ident, known, payload, future)
            return
        # Held: once their owners know of them, the references do leave.
        with self.node.progress.interrupts.section():
            body = self._references.announce(payload.refs, peer.pid) + payload.body
            self._post(peer, flags | REFS, ident, known, Payload(body, payload.buffers), future)

    def _post(
        self,
        peer: Peer,
        flags: int,
        ident: int,
        known: Description | None,
        payload: Payload,
        future: Future[Any] | None,
    ) -> None:
        body, buffers = payload.body, payload.buffers
        if known is None:
            _post(peer, flags, ident, 0, body, buffers, future)
        elif known.ident in peer.known:
            _post(peer, flags | known.flags, ident, known.ident, body, buffers, future)
        else:
            body = len(known.definition).to_bytes(4, "little") + known.definition + body
            flags |= known.flags | DEFINES
            peer.post(*pack(CALL, flags, ident, known.ident, body, buffers), None, future)
            peer.known.add(known.ident)  # only now: another thread's call must not overtake it

    # Calls to oneself: nothing is pickled

    def _call_here(
        self,
        f: Any,
        args: Arguments,
        kw: Keywords,
        ident: int,
        wants: int,
        waiter: Waitable | None,
    ) -> None:
        self.node.admit()
        if not callable(f):
            raise TypeError(f"a function is needed to call, not {f!r}")
        self.node.start()
        args, kw = as_they_arrive(args, kw)
        call = Call(self._answers.own.run, None, wants, ident, 0, (f, args, kw, waiter), ())
        known = self._describe(f)
        with self.node.progress.interrupts.section():  # who has got a turn has to run
            if isinstance(waiter, Future):
                waiter._held = 1
            if known is not None and known.flags & ASYNC:
                self._answers.own.start(call)
            else:
                self._turns.submit(call)


def _post(
    peer: Peer,
    flags: int,
    ident: int,
    aux: int,
    body: bytes,
    buffers: Sequence[Buffer],
    future: Future[Any] | None,
) -> None:
    if buffers or len(body) > _SHORT:
        peer.post(*pack(CALL, flags, ident, aux, body, buffers), None, future)
    else:
        peer.post(_head(CALL, flags, 0, len(body), ident, aux) + body, (), None, future)


def _reload(module: str) -> None:
    """Reload a module on the process that this is called on."""
    Calls.here().functions.reload(module)


def as_they_arrive(args: Arguments, kw: Keywords) -> tuple[Arguments, Keywords]:
    """Return the arguments of a call to this very process as they are to arrive."""
    arrived = [a._hpcdist_arrive() if isinstance(a, StandIn) else a for a in args]
    named = {k: a._hpcdist_arrive() if isinstance(a, StandIn) else a for k, a in kw.items()}
    return tuple(arrived), named
