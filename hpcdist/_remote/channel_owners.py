"""Remote channels, their owner's side: channels on this process, served to others.

Built-in channels are served on the progress side, so they work while a user's function hogs the
process; items stay pickled here. A backing of the user's own runs its operations as calls on
threads that take no turn, since one of them may block until another one comes.

An item that was taken is under way until its taker acknowledges it: a taker that dies or gives up
before that gives it back.
"""

from __future__ import annotations

import inspect
import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from hpcdist import _errors
from hpcdist._errors import ChannelClosed
from hpcdist._remote import channels
from hpcdist._remote.channels import Channel, Waiter
from hpcdist._runtime.node import Mail, Node, Service, on, on_raw
from hpcdist._runtime.references import References
from hpcdist._transport.router import Peer
from hpcdist._wire import codec, object_paths
from hpcdist._wire.codec import Payload
from hpcdist._wire.frames import FAILED, HEAD, OK, REFS, RESULT, Body, Buffer
from hpcdist._wire.messages import (
    ACKNOWLEDGE,
    PUT_ITEM,
    TAKE_ITEM,
    Farewell,
    Free,
    GiveBack,
    Operate,
    RefId,
    Withdraw,
)

CLOSED, TIMED_OUT, NO_SUCH = 6, 7, 8  # outcomes of channel operations, beside OK and FAILED
QUICK = {"isready", "isempty", "isopen", "close", "__len__"}
BLOCKING = {"put", "take", "fetch", "wait"}
PLAIN = struct.Struct("<QQd")  # whence, id, timeout: what precedes the item of a plain put
NO_LIMIT = -1.0
SHORT = 4096  # bytes of an item that travels with its control in one small message
NO_ARGUMENTS = Payload(b"")


