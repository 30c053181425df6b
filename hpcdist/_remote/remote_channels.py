"""Remote channels: a channel on one process, used from any. How it is served: `channel_owners`."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Iterator
from typing import Any, Generic, Self

from hpcdist import _errors
from hpcdist._errors import ChannelClosed, HpcdistError
from hpcdist._frames import brief, cut
from hpcdist._hints import Hinting
from hpcdist._public import public
from hpcdist._remote.calls import Calls
from hpcdist._remote.channel_owners import (
    BLOCKING,
    CLOSED,
    NO_ARGUMENTS,
    NO_LIMIT,
    NO_SUCH,
    PLAIN,
    QUICK,
    SHORT,
    TIMED_OUT,
    OwnedChannels,
    make,
)
from hpcdist._remote.channels import ELSEWHERE, Channel
from hpcdist._runtime.node import here
from hpcdist._runtime.references import Reference, References, Value
from hpcdist._transport.contracts import Slot
from hpcdist._transport.interrupts import Section
from hpcdist._transport.router import Peer
from hpcdist._wire import codec, object_paths
from hpcdist._wire.codec import Payload
from hpcdist._wire.frames import CONTROL, HEAD, OK, OUTCOME, REFS, Body
from hpcdist._wire.messages import PUT_ITEM, TAKE_ITEM, Free, Operate, Withdraw


@public
class RemoteChannel(Hinting, Reference, Generic[Value]):
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

    _elsewhere = ELSEWHERE
    _channels: OwnedChannels  # of the process that has this handle
    _freed = False

    @brief
    def __init__(
        self, factory: Callable[[], Any] | int | None = None, pid: int | None = None
    ) -> None:
        self._channels = OwnedChannels.here()
        self._references = self._channels.references
        node = self._channels.node
        node.admit()
        self.whence = node.me
        self.where = node.me if pid is None else int(pid)
        self.id = next(node.ids)
        if factory is None:
            factory = 1
        if self.where != node.me:
            node.peer(self.where)
        if self.where != node.me or callable(factory):
            self._have_made(node.service(Calls), (self.key, node.me, factory))
        else:
            with node.progress.interrupts.section():
                self._channels.make(self.key, node.me, factory)
                self._held = 1
        self._held = 1

    def _have_made(self, calls: Calls, arguments: tuple[object, ...]) -> None:
        """Have the owner make the channel; an interrupt lets go of what it makes all the same."""
        node = self._channels.node
        slot = _Making(self.where)
        with node.progress.interrupts.section():  # or nobody could tell whether it was sent
            calls.ask(slot, make, self.where, arguments)
            try:
                node.wait(slot)
            except KeyboardInterrupt:
                slot.abandoned = self
                if slot.ready:
                    slot.arrived()
                raise
            if slot.error is None and slot.value[0] & OUTCOME == OK:
                self._held = 1  # here: an interrupt may be raised at the section's end
        if slot.error is not None:
            raise slot.failure()
        calls.result_of(*slot.value)

    @classmethod
    def _received(cls, where: int, whence: int, ident: int, facts: object) -> RemoteChannel[Value]:
        self = cls.__new__(cls)
        self._channels = OwnedChannels.here()
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

    def put(self, value: Value, *key: object, timeout: float | None = None) -> None:
        """Add an item; wait for room."""
        try:  # not @brief: CPython 3.11 looks for signals after a call with `*`
            if key or self._freed or self.where == self._channels.node.me:
                self._operate("put", (value, *key), timeout)
                return
            body = pickle.dumps(value, 5) if type(value) in _NUMBERS else None
            if body is None or len(body) > SHORT:  # some numbers have a million digits
                payload = object_paths.dumps(value, "the item")
                if payload.refs or payload.buffers or len(payload.body) > SHORT:
                    self._ask("put", True, payload.own(), timeout)
                    return
                body = payload.body
            self._ask_shortly("put", PUT_ITEM, body, timeout)
        except BaseException as exc:
            cut(exc)
            raise

    def take(self, *key: object, timeout: float | None = None) -> Value:
        """Remove and return the oldest item; wait for one."""
        try:  # not @brief: CPython 3.11 looks for signals after a call with `*`
            if key or self._freed or self.where == self._channels.node.me:
                item: Value = self._operate("take", key, timeout)
            else:
                item = self._ask_shortly("take", TAKE_ITEM, b"", timeout)
            return item
        except BaseException as exc:
            cut(exc)
            raise

    @brief
    def fetch(self, *key: object, timeout: float | None = None) -> Value:
        """Return the oldest item without removing it; wait for one."""
        item: Value = self._operate("fetch", key, timeout)
        return item

    @brief
    def wait(self, *key: object, timeout: float | None = None) -> Self:
        """Wait until there is an item."""
        self._operate("wait", key, timeout)
        return self

    def isready(self, *key: object) -> bool:
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

    def __iter__(self) -> Iterator[Value]:
        while True:
            try:
                value = self.take()
            except ChannelClosed:
                return
            yield value

    def free(self) -> None:
        """Free the channel at its owner now, even if others hold a reference."""
        if self._freed:
            return
        node = self._channels.node
        with node.progress.interrupts.section():  # once it says so, its owner is told
            self._freed = True
            self._held = 0
            if self.where == node.me:
                self._references.free(self.key, self.where)
            elif self.where not in node.members.gone:
                node.wait(node.request(self.where, Free(self.key)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()

    def _operate(self, name: str, args: tuple[object, ...], timeout: float | None) -> Any:
        if self._freed:
            raise HpcdistError(_USED)
        if self.where == self._channels.node.me:
            return self._operate_here(name, args, timeout)
        payload = object_paths.dumps(args, "the arguments").own() if args else NO_ARGUMENTS
        return self._ask(name, name in QUICK or not args, payload, timeout)

    def _ask(self, name: str, builtin: bool, payload: Payload, timeout: float | None) -> Any:
        """Have the owner do an operation."""
        node = self._channels.node
        with node.progress.interrupts.section() as section:
            peer = node.peer(self.where)
            body, buffers, with_refs = self._references.outgoing(payload, self.where)
            slot = Slot(self.where)
            ident = next(node.ids)
            node.pending[ident] = slot
            operate = Operate(self.key, name, builtin, with_refs, timeout)
            peer.send(operate, ident, body, buffers)
            node.progress.flush()
            return self._outcome(section, name, peer, ident, slot, timeout)

    def _ask_shortly(self, name: str, op: int, body: bytes, timeout: float | None) -> Any:
        """Have the owner do a plain put or take: one small message each way."""
        node = self._channels.node
        section = Section(node.progress.interrupts)
        try:
            peer = node.peer(self.where)
            size = PLAIN.size + len(body)
            limit = NO_LIMIT if timeout is None else max(timeout, 0.0)
            slot = Slot(self.where)
            ident = next(node.ids)
            node.pending[ident] = slot
            head = _HEAD_PLAIN.pack(CONTROL, 0, 0, size, ident, op, self.whence, self.id, limit)
            peer.dispatch(head + body)
            value = self._outcome(section, name, peer, ident, slot, timeout)
        except BaseException as exc:
            section.end(type(exc))
            raise
        section.end()
        return value

    def _outcome(
        self,
        section: Section,
        name: str,
        peer: Peer,
        ident: int,
        slot: Slot,
        timeout: float | None,
    ) -> Any:
        """Wait for the outcome of an operation, in a section that began before it was sent."""
        if not peer.alive:
            self._channels.node.fail(ident, slot)
        value = ended = None
        try:
            try:
                self._channels.node.wait(slot, timeout)
                ended = True
            except TimeoutError:
                ended = self._came_late(name, ident, slot)
            if ended and slot.error is None:
                flags, body, buffers = slot.value
                if flags & REFS:
                    value = self._item_with_references(section, slot)
                elif flags & OUTCOME == OK and len(body):
                    value = section.openly(codec.loads, body, buffers)
            section.decide()
        except BaseException as exc:
            if name == "put" and isinstance(exc, KeyboardInterrupt):
                self._take_back_put(section, peer, ident, slot)
                return None
            if ended is not False:
                self._abandon(section, peer, ident, slot, exc)
            raise
        if not ended:
            raise TimeoutError
        if name == "take":
            peer.acknowledge(ident)
        if slot.error is not None:
            raise slot.failure()
        flags, body, _ = slot.value
        if flags & OUTCOME != OK:
            raise _failure(flags & OUTCOME, body)
        return value

    def _came_late(self, name: str, ident: int, slot: Slot) -> bool:
        """Tell whether an operation whose time is over came to its end all the same."""
        if self._withdraw(ident, None if name == "put" else _GRACE):
            return False
        self._channels.node.wait(slot)
        return True

    def _withdraw(self, ident: int, limit: float | None) -> bool:
        """Take an operation back whose time is over; tell whether that came before its end.

        The owner knows. Whether an item was put, nobody else can say; an item taken late is given
        back, so that for all else an owner that is stuck need not be waited for.
        """
        node = self._channels.node
        word = node.request(self.where, Withdraw(ident))
        try:
            node.wait(word, limit)
        except TimeoutError:
            return node.pending.pop(ident, None) is not None
        if word.error is not None:
            raise word.failure()
        return bool(word.value[1]) and node.pending.pop(ident, None) is not None

    def _take_back_put(self, section: Section, peer: Peer, ident: int, slot: Slot) -> None:
        """Take an interrupted put back: raise KeyboardInterrupt, or return if the item is there."""
        node = self._channels.node
        try:
            if not slot.ready and peer.alive:
                word = node.request(self.where, Withdraw(ident))
                self._await_word(word)
                if word.error is None and not word.value[1]:
                    self._await_word(slot)
        except (KeyboardInterrupt, TimeoutError):  # once more; or the owner is stuck
            node.pending.pop(ident, None)
            interrupt = KeyboardInterrupt()
            interrupt.add_note(f"{peer.pid}: whether it has the item that was put is not known")
            raise interrupt from None
        node.pending.pop(ident, None)
        if not slot.ready or slot.error is not None or slot.value[0] & OUTCOME != OK:
            raise KeyboardInterrupt
        section.succeed()
        section.again()

    def _await_word(self, slot: Slot) -> None:
        """Wait for the owner's word on a put; more interrupts count only after a while."""
        node = self._channels.node
        since = node.machine.now()
        while True:
            try:
                node.wait(slot, max(0.0, since + _PATIENCE - node.machine.now()))
                return
            except KeyboardInterrupt:
                if node.machine.now() - since > _SAME_PRESS:
                    raise

    def _abandon(
        self, section: Section, peer: Peer, ident: int, slot: Slot, error: BaseException
    ) -> None:
        """Take an operation back that was broken off; an item that was taken is given back.

        The owner's word is waited for, for a moment: an item on its way is then here, and back
        before our next take can overtake it.
        """
        node = self._channels.node
        try:
            if not slot.ready and peer.alive:
                node.wait(node.request(self.where, Withdraw(ident)), _GRACE)
        except (TimeoutError, KeyboardInterrupt, HpcdistError):
            pass  # an item that comes now finds nobody, and is given back
        if node.pending.pop(ident, None) is None:
            node.wait_out(slot, section, error)  # it is here, or in the hands of the driver
            if slot.error is None:
                flags, body, buffers = slot.value
                node.unclaimed(peer, flags, ident, body, buffers)
        node.progress.nudge()

    def _operate_here(self, name: str, args: tuple[object, ...], timeout: float | None) -> Any:
        backing = self._channels.backing_of(self.key)
        if backing is None:
            raise HpcdistError(_USED)
        keywords: dict[str, Any] = {}
        if timeout is not None and name in BLOCKING:
            keywords["timeout"] = timeout
        if type(backing) is Channel:
            # Neither as below: CPython looks for signals after a call with `*` or `**`.
            if name == "take" and not args:
                return backing.take(timeout=timeout)
            if name == "put" and len(args) == 1:
                return backing.put(object_paths.dumps(args[0], "the item").own(), timeout=timeout)
            return getattr(backing, name)(*args, **keywords)
        try:
            return getattr(backing, name)(*args, **keywords)
        except (ChannelClosed, TimeoutError):
            raise
        except Exception as exc:
            me = self._channels.node.me
            raise _errors.decode_error(_errors.encode_error(exc, me)) from None

    def _item_with_references(self, section: Section, slot: Slot) -> Any:
        """Unpickle what has come with references."""
        _, body, buffers = slot.value
        parcel = self._references.arrived(body, buffers, True)
        slot.value = (OK, parcel.body, parcel.buffers)  # they are counted: not once more
        return section.openly(codec.loads, parcel.body, parcel.buffers)


