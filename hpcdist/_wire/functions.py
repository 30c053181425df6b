"""Functions by id: a definition travels once to each peer, then eight bytes name it.

Two sides. The sender describes a function: `describe(f)` gives its id and definition, or None
where it has to travel whole with every call (bound methods, callables, partials). The receiver
keeps definitions and makes the function when a call names it.

What may change between calls is not part of the definition: captured values and defaults travel
with each call, and the globals of `__main__` a function uses travel when the peer has not seen
their present value.
"""

from __future__ import annotations

import hashlib
import inspect
import pickle
import sys
import weakref
from collections.abc import Callable
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, ModuleType
from typing import Any

from hpcdist._wire import codec, frames

_CONSTANT = (int, float, complex, str, bytes, bool, type(None), ModuleType, BuiltinFunctionType)
_COROUTINE = inspect.CO_COROUTINE
_KEPT_MOST = 4096


class Description:
    """What a sender knows of one function."""

    __slots__ = ("definition", "flags", "guards", "ident", "names", "plain", "ref", "varies")

    def __init__(self, ident: int, definition: bytes, flags: int) -> None:
        self.ident = ident
        self.definition = definition
        self.flags = flags
        self.varies = False  # captured values or defaults travel with each call
        self.names: tuple[str, ...] = ()  # globals of __main__ it uses
        # Values the definition holds: (globals, name, value); another value, another definition.
        self.guards: tuple[tuple[dict[str, Any], str, Any], ...] = ()
        self.ref: Callable[[], Any] = _nothing
        self.plain = False  # the id says all: nothing has to be looked at before a call


def _nothing() -> None:
    return None


_by_id: dict[int, Description] = {}
_by_code: dict[int, tuple[CodeType, str, Description]] = {}


def describe(f: Any) -> Description | None:
    """Describe a function, or return None if it must travel whole."""
    known = _by_id.get(id(f))
    if known is not None and known.ref() is f:
        if known.guards and not all(g.get(n) is v for g, n, v in known.guards):
            return _describe_anew(f)
        return known
    return _describe_anew(f)


def _describe_anew(f: Any) -> Description | None:
    found = _description(f)
    if found is None:
        return None
    key = id(f)
    found.plain = not (found.varies or found.names or found.guards)
    try:
        found.ref = weakref.ref(f, lambda _: _by_id.pop(key, None))
    except TypeError:  # builtins cannot be weakly referenced; they live as long as we do
        found.ref = lambda: f
    if len(_by_id) >= _KEPT_MOST:
        _by_id.clear()
    _by_id[key] = found
    return found


def _description(f: Any) -> Description | None:
    if isinstance(f, FunctionType):
        if "<" not in f.__qualname__ and codec.by_reference(f):
            return _named(f)
        if f.__globals__ is codec.main_globals():
            return _skeleton(f)
        return _whole(f)
    if isinstance(f, BuiltinFunctionType) and isinstance(f.__self__, ModuleType):
        return _named(f)
    if isinstance(f, type) and f.__module__ != "__main__" and codec.by_reference(f):
        return _named(f)
    return None


def _named(f: Any) -> Description | None:
    try:
        reference = pickle.dumps(f, 5)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None
    name = getattr(f, "__qualname__", ".")
    if "." in name:
        return _finished(("object", reference), _flags(f))
    return _finished(("named", f.__module__, name, reference), _flags(f))


def _skeleton(f: FunctionType) -> Description | None:
    """Describe a function of `__main__` by its code alone."""
    code, name = f.__code__, f.__qualname__
    kept = _by_code.get(id(code))
    if kept is not None and kept[1] == name:
        base = kept[2]
    else:
        try:
            payload = codec.dumps((code, (f.__name__, name, f.__doc__, f.__annotations__)))
        except Exception:  # an annotation that cannot be pickled: let the whole function try
            return None
        if payload.buffers or payload.refs:
            return None
        base = _finished(("code", payload.body), _flags(f))
        base.names = tuple(codec.global_names(code))
        if len(_by_code) >= _KEPT_MOST:
            _by_code.clear()
        _by_code[id(code)] = (code, name, base)
    made = Description(base.ident, base.definition, base.flags)
    made.names = base.names
    made.varies = bool(f.__closure__ or f.__defaults__ or f.__kwdefaults__ or f.__dict__)
    return made


def _whole(f: FunctionType) -> Description | None:
    """Describe a by-value function of a module, if all it captures stays as it is."""
    if f.__closure__ or f.__defaults__ or f.__kwdefaults__ or f.__dict__:
        return None
    used = [(n, f.__globals__[n]) for n in codec.global_names(f.__code__) if n in f.__globals__]
    if not all(_stays(v) for _, v in used):
        return None
    payload = codec.dumps(f)
    if payload.buffers or payload.refs:
        return None
    made = _finished(("object", payload.body), _flags(f))
    made.guards = tuple((f.__globals__, n, v) for n, v in used)
    return made


