"""Remote objects: an object on one process, whose methods any process can call."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

from hpcdist._errors import HpcdistError
from hpcdist._frames import brief, cut
from hpcdist._public import public
from hpcdist._remote.calls import ANY, Calls
from hpcdist._remote.futures import Future, Futures
from hpcdist._remote.object_owners import ATTRIBUTE, FREED, FRONT, NO_SUCH, Objects, laid_out, make
from hpcdist._runtime.node import Node, Service
from hpcdist._runtime.references import Reference, References
from hpcdist._transport.contracts import Slot
from hpcdist._transport.router import Peer
from hpcdist._wire import codec, object_paths
from hpcdist._wire.frames import CONTROL, FETCH, FUTURE, HEAD, KEYWORDS, OK, OUTCOME, REFS, pack
from hpcdist._wire.messages import INVOKE, Free

_head_front = struct.Struct(HEAD.format + FRONT.format[1:]).pack
_SHORT = 1024  # bytes that are cheaper to copy than to look after
_OWN = {"where", "whence", "id", "_references", "_held", "_freed", "_class", "_calls"}


class RemoteMethod:
    """A method of a remote object, to be called: it runs where the object lives."""

    __slots__ = ("_calls", "_name", "_object")

    def __init__(self, owner: RemoteObject, name: str) -> None:
        self._calls = owner._calls
        self._object = owner
        self._name = name

    def __call__(self, /, *args: object, **kw: object) -> Any:
        """Call the method and return its result."""
        try:  # not @brief: it would be one more call for each of a method
            return self._calls.fetch(self._object, self._name, args, kw)
        except BaseException as exc:
            cut(exc)
            raise

    def remotecall(self, /, *args: object, **kw: object) -> Future[Any]:
        """Start the method and return its future at once."""
        return self._calls.start(self._object, self._name, args, kw)

    def __reduce__(self) -> Any:
        return RemoteMethod, (self._object, self._name)

    def __repr__(self) -> str:
        return f"<method {self._name} of {self._object!r}>"


@public
class RemoteObject(Reference):
    """An object that lives on one worker: `obj.method(x)` runs there.

    `obj.method.remotecall(x)` gives a future, `obj.get("name")` an attribute. The object goes with
    the last reference to it, with `free()`, or with its worker.

    Args:
        cls: Makes the object, on its process: a class, or any function.
        pid: The process it lives on; the next worker by default.
        args, kw: What `cls` is called with.

    Raises:
        RemoteException: `cls` raised; it is also an instance of what was raised.

    Example:
        >>> import hpcdist
        >>> words = hpcdist.RemoteObject(list, 1, "ab")
        >>> words.append("c")
        >>> words.index.remotecall("c").fetch()
        2
    """

    _freed = False
    _class: str
    _calls: ObjectCalls

    @brief
    def __init__(
        self, cls: Callable[..., object], pid: Any = None, /, *args: object, **kw: object
    ) -> None:
        references = self._references = References.here()
        node = references.node
        self._calls = node.service(ObjectCalls)
        node.admit()
        if not callable(cls):
            raise TypeError(f"a class is needed to make a remote object, not {cls!r}")
        calls = node.service(Calls)
        self.where = calls.resolve(ANY if pid is None else pid)
        self.whence, self.id = node.me, next(node.ids)
        self._class = getattr(cls, "__name__", type(cls).__name__)
        try:
            calls.remotecall_fetch(make, self.where, (*self.key, node.me, cls, *args), kw)
        except KeyboardInterrupt:  # it may come to be all the same
            self._held = 1
            raise
        self._held = 1

    @classmethod
    def _received(cls, where: int, whence: int, ident: int, facts: Any) -> RemoteObject:
        self = cls.__new__(cls)
        self._calls = ObjectCalls.here()
        self.where, self.whence, self.id, self._class = where, whence, ident, facts
        return self

    def _facts(self) -> str:
        return self._class

    def __reduce__(self) -> Any:
        if self._freed:
            raise HpcdistError(FREED)
        self._travels()
        return _remote_object, (self.where, self.whence, self.id, self._class)

    def __del__(self) -> None:
        if self._held:
            self._let_go()

    def __repr__(self) -> str:
        return f"<RemoteObject of class {self._class} on process {self.where}>"

    def __getattr__(self, name: str) -> RemoteMethod:
        if name[:1] == "_":  # or else copy, pickle, notebooks and others would find them
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}; "
                f"a method of that name is called as obj[{name!r}](…)",
                name=name,
                obj=self,
            )
        return RemoteMethod(self, name)

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _OWN:
            raise AttributeError(
                f"attribute {name!r} of a remote object is set by a method of its class"
            )
        object.__setattr__(self, name, value)

    def __getitem__(self, name: str) -> RemoteMethod:
        """Give a method by its name, whatever the name."""
        return RemoteMethod(self, name)

    __iter__ = None  # or else `for` would call methods 0, 1, 2 …

    @brief
    def get(self, name: str) -> Any:
        """Return an attribute of the object; `"a.b"` is one of its attribute's."""
        return self._calls.fetch(self, ATTRIBUTE, (name,), {})

    def free(self) -> None:
        """Let the object go now, even if others hold a reference."""
        if self._freed:
            return
        self._freed = True
        self._held = 0
        node = self._references.node
        if self.where == node.me:
            self._references.free(self.key, self.where)
        elif self.where not in node.members.gone:
            node.wait(node.request(self.where, Free(self.key)))

    def __enter__(self) -> RemoteObject:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()