class _Making(Slot):
    """Waits for a channel to be made."""

    __slots__ = ("abandoned",)

    def __init__(self, where: int) -> None:
        super().__init__(where)
        self.abandoned: RemoteChannel[Any] | None = None  # nobody waits, but to let go of it

    def arrived(self) -> None:
        channel, self.abandoned = self.abandoned, None
        if channel is not None and self.error is None and self.value[0] & OUTCOME == OK:
            channel._held = 1  # and its end, which is now, lets go of it


_HEAD_PLAIN = struct.Struct(HEAD.format + PLAIN.format[1:])
_GRACE = 0.25  # seconds that an owner has to say whether an operation came to its end
_PATIENCE = 5.0  # the same, for a put that was interrupted: a later interrupt ends it
_SAME_PRESS = 1.0  # seconds within which more interrupts say the same as the first
_NUMBERS = {int, float, complex, bool, type(None)}  # nothing inside to look after
_USED = "this remote channel has been freed"


def _failure(outcome: int, body: Body) -> BaseException:
    if outcome == CLOSED:
        return ChannelClosed()
    if outcome == TIMED_OUT:
        return TimeoutError()
    if outcome == NO_SUCH:
        return HpcdistError(_USED)
    return _errors.decode_error(bytes(body))


def _remote_channel(where: int, whence: int, ident: int) -> RemoteChannel[Any]:
    """Unpickle a remote channel."""
    found: RemoteChannel[Any] = References.here().handle(RemoteChannel, where, whence, ident, None)
    return found


@public
def channel_from_id(ref: tuple[int, int]) -> Any:
    """Return the channel behind a remote channel, on the process that owns it.

    Raises:
        ValueError: It does not live here.
    """
    return OwnedChannels.here().channel(ref)


@public
def remoteref_id(ref: Reference) -> tuple[int, int]:
    """Return what names a reference everywhere: (the process that made it, its number there)."""
    here.node.admit()
    return ref.key
