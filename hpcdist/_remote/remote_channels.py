"""Remote channels: a channel on one process, used from any.

The owner serves built-in channels on its progress side, so they work while a user's function
hogs the process; items stay pickled there. A backing of the user's own runs its operations as
calls on threads that take no turn, since one of them may block until another one comes.
"""

from __future__ import annotations

import inspect
import pickle
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hpcdist import _errors
from hpcdist._errors import ChannelClosed, HpcdistError
from hpcdist._remote.calls import remotecall_fetch
from hpcdist._remote.channels import _CLOSED, Channel, Waiter
from hpcdist._runtime import references
from hpcdist._runtime.controls import (
    ACKNOWLEDGE,
    FREE,
    GIVE_BACK,
    OPERATE,
    PUT_ITEM,
    TAKE_ITEM,
    WITHDRAW,
)
from hpcdist._runtime.node import node, pack_head, unpack_head
from hpcdist._runtime.references import Parcel, Reference, outgoing
from hpcdist._transport.contracts import Slot
from hpcdist._transport.router import Peer
from hpcdist._wire import codec
from hpcdist._wire.codec import Payload
from hpcdist._wire.frames import CONTROL, FAILED, HEAD, OK, OUTCOME, REFS, RESULT, Buffer

CLOSED, TIMED_OUT, NO_SUCH = 6, 7, 8  # outcomes of channel operations, beside OK and FAILED
_QUICK = {"isready", "isempty", "isopen", "close", "__len__"}