class ObjectCalls(Service):
    """The calls of remote objects' methods that this process makes.

    They are here, and not with the object: CPython 3.11 is slow with what has `__getattr__`.
    """

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._calls = node.service(Calls)
        self._futures = node.service(Futures)
        self._objects = node.service(Objects)
        self._references = node.service(References)
        self._now = node.machine.now

    def start(
        self, owner: RemoteObject, name: str, args: tuple[object, ...], kw: Mapping[str, object]
    ) -> Future[Any]:
        """Start a method and return its future at once."""
        if owner._freed:
            raise HpcdistError(FREED)
        node, where = self.node, owner.where
        ident = next(node.ids)
        future = self._futures.of_call(where, ident, name or "get")
        if where == node.me:
            self._objects.call_here(owner.key, name, args, kw, FUTURE, ident, future)
            return future
        peer = node.peer(where)
        self._send(peer, owner, name, args, kw, FUTURE, ident, future)
        self._calls.keep_pace(peer)
        return future

    def fetch(
        self, owner: RemoteObject, name: str, args: tuple[object, ...], kw: Mapping[str, object]
    ) -> Any:
        """Call a method, wait for its result and return it."""
        if owner._freed:
            raise HpcdistError(FREED)
        node, where = self.node, owner.where
        slot = Slot(where)
        slot.called = name or "get"
        ident = next(node.ids)
        if where == node.me:
            self._objects.call_here(owner.key, name, args, kw, FETCH, ident, slot)
        else:
            peer = node.peer(where)
            if peer.plane is not None:
                peer.plane.rouse(peer.rank)  # it wakes while we get ready
            self._send(peer, owner, name, args, kw, FETCH, ident, slot)
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
        if flags & OUTCOME == NO_SUCH:
            raise HpcdistError(FREED)
        return self._calls.result_of(flags, body, buffers)

    def _send(
        self,
        peer: Peer,
        owner: RemoteObject,
        name: str,
        args: tuple[object, ...],
        kw: Mapping[str, object],
        wants: int,
        ident: int,
        waiter: Any,
    ) -> None:
        node = self.node
        waiter.since = self._now()
        node.pending[ident] = waiter
        try:
            plain = None if kw else codec.dump_atoms(args) if args else b""
            if plain is not None and len(plain) <= _SHORT:
                named = name.encode()
                size = FRONT.size + len(named) + len(plain)
                front = (owner.whence, owner.id, wants, len(named))
                data = _head_front(CONTROL, 0, 0, size, ident, INVOKE, *front) + named + plain
                if wants == FETCH:
                    peer.dispatch(data)
                else:
                    peer.post(data, (), None, waiter)
                    peer.hurry()
            else:
                self._send_all(peer, owner, name, args, kw, wants, ident, waiter)
        except BaseException:
            node.pending.pop(ident, None)
            raise
        if not peer.alive:
            node.fail(ident, waiter)

    def _send_all(
        self,
        peer: Peer,
        owner: RemoteObject,
        name: str,
        args: tuple[object, ...],
        kw: Mapping[str, object],
        wants: int,
        ident: int,
        waiter: Any,
    ) -> None:
        """Send a call with any arguments."""
        payload = object_paths.dumps_call((args, kw) if kw else args, owner[name], args, kw)
        if payload.buffers and wants != FETCH:
            payload.own()  # the caller goes on, and may change what it sent
        body, buffers, with_refs = self._references.outgoing(payload, peer.pid)
        flags = wants | (KEYWORDS if kw else 0) | (REFS if with_refs else 0)
        body = laid_out(owner.key, flags, name) + body
        holder = waiter if wants == FUTURE else None
        peer.post(*pack(CONTROL, 0, ident, INVOKE, body, buffers), None, holder)
        for bound in payload.names:  # functions among the arguments assign these there
            peer.bound.pop(bound, None)
        if wants == FETCH:
            self.node.progress.flush()
        else:
            peer.hurry()


def _remote_object(where: int, whence: int, ident: int, facts: str) -> RemoteObject:
    """Unpickle a remote object's handle."""
    found: RemoteObject = References.here().handle(RemoteObject, where, whence, ident, facts)
    return found