def _flags(f: Any) -> int:
    code = getattr(f, "__code__", None)
    return frames.ASYNC if code is not None and code.co_flags & _COROUTINE else 0


def _finished(parts: tuple[Any, ...], flags: int) -> Description:
    definition = pickle.dumps(parts, 5)
    digest = hashlib.blake2b(definition, digest_size=8).digest()
    return Description(int.from_bytes(digest, "little") or 1, definition, flags)


def _stays(value: Any) -> bool:
    """Tell whether a captured value cannot change under us."""
    if isinstance(value, _CONSTANT):
        return True
    if isinstance(value, tuple):
        return all(_stays(v) for v in value)
    return isinstance(value, FunctionType | type) and codec.by_reference(value)


def captured(f: FunctionType) -> tuple[Any, ...]:
    """The parts of a by-value function that travel with each call."""
    cells = tuple(_content(c) for c in f.__closure__) if f.__closure__ else ()
    return cells, f.__defaults__, f.__kwdefaults__, f.__dict__ or None


class _Empty:
    """The content of a cell that has none yet."""


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _Empty


def news(names: tuple[str, ...], seen: dict[str, Any]) -> dict[str, Any] | None:
    """Pick the globals of `__main__` a peer has to be told before it runs a function.

    Args:
        names: The globals the function uses.
        seen: What the peer was told so far; brought up to date here.
    """
    out: dict[str, Any] = {}
    _collect(names, seen, codec.main_globals(), out, set())
    return out or None


def _collect(
    names: tuple[str, ...],
    seen: dict[str, Any],
    main: dict[str, Any],
    out: dict[str, Any],
    done: set[str],
) -> bool:
    """Collect into `out`; tell whether anything was new."""
    anything = False
    for name in names:
        if name in done or name not in main:
            continue
        done.add(name)
        value = main[name]
        fresh = seen.get(name, _Empty) is not value
        if isinstance(value, FunctionType) and value.__globals__ is main:
            inner = tuple(codec.global_names(value.__code__))
            varies = bool(value.__closure__ or value.__defaults__ or value.__kwdefaults__)
            fresh = _collect(inner, seen, main, out, done) or fresh or varies
        elif not isinstance(value, type) and not _stays(value):
            fresh = True
        if fresh:
            out[name] = seen[name] = value
            anything = True
    return anything


# The receiver's side.

_definitions: dict[int, bytes] = {}
_functions: dict[int, Any] = {}


class _Named:
    """An importable function: looked up at each call, so that a reload takes effect."""

    __slots__ = ("name", "space")

    def __init__(self, space: dict[str, Any], name: str) -> None:
        self.space = space
        self.name = name


def define(ident: int, definition: bytes) -> None:
    """Keep a definition that arrived; it is read when a call first needs it."""
    if ident not in _definitions:
        _definitions[ident] = definition


def function(ident: int, variable: tuple[Any, ...] | None = None) -> Any:
    """Give the function of an id, with its captured values."""
    made = _functions.get(ident)
    if made is None:
        made = _functions[ident] = _read(_definitions[ident])
    if type(made) is _Named:
        return made.space[made.name]
    if type(made) is _Code:
        return made.make(variable)
    return made


class _Code:
    """A function of `__main__` without its captured values."""

    __slots__ = ("bare", "code", "notes")

    def __init__(self, code: CodeType, notes: tuple[Any, ...]) -> None:
        self.code = code
        self.notes = notes
        self.bare: FunctionType | None = None

    def make(self, variable: tuple[Any, ...] | None) -> FunctionType:
        if variable is None:
            main = codec.main_globals()
            if self.bare is None or self.bare.__globals__ is not main:
                self.bare = self._build(main, (), None)
            return self.bare
        cells, defaults, keywords, attributes = variable
        f = self._build(codec.main_globals(), cells, defaults)
        f.__kwdefaults__ = keywords
        if attributes:
            f.__dict__.update(attributes)
        return f

    def _build(
        self, main: dict[str, Any], cells: tuple[Any, ...], defaults: tuple[Any, ...] | None
    ) -> FunctionType:
        name, qualname, doc, annotations = self.notes
        closure = tuple(CellType() if c is _Empty else CellType(c) for c in cells)
        f = FunctionType(self.code, main, name, defaults, closure)
        f.__qualname__, f.__doc__, f.__annotations__ = qualname, doc, annotations
        f.__module__ = "__main__"
        return f


def _read(definition: bytes) -> Any:
    kind, *parts = pickle.loads(definition)
    if kind == "code":
        return _Code(*codec.loads(parts[0]))
    if kind == "object":
        return codec.loads(parts[0])
    module, name, reference = parts
    found = pickle.loads(reference)  # imports the module, and says in Python's words if it can't
    space = getattr(sys.modules.get(module), "__dict__", {})
    return _Named(space, name) if space.get(name) is found else found