class RemoteChannel(Reference):
    """A channel that lives on one process and can be used from any.

    Args:
        factory: Makes the channel, on its process; an int is short for `Channel(n)`.
        pid: The process it lives on; this one by default.

    Example:
        >>> import hpcdist
        >>> rc = hpcdist.RemoteChannel(3)
        >>> rc.put(1); rc.put(2); rc.close()
        >>> list(rc)
        [1, 2]
    """

    _freed = False

    def __init__(
        self, factory: Callable[[], Any] | int | None = None, pid: int | None = None
    ) -> None:
        self.whence = node.me
        self.where = node.me if pid is None else int(pid)
        self.id = next(node.ids)
        if factory is None:
            factory = 1
        if self.where != node.me:
            node.peer(self.where)
            remotecall_fetch(_make, self.where, self.key, node.me, factory)
        elif callable(factory):
            remotecall_fetch(_make, self.where, self.key, node.me, factory)
        else:
            _make(self.key, node.me, factory)
        self._held = 1

    @classmethod
    def _received(cls, where: int, whence: int, ident: int, facts: Any) -> RemoteChannel:
        self = cls.__new__(cls)
        self.where, self.whence, self.id = where, whence, ident
        return self

    def _facts(self) -> None:
        return None

    def __reduce__(self) -> Any:
        if self._freed:
            raise HpcdistError(_USED)
        self._travels()
        return _remote_channel, (self.where, self.whence, self.id)

    def __del__(self) -> None:
        if self._held:
            self._let_go()

    def __repr__(self) -> str:
        return f"<RemoteChannel on process {self.where}, id {self.key}>"

    # The operations

    def put(self, value: Any, *key: Any, timeout: float | None = None) -> None:
        """Add an item; wait for room."""
        if key or self._freed or self.where == node.me:
            self._operate("put", (value, *key), timeout)
            return
        body = pickle.dumps(value, 5) if type(value) in _NUMBERS else None
        if body is None or len(body) > _SHORT:  # some numbers have a million digits
            payload = codec.dumps(value)
            if payload.refs or payload.buffers or len(payload.body) > _SHORT:
                self._ask("put", True, payload.own(), timeout)
                return
            body = payload.body
        self._ask_shortly("put", PUT_ITEM, body, timeout)

    def take(self, *key: Any, timeout: float | None = None) -> Any:
        """Remove and return the oldest item; wait for one."""
        if key or self._freed or self.where == node.me:
            return self._operate("take", key, timeout)
        return self._ask_shortly("take", TAKE_ITEM, b"", timeout)

    def fetch(self, *key: Any, timeout: float | None = None) -> Any:
        """Return the oldest item without removing it; wait for one."""
        return self._operate("fetch", key, timeout)

    def wait(self, *key: Any, timeout: float | None = None) -> RemoteChannel:
        """Wait until there is an item."""
        self._operate("wait", key, timeout)
        return self

    def isready(self, *key: Any) -> bool:
        """Tell whether there is an item now."""
        return bool(self._operate("isready", key, None))

    def isempty(self) -> bool:
        """Tell whether there is no item now; takes nothing."""
        return bool(self._operate("isempty", (), None))

    def isopen(self) -> bool:
        """Tell whether the channel takes items."""
        return bool(self._operate("isopen", (), None))

    def close(self) -> None:
        """Take no more items; those inside can still be taken."""
        self._operate("close", (), None)

    def __len__(self) -> int:
        return int(self._operate("__len__", (), None))

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Any]:
        while True:
            try:
                value = self.take()
            except ChannelClosed:
                return
            yield value

    def free(self) -> None:
        """Free the channel at its owner now, whoever else holds a reference."""
        if self._freed:
            return
        self._freed = True
        self._held = 0
        if self.where == node.me:
            references.free(self.key)
        elif self.where not in node.members.gone:
            node.wait(node.request(self.where, FREE, self.key))

    def __enter__(self) -> RemoteChannel:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()

    def _operate(self, name: str, args: tuple[Any, ...], timeout: float | None) -> Any:
        if self._freed:
            raise HpcdistError(_USED)
        if self.where == node.me:
            return self._operate_here(name, args, timeout)
        payload = codec.dumps(args).own() if args else _NO_ARGUMENTS
        return self._ask(name, name in _QUICK or not args, payload, timeout)

    def _ask(self, name: str, builtin: bool, payload: Payload, timeout: float | None) -> Any:
        """Have the owner do an operation."""
        peer = node.peer(self.where)
        body, buffers, with_refs = outgoing(payload, self.where)
        head = pack_head((self.key, name, builtin, with_refs, timeout), body)
        slot = Slot(self.where)
        ident = next(node.ids)
        node.pending[ident] = slot
        peer.control(OPERATE, ident, head, buffers)
        node.progress.flush()
        return self._outcome(name, peer, ident, slot, timeout)

    def _ask_shortly(self, name: str, op: int, body: bytes, timeout: float | None) -> Any:
        """Have the owner do a plain put or take: one small message each way."""
        peer = node.peer(self.where)
        size = _PLAIN_SIZE + len(body)
        limit = _NO_LIMIT if timeout is None else max(timeout, 0.0)
        slot = Slot(self.where)
        ident = next(node.ids)
        node.pending[ident] = slot
        head = _HEAD_PLAIN.pack(CONTROL, 0, 0, size, ident, op, self.whence, self.id, limit)
        peer.dispatch(head + body)
        return self._outcome(name, peer, ident, slot, timeout)

    def _outcome(self, name: str, peer: Peer, ident: int, slot: Slot, timeout: float | None) -> Any:
        """Wait for the outcome of an operation."""
        if not peer.alive:
            node.fail(ident, slot)
        try:
            if timeout is None:
                node.wait(slot)
                ended = True
            else:
                ended = self._wait_for(name, ident, slot, timeout)
            if ended and name == "take":
                peer.acknowledge(ident)
        except BaseException:
            self._abandon(peer, ident, slot)
            raise
        if not ended:
            raise TimeoutError
        if slot.error is not None:
            raise slot.error
        flags, body, buffers = slot.value
        if flags == OK:
            return codec.loads(body, buffers) if len(body) else None
        return _unusual(flags, body, buffers)

    def _wait_for(self, name: str, ident: int, slot: Slot, timeout: float) -> bool:
        """Wait for the end of an operation; tell whether it came, or the time was over first."""
        try:
            node.wait(slot, timeout)
        except TimeoutError:
            if self._withdraw(name, ident):
                return False
            node.wait(slot)
        return True

    def _withdraw(self, name: str, ident: int) -> bool:
        """Take an operation back whose time is over; tell whether that came before its end.

        The owner knows. Whether an item was put, nobody else can say; an item taken late is given
        back, so that for all else an owner that is stuck need not be waited for.
        """
        word = node.request(self.where, WITHDRAW, ident)
        try:
            node.wait(word, None if name == "put" else _GRACE)
        except TimeoutError:
            return node.pending.pop(ident, None) is not None
        if word.error is not None:
            raise word.error
        return bool(word.value[1]) and node.pending.pop(ident, None) is not None

    def _abandon(self, peer: Peer, ident: int, slot: Slot) -> None:
        """Take an operation back without waiting (Ctrl-C); an item on its way is given back."""
        if node.pending.pop(ident, None) is not None:
            if peer.alive:
                peer.control(WITHDRAW, 0, pack_head(ident))
        elif slot.value is not None:
            flags, body, buffers = slot.value
            node.unclaimed(peer, flags, ident, body, buffers)
        node.progress.nudge()

    def _operate_here(self, name: str, args: tuple[Any, ...], timeout: float | None) -> Any:
        backing = _backing(self.key)
        if backing is None:
            raise HpcdistError(_USED)
        keywords: dict[str, Any] = {}
        if timeout is not None and name in _BLOCKING:
            keywords["timeout"] = timeout
        if type(backing) is Channel:
            if name == "put":
                args = (codec.dumps(args[0]).own(), *args[1:])
            return getattr(backing, name)(*args, **keywords)
        try:
            return getattr(backing, name)(*args, **keywords)
        except (ChannelClosed, TimeoutError):
            raise
        except Exception as exc:
            raise _errors.decode_error(_errors.encode_error(exc, node.me)) from None


