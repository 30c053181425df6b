"""Functions and arguments packed once for many processes.

A call to one process leaves out what that process has seen. What goes to many, and is passed on
by some of them, has to hold everything: the definition too. Both sides keep definitions by id, so
a repeated function costs a few hundred bytes and no pickling.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

from hpcdist._wire import codec, functions
from hpcdist._wire.codec import Payload

# How a function travels: (id, definition, globals of `__main__`, captured values), or itself.
Shipped = tuple[int, bytes, dict[str, Any] | None, tuple[Any, ...] | None] | tuple[int, Any]


def ship(f: Any) -> Shipped:
    """Describe a function for any process."""
    known = functions.describe(f)
    if known is None:
        if not callable(f):
            raise TypeError(f"a function is needed to call, not {f!r}")
        return 0, f
    fresh = functions.news(known.names, {}) if known.names else None
    variable = functions.captured(f) if known.varies else None
    return known.ident, known.definition, fresh, variable


def unship(shipped: Shipped) -> Any:
    """Make the function that was described."""
    if len(shipped) == 2:
        return shipped[1]
    ident, definition, fresh, variable = shipped
    functions.define(ident, definition)
    if fresh:
        codec.main_globals().update(fresh)
    return functions.function(ident, variable)


def is_async(f: Any) -> bool:
    """Tell whether a function is a coroutine function: it takes no turn."""
    known = functions.describe(f)
    return known is not None and bool(known.flags)


def pack(value: Any, shipped: Sequence[Any]) -> Payload:
    """Pickle small data with functions in it; plainly, if the functions carry nothing."""
    for one in shipped:
        if one is not None and (len(one) == 2 or one[2] or one[3]):
            return codec.dumps(value)
    return Payload(pickle.dumps(value, 5))


def pack_call(f: Any, args: Any, kw: Any) -> Payload:
    """Pickle a call for any process."""
    return codec.dumps((ship(f), args, kw))


def unpack_call(body: Any, buffers: Any) -> tuple[Any, Any, Any]:
    """Unpickle a call."""
    shipped, args, kw = codec.loads(body, buffers)
    return unship(shipped), args, kw