class OwnedChannels(Service):
    """The channels that this process owns, and what others do with them."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.references = node.service(References)
        # Remote operations that wait, by (pid, id).
        self._waiting: dict[tuple[int, int], tuple[Channel, Waiter]] = {}
        # Items taken and not acknowledged, each with what gives it back.
        self._under_way: dict[tuple[int, int], tuple[Callable[[Any], None], Any]] = {}
        node.on_unclaimed.append(self._unclaimed)
        node.on_death.append(self._on_death)

    def make(self, ref: RefId, holder: int, factory: Callable[[], Any] | int) -> None:
        """Make a channel that this process owns."""
        channel = factory() if callable(factory) else Channel(factory)
        needed = ("put", "take")
        if not all(hasattr(channel, name) for name in needed):
            raise TypeError(
                "a remote channel's factory must return an object with put and take, "
                f"not {channel!r}"
            )
        self.references.count(ref, holder, 1, lambda: channel)
        entry = self.references.owned.get(ref)
        if entry is not None and type(channel) is Channel:  # its holder has not died meanwhile
            entry.on_free = channel.close  # waiters get ChannelClosed

    def backing_of(self, ref: RefId) -> Any:
        """Find what is behind a remote channel; None: it is not, or no longer, here."""
        entry = self.references.owned.get(ref)
        return entry.value if entry is not None else None

    def channel(self, ref: RefId) -> Any:
        """Give what is behind a remote channel to its owner's own code."""
        self.node.admit()
        backing = self.backing_of((ref[0], ref[1]))
        if backing is None:
            raise ValueError("Local instance of remote reference not found")
        return backing

    # What others do

    @on(Free)
    def _on_free(self, said: Free, mail: Mail) -> None:
        self.references.free(said.ref, mail.peer.pid)
        self.node.reply(mail.peer, mail.ident, OK)

    @on(Operate)
    def _on_operate(self, said: Operate, mail: Mail) -> None:
        parcel = self.references.arrived(mail.body, mail.buffers, said.with_refs)
        backing = self.backing_of(said.ref)
        self._begin(backing, said.name, said.builtin, mail.peer, mail.ident, parcel, said.timeout)

    def _begin(
        self,
        backing: object,
        name: str,
        builtin: bool,
        peer: Peer,
        ident: int,
        parcel: Payload,
        timeout: float | None,
    ) -> None:
        """Begin an operation, on the progress side or on a thread of its own."""
        if backing is None:
            self.node.reply(peer, ident, NO_SUCH)
        elif type(backing) is Channel and builtin:
            self._serve(backing, name, peer, ident, parcel)
        else:
            single = name == "put" and builtin
            self.node.turns.background(
                lambda: self._operate_backing(backing, name, peer, ident, parcel, timeout, single)
            )

    @on_raw(PUT_ITEM)
    def _on_put_item(self, peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
        whence, number, limit = PLAIN.unpack_from(body)
        backing = self.backing_of((whence, number))
        item = Payload(body[PLAIN.size :])
        if type(backing) is Channel and backing.try_put(item):
            peer.answer(HEAD.pack(RESULT, OK, 0, 0, ident, 0))
        else:
            self._begin(backing, "put", True, peer, ident, item, _timeout(limit))

    @on_raw(TAKE_ITEM)
    def _on_take_item(self, peer: Peer, ident: int, body: Body, buffers: Sequence[Buffer]) -> None:
        whence, number, limit = PLAIN.unpack_from(body)
        backing = self.backing_of((whence, number))
        taken = backing.try_take() if type(backing) is Channel else None
        if taken is None:
            self._begin(backing, "take", True, peer, ident, NO_ARGUMENTS, _timeout(limit))
            return
        number, item = taken
        self._under_way[peer.pid, ident] = (partial(backing.give_back, number), item)
        is_pickled = isinstance(item, Payload)
        if is_pickled and len(item.body) <= SHORT and not (item.buffers or item.refs):
            peer.answer(HEAD.pack(RESULT, OK, 0, len(item.body), ident, 0) + item.body)
        else:
            self._send_item(peer, ident, item)

    def _serve(self, channel: Channel, name: str, peer: Peer, ident: int, parcel: Payload) -> None:
        """Do an operation on a built-in channel, on the progress side."""
        if name in QUICK:
            value = getattr(channel, name)()
            self.node.reply(peer, ident, OK, codec.dumps(value).body if value is not None else b"")
            return
        key = (peer.pid, ident)

        def done(number: int, value: object) -> None:
            self._waiting.pop(key, None)
            if value is channels.CLOSED:
                self.node.reply(peer, ident, CLOSED)
            elif not peer.alive:
                if name == "take":
                    channel.give_back(number, value)
            elif name == "put" or name == "wait":
                self.node.reply(peer, ident, OK)
            else:
                if name == "take":
                    self._under_way[key] = (partial(channel.give_back, number), value)
                self._send_item(peer, ident, value)
            self.node.progress.soon()

        waiter = Waiter(done, parcel)
        self._waiting[key] = (channel, waiter)
        if name == "put":
            channel.start_put(waiter)
        elif name == "take":
            channel.start_take(waiter)
        else:
            channel.start_peek(waiter)

    def _send_item(self, peer: Peer, ident: int, value: object) -> None:
        if isinstance(value, Payload):
            body, buffers, with_refs = self.references.outgoing(value, peer.pid)
            self.node.reply(peer, ident, OK | (REFS if with_refs else 0), body, buffers)
            return

        def pickled() -> None:  # put by the owner through the backing itself: not pickled yet
            try:
                self._send_item(peer, ident, object_paths.dumps(value, "the item"))
            except Exception as exc:
                self.node.reply(peer, ident, FAILED, _errors.encode_error(exc, self.node.me))
            self.node.progress.nudge()

        self.node.turns.background(pickled)

    def _operate_backing(
        self,
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
            keywords = {"timeout": timeout} if timeout is not None and name in BLOCKING else {}
            value = getattr(backing, name)(*args, **keywords)
            if inspect.isawaitable(value):
                raise TypeError(f"{name} of a channel's backing may not be a coroutine function")
            if name in ("put", "wait", "close"):
                value = None
            payload = object_paths.dumps(value, "the item") if value is not None else NO_ARGUMENTS
            body, buffers, with_refs = self.references.outgoing(payload, peer.pid)
            if name == "take":
                # Nothing is known of a backing but that it takes items back by its `put`.
                back = lambda item: self.node.turns.background(lambda: backing.put(item, *args))
                self._under_way[peer.pid, ident] = (back, value)
                if not peer.alive:
                    self._give_back((peer.pid, ident))
            self.node.reply(peer, ident, OK | (REFS if with_refs else 0), body, buffers)
        except ChannelClosed:
            self.node.reply(peer, ident, CLOSED)
        except TimeoutError:
            self.node.reply(peer, ident, TIMED_OUT)
        except Exception as exc:
            self.node.reply(peer, ident, FAILED, _errors.encode_error(exc, self.node.me))
        self.node.progress.nudge()

    # Given up, and given back

    @on(Withdraw)
    def _on_withdraw(self, said: Withdraw, mail: Mail) -> None:
        key = (mail.peer.pid, said.operation)
        channel, waiter = self._waiting.pop(key, (None, None))
        withdrawn = channel is not None and waiter is not None and channel.withdraw(waiter)
        if mail.ident:
            self.node.reply(mail.peer, mail.ident, OK, b"1" if withdrawn else b"")

    @on_raw(ACKNOWLEDGE)
    def _on_acknowledge(
        self, peer: Peer, ident: int, body: Body, buffers: Sequence[Buffer]
    ) -> None:
        self._under_way.pop((peer.pid, ident), None)

    @on(Farewell)
    def _on_farewell(self, said: Farewell, mail: Mail) -> None:
        self.node.reply(mail.peer, mail.ident, OK)

    @on(GiveBack)
    def _on_give_back(self, said: GiveBack, mail: Mail) -> None:
        self._give_back((mail.peer.pid, said.take))

    def _give_back(self, key: tuple[int, int]) -> None:
        give_back, item = self._under_way.pop(key, (None, None))
        if give_back is not None:
            give_back(item)

    def _unclaimed(
        self, peer: Peer, flags: int, ident: int, body: Any, buffers: Sequence[Buffer]
    ) -> None:
        """Give an answer back to the owner: the wait for it was given up."""
        if flags & REFS:
            self.references.arrive(body)
        peer.send(GiveBack(ident))

    def _on_death(self, pid: int) -> None:
        for key in [k for k in self._waiting if k[0] == pid]:
            channel, waiter = self._waiting.pop(key)
            channel.withdraw(waiter)
        for key in sorted((k for k in self._under_way if k[0] == pid), reverse=True):
            self._give_back(key)


def make(ref: RefId, holder: int, factory: Callable[[], Any] | int) -> None:
    """Make a channel that this process owns."""
    OwnedChannels.here().make(ref, holder, factory)


def _timeout(limit: float) -> float | None:
    return None if limit == NO_LIMIT else limit