_PLAIN = struct.Struct("<QQd")  # whence, id, timeout: what precedes the item of a plain put
_PLAIN_SIZE = _PLAIN.size
_HEAD_PLAIN = struct.Struct(HEAD.format + _PLAIN.format[1:])
_NO_LIMIT = -1.0
_GRACE = 0.25  # seconds that an owner has to say whether an operation came to its end
_SHORT = 4096  # bytes of an item that travels with its control in one small message
_NUMBERS = {int, float, complex, bool, type(None)}  # nothing inside to look after
_BLOCKING = {"put", "take", "fetch", "wait"}
_NO_ARGUMENTS = Payload(b"")
_USED = "this remote channel has been freed"


def _unusual(flags: int, body: Any, buffers: Sequence[Buffer]) -> Any:
    outcome = flags & OUTCOME
    if outcome == OK:
        parcel = Parcel.of(body, buffers, bool(flags & REFS))
        return codec.loads(parcel.body, parcel.buffers)
    if outcome == CLOSED:
        raise ChannelClosed
    if outcome == TIMED_OUT:
        raise TimeoutError
    if outcome == NO_SUCH:
        raise HpcdistError(_USED)
    raise _errors.decode_error(bytes(body))


def _remote_channel(where: int, whence: int, ident: int) -> RemoteChannel:
    """Unpickle a remote channel."""
    found: RemoteChannel = references.handle(RemoteChannel, where, whence, ident, None)
    return found


def channel_from_id(ref: tuple[int, int]) -> Any:
    """Return the channel behind a remote channel, on the process that owns it.

    Raises:
        ValueError: It does not live here.
    """
    backing = _backing(tuple(ref))  # type: ignore[arg-type]
    if backing is None:
        raise ValueError("Local instance of remote reference not found")
    return backing


