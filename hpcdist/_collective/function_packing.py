"""Functions and arguments packed once for many processes.

A call to one process leaves out what that process has seen. What goes to many, and is passed on
by some of them, has to hold everything: the definition too. Both sides keep definitions by id, so
a repeated function costs a few hundred bytes and no pickling.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

from hpcdist._remote.calls import Calls
from hpcdist._runtime.node import Node, Service
from hpcdist._runtime.references import Reference
from hpcdist._wire import codec, functions, generators, object_paths
from hpcdist._wire.codec import Payload
from hpcdist._wire.frames import Body, Buffer

# How a function travels: (id, definition, globals of `__main__`, captured values), or itself.
Shipped = tuple[int, bytes, dict[str, Any] | None, tuple[Any, ...] | None] | tuple[int, Any]


class FunctionPacking(Service):
    """Packs functions for many processes, and makes them of what came so."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._functions = node.service(Calls).functions

    def ship(self, f: Any) -> Shipped:
        """Describe a function for any process."""
        known = self._functions.describe(f)
        if known is None:
            if not callable(f):
                raise TypeError(f"a function is needed to call, not {f!r}")
            return 0, f
        fresh = self._functions.news(known.names, {}) if known.names else None
        variable = functions.captured(f) if known.varies else None
        return known.ident, known.definition, fresh, variable

    def unship(self, shipped: Shipped) -> Any:
        """Make the function that was described."""
        if len(shipped) == 2:
            return shipped[1]
        ident, definition, fresh, variable = shipped
        self._functions.define(ident, definition)
        if fresh:
            codec.main_globals().update(fresh)
        return self._functions.function(ident, variable)

    def is_async(self, f: object) -> bool:
        """Tell whether a function is a coroutine function: it takes no turn."""
        known = self._functions.describe(f)
        return known is not None and bool(known.flags)

    def pack(self, value: Any, shipped: Sequence[Any], f: Any) -> Payload:
        """Pickle small data with functions in it; plainly, if the functions carry nothing."""
        for one in shipped:
            if one is not None and (len(one) == 2 or one[2] or one[3]):
                payload = object_paths.dumps_call(value, f)
                generators.warn_of_copies(f, [payload.body])
                return payload
        return Payload(pickle.dumps(value, 5))

    def pack_call(self, f: Any, args: Any, kw: Any) -> Payload:
        """Pickle a call for any process."""
        payload = object_paths.dumps_call((self.ship(f), args, kw), f, args, kw)
        generators.warn_of_copies(f, [payload.body])
        return payload

    def unpack_call(self, body: Body, buffers: Sequence[Buffer]) -> tuple[Any, Any, Any]:
        """Unpickle a call."""
        shipped, args, kw = codec.loads(body, buffers)
        return self.unship(shipped), args, kw

    def seal(self, f: object, args: tuple[object, ...], kw: dict[str, Any], seed: int) -> Sealed:
        """Pickle a section; what it was made of may be changed at once."""
        self._functions.notice_reloads(f)
        what = (self.ship(f), args, kw, seed)
        payload = object_paths.dumps_call(what, f, args, kw).own()
        generators.warn_of_copies(f, [payload.body])
        return Sealed(payload.body, payload.buffers, payload.refs)


class Sealed:
    """A function and its arguments, pickled once, to be sent to several processes."""

    def __init__(self, body: bytes, buffers: Sequence[Buffer], refs: Sequence[Reference]) -> None:
        self.body = body
        self.buffers = buffers
        self.refs = refs  # pickled again beside the body, so that each receiver is counted

    def open(self, packing: FunctionPacking) -> tuple[Any, Any, Any, int]:
        """Rebuild the function, its arguments, and the seed."""
        shipped, args, kw, seed = codec.loads(self.body, self.buffers)
        return packing.unship(shipped), args, kw, seed

    def __reduce__(self) -> Any:
        buffers = [pickle.PickleBuffer(b) for b in self.buffers]
        return Sealed, (self.body, buffers, tuple(self.refs))
