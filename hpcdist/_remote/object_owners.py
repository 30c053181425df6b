"""Remote objects, their owner's side: objects that live here, and the calls of their methods.

A method is a call like any other, which others make with a control of its own: by what stands in
front of the arguments, the owner knows the object before anything is unpickled, and queues the call
behind the earlier ones of that object.
"""

from __future__ import annotations

import inspect
import operator
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import CoroutineType
from typing import Any

from hpcdist._errors import HpcdistError
from hpcdist._remote.answers import Answers
from hpcdist._remote.calls import as_they_arrive
from hpcdist._runtime.lines import Line
from hpcdist._runtime.node import Node, Service, on_raw
from hpcdist._runtime.references import Reference, References
from hpcdist._runtime.running import Runners, Unpack, Unpacked
from hpcdist._runtime.turns import Call
from hpcdist._transport.router import Peer
from hpcdist._wire import codec
from hpcdist._wire.frames import FETCH, FUTURE, KEYWORDS, REFS, WANTS, Body, Buffer
from hpcdist._wire.messages import INVOKE, RefId

FRONT = struct.Struct("<QQBH")  # whence, id, flags of a call, length of the name that follows
ATTRIBUTE = ""  # in place of a method's name: the argument names an attribute
NO_SUCH = 8  # how a call ended, beside OK and FAILED: the object is not here any more
FREED = "this remote object has been freed"
_NO_KEYWORDS: Mapping[str, Any] = {}


class Living:
    """An object that lives here."""

    __slots__ = ("_coroutines", "line", "value")

    def __init__(self, value: object) -> None:
        self.value = value
        self.line = Line()
        self._coroutines: dict[str, bool] = {}

    def is_coroutine(self, name: str) -> bool:
        """Tell whether a method is `async def`; runs nothing of the user's."""
        found = self._coroutines.get(name)
        if found is None:
            method = inspect.getattr_static(type(self.value), name, None)
            function = getattr(method, "__func__", method)  # of a classmethod, say
            found = self._coroutines[name] = inspect.iscoroutinefunction(function)
        return found

    def end(self) -> None:
        """Let go of the object."""
        self.value = None


class MethodCall(Call):
    """A call of a method that has arrived, or that was made here: then no peer waits for it."""

    __slots__ = ("name", "value")

    value: Any  # the object: it lives until its last call has ended
    name: str


class Objects(Service):
    """The objects of the user's that live on this process."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._references = node.service(References)
        runners = node.service(Runners)
        answers = node.service(Answers)
        self._methods = runners.of(_unpack, answers.answer)
        self._coroutines = runners.of(partial(self._begun, _unpack), answers.answer)
        self._own_methods = runners.of(_as_given, answers.answer_here)
        self._own_coroutines = runners.of(partial(self._begun, _as_given), answers.answer_here)
        self._answer = answers.answer
        self._run = self._methods.run

    def keep(self, ref: RefId, holder: int, value: object) -> None:
        """Let an object live here for as long as somebody holds a reference to it."""
        living = Living(value)
        self._references.count(ref, holder, 1, lambda: living)
        entry = self._references.owned.get(ref)
        # On a thread of its own: what the class does at its end must not hold up the driver.
        end = partial(self.node.turns.background, living.end)
        if entry is None:  # its holder has died meanwhile
            end()
        else:
            entry.on_free = end

    @on_raw(INVOKE)
    def _on_invoke(self, peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
        ref, flags, name, rest = taken_apart(body)
        refs: Sequence[Reference] = ()
        if flags & REFS:
            refs, rest = self._references.arrive(rest)
        call = MethodCall(self._run, peer, flags, ident, 0, rest, buffers)
        call.refs = refs
        if self._start(call, ref, name):
            return
        if flags & WANTS == FETCH:
            self.node.reply(peer, ident, NO_SUCH)
        else:
            self._answer(call, None, HpcdistError(FREED))

    def call_here(
        self,
        ref: RefId,
        name: str,
        args: tuple[object, ...],
        kw: Mapping[str, object],
        wants: int,
        ident: int,
        waiter: Any,
    ) -> None:
        """Call a method of an object of this very process: nothing is pickled."""
        self.node.start()
        arrived, keywords = as_they_arrive(args, kw)
        call = MethodCall(self._own_methods.run, None, wants, ident, 0, None, ())
        call.body = (None, arrived, keywords, waiter)
        with self.node.progress.interrupts.section():  # who has got a turn has to run
            if not self._start(call, ref, name):
                raise HpcdistError(FREED)
            if wants == FUTURE:
                waiter._held = 1

    def _start(self, call: MethodCall, ref: RefId, name: str) -> bool:
        """Start a method, or queue it; tell whether its object is here."""
        entry = self._references.owned.get(ref)
        if entry is None:
            return False
        living: Living = entry.value
        call.value, call.name, call.line = living.value, name, living.line
        turns = self.node.turns
        if living.is_coroutine(name):
            if turns.begin(living.line):
                self._begin(call)
                return True
            call.run = self._begin_in_turn
        turns.submit(call)
        return True

    def _begin_in_turn(self, call: Call) -> None:
        assert isinstance(call, MethodCall)
        assert call.line is not None
        self.node.turns.will_begin(call.line)
        self._begin(call)

    def _begin(self, call: Call) -> None:
        (self._own_coroutines if call.peer is None else self._coroutines).start(call)

    def _begun(self, unpack: Unpack, call: Call) -> Unpacked:
        """Unpack a coroutine on the event loop; the next method waits for its first step."""
        import asyncio  # 30 ms, which a process without coroutines saves

        assert call.line is not None
        asyncio.get_running_loop().call_soon(self.node.turns.has_begun, call.line)
        return unpack(call)


def make(
    whence: int, ident: int, holder: int, cls: Callable[..., object], /, *args: Any, **kw: Any
) -> None:
    """Make an object that lives on this process."""
    value = cls(*args, **kw)
    if type(value) is CoroutineType:
        value = Runners.here().awaited(value)
    Objects.here().keep((whence, ident), holder, value)


def laid_out(ref: RefId, flags: int, name: str) -> bytes:
    """Lay out what stands before the arguments of a method."""
    named = name.encode()
    return FRONT.pack(*ref, flags, len(named)) + named


def taken_apart(body: Any) -> tuple[RefId, int, str, Body]:
    """Read what stands before the arguments of a method; return them, too."""
    whence, ident, flags, length = FRONT.unpack_from(body)
    end = FRONT.size + length
    return (whence, ident), flags, str(body[FRONT.size : end], "utf-8"), body[end:]


def _unpack(call: Call) -> Unpacked:
    """Return the method of a call, and its arguments."""
    assert isinstance(call, MethodCall)
    args: Any = codec.loads(call.body, call.buffers) if len(call.body) else ()
    kw: Mapping[str, Any] = _NO_KEYWORDS
    if call.flags & KEYWORDS:
        args, kw = args
    return _method(call.value, call.name), args, kw


def _as_given(call: Call) -> Unpacked:
    """Return the method of a call of this very process, and its arguments."""
    assert isinstance(call, MethodCall)
    _, args, kw, _ = call.body
    return _method(call.value, call.name), args, kw


def _method(owner: object, name: str) -> Callable[..., Any]:
    return getattr(owner, name) if name != ATTRIBUTE else partial(_attribute, owner)


def _attribute(owner: object, path: str) -> Any:
    return operator.attrgetter(path)(owner)