def remoteref_id(ref: Reference) -> tuple[int, int]:
    """Return what names a reference everywhere: (the process that made it, its number there)."""
    return ref.key


# The owner's side

_waiting: dict[tuple[int, int], tuple[Channel, Waiter]] = {}  # remote operations by (pid, id)
# Items taken and not acknowledged, each with what gives it back.
_under_way: dict[tuple[int, int], tuple[Callable[[Any], None], Any]] = {}


def _make(ref: tuple[int, int], holder: int, factory: Callable[[], Any] | int) -> None:
    channel = factory() if callable(factory) else Channel(factory)
    needed = ("put", "take")
    if not all(hasattr(channel, name) for name in needed):
        raise TypeError(
            f"a remote channel's factory must return an object with put and take, not {channel!r}"
        )
    references.count(ref, holder, 1, lambda: channel)
    if type(channel) is Channel:
        references.owned[ref].on_free = channel.close  # who waits is told


def _backing(ref: tuple[int, int]) -> Any:
    entry = references.owned.get(ref)
    return entry.value if entry is not None else None


@node.control(FREE)
def _on_free(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    ref, _ = unpack_head(body)
    references.free(ref)
    node.reply(peer, ident, OK)


@node.control(OPERATE)
def _on_operate(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    (ref, name, builtin, with_refs, timeout), rest = unpack_head(body)
    parcel = Parcel.of(rest, buffers, with_refs)
    _begin(_backing(ref), name, builtin, peer, ident, parcel, timeout)


def _begin(
    backing: Any,
    name: str,
    builtin: bool,
    peer: Peer,
    ident: int,
    parcel: Payload,
    timeout: float | None,
) -> None:
    """Begin an operation, on the progress side or on a thread of its own."""
    if backing is None:
        node.reply(peer, ident, NO_SUCH)
    elif type(backing) is Channel and builtin:
        _serve(backing, name, peer, ident, parcel)
    else:
        single = name == "put" and builtin
        node.turns.background(
            lambda: _operate_backing(backing, name, peer, ident, parcel, timeout, single)
        )


@node.control(PUT_ITEM)
def _on_put_item(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    whence, number, limit = _PLAIN.unpack_from(body)
    backing = _backing((whence, number))
    item = Payload(body[_PLAIN_SIZE:])
    if type(backing) is Channel and backing.try_put(item):
        peer.answer(HEAD.pack(RESULT, OK, 0, 0, ident, 0))
    else:
        _begin(backing, "put", True, peer, ident, item, _timeout(limit))


@node.control(TAKE_ITEM)
def _on_take_item(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    whence, number, limit = _PLAIN.unpack_from(body)
    backing = _backing((whence, number))
    taken = backing.try_take() if type(backing) is Channel else None
    if taken is None:
        _begin(backing, "take", True, peer, ident, _NO_ARGUMENTS, _timeout(limit))
        return
    item = taken[0]
    _under_way[peer.pid, ident] = (backing.give_back, item)
    if isinstance(item, Payload) and len(item.body) <= _SHORT and not (item.buffers or item.refs):
        peer.answer(HEAD.pack(RESULT, OK, 0, len(item.body), ident, 0) + item.body)
    else:
        _send_item(peer, ident, item)


def _timeout(limit: float) -> float | None:
    return None if limit == _NO_LIMIT else limit


def _serve(channel: Channel, name: str, peer: Peer, ident: int, parcel: Payload) -> None:
    """Do an operation on a built-in channel, on the progress side."""
    if name in _QUICK:
        value = getattr(channel, name)()
        node.reply(peer, ident, OK, codec.dumps(value).body if value is not None else b"")
        return
    key = (peer.pid, ident)

    def done(value: Any) -> None:
        _waiting.pop(key, None)
        if value is _CLOSED:
            node.reply(peer, ident, CLOSED)
        elif not peer.alive:
            if name == "take":
                channel.give_back(value)
        elif name == "put" or name == "wait":
            node.reply(peer, ident, OK)
        else:
            if name == "take":
                _under_way[key] = (channel.give_back, value)
            _send_item(peer, ident, value)
        node.progress.soon()

    waiter = Waiter(done, parcel, peer.pid)
    _waiting[key] = (channel, waiter)
    if name == "put":
        channel.start_put(waiter)
    elif name == "take":
        channel.start_take(waiter)
    else:
        channel.start_peek(waiter)


def _send_item(peer: Peer, ident: int, value: Any) -> None:
    if isinstance(value, Payload):
        body, buffers, with_refs = outgoing(value, peer.pid)
        node.reply(peer, ident, OK | (REFS if with_refs else 0), body, buffers)
        return

    def pickled() -> None:  # put by the owner through the backing itself: not pickled yet
        try:
            _send_item(peer, ident, codec.dumps(value))
        except Exception as exc:
            node.reply(peer, ident, FAILED, _errors.encode_error(exc, node.me))
        node.progress.nudge()

    node.turns.background(pickled)


def _operate_backing(
    backing: Any,
    name: str,
    peer: Peer,
    ident: int,
    parcel: Payload,
    timeout: float | None,
    single: bool,
) -> None:
    """Do an operation on a backing of the user's own."""
    try:
        args = codec.loads(parcel.body, parcel.buffers) if len(parcel.body) else ()
        if single:
            args = (args,)
        keywords = {"timeout": timeout} if timeout is not None and name in _BLOCKING else {}
        value = getattr(backing, name)(*args, **keywords)
        if inspect.isawaitable(value):
            raise TypeError(f"{name} of a channel's backing may not be a coroutine function")
        if name in ("put", "wait", "close"):
            value = None
        payload = codec.dumps(value) if value is not None else _NO_ARGUMENTS
        body, buffers, with_refs = outgoing(payload, peer.pid)
        if name == "take":
            # Nothing is known of a backing but that it takes items back by its `put`.
            back = lambda item: node.turns.background(lambda: backing.put(item, *args))
            _under_way[peer.pid, ident] = (back, value)
            if not peer.alive:
                _give_back((peer.pid, ident))
        node.reply(peer, ident, OK | (REFS if with_refs else 0), body, buffers)
    except ChannelClosed:
        node.reply(peer, ident, CLOSED)
    except TimeoutError:
        node.reply(peer, ident, TIMED_OUT)
    except Exception as exc:
        node.reply(peer, ident, FAILED, _errors.encode_error(exc, node.me))
    node.progress.nudge()


@node.control(WITHDRAW)
def _on_withdraw(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    number, _ = unpack_head(body)
    key = (peer.pid, number)
    channel, waiter = _waiting.pop(key, (None, None))
    withdrawn = channel is not None and waiter is not None and channel.withdraw(waiter)
    if ident:
        node.reply(peer, ident, OK, b"1" if withdrawn else b"")


@node.control(ACKNOWLEDGE)
def _on_acknowledge(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    _under_way.pop((peer.pid, ident), None)


@node.control(GIVE_BACK)
def _on_give_back(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    _give_back((peer.pid, ident))


def _give_back(key: tuple[int, int]) -> None:
    give_back, item = _under_way.pop(key, (None, None))
    if give_back is not None:
        give_back(item)


def _unclaimed(peer: Peer, flags: int, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    """An answer came for a wait that was given up: if it was an item, the owner has it again."""
    if flags & REFS:
        references.arrive(body)
    peer.control(GIVE_BACK, ident)


node.on_unclaimed.append(_unclaimed)


def _on_death(pid: int) -> None:
    for key in [k for k in _waiting if k[0] == pid]:
        channel, waiter = _waiting.pop(key)
        channel.withdraw(waiter)
    for key in sorted((k for k in _under_way if k[0] == pid), reverse=True):
        _give_back(key)


node.on_death.append(_on_death)
