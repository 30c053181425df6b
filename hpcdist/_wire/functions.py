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
import importlib
import inspect
import pickle
import sys
import weakref
from collections.abc import Callable
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, ModuleType
from typing import Any

from hpcdist._wire import codec, frames
from hpcdist._wire.reloads import Reloads

_CONSTANT = (int, float, complex, str, bytes, bool, type(None), range, ModuleType)
_COROUTINE = inspect.CO_COROUTINE
_KEPT_MOST = 4096


class Description:
    """What a sender knows of one function."""

    __slots__ = (
        "definition", "flags", "guards", "home", "ident", "name", "names", "plain", "ref", "spec",
        "varies",
    )  # fmt: skip

    def __init__(self, ident: int, definition: bytes, flags: int) -> None:
        self.ident = ident
        self.definition = definition
        self.flags = flags
        self.name = ""
        self.varies = False  # captured values or defaults travel with each call
        self.names: tuple[str, ...] = ()  # globals of __main__ it uses
        # Values the definition holds: (globals, name, value); another value, another definition.
        self.guards: tuple[tuple[dict[str, Any], str, Any], ...] = ()
        self.ref: Callable[[], Any] = _nothing
        self.home: ModuleType | None = None  # the module that it is found in by name
        self.spec: Any = None  # of that module, when it was last looked at
        self.plain = False  # the id says all: nothing has to be looked at before a call


def _nothing() -> None:
    return None


class Functions:
    """The functions that one process sends, and those that it was sent."""

    def __init__(self) -> None:
        # Called with the name of a module that was reloaded in this process.
        self.on_reload: list[Callable[[str], None]] = []
        self._reloads = Reloads(self.on_reload)
        self._by_id: dict[int, Description] = {}
        self._by_code: dict[int, tuple[CodeType, str, Description]] = {}
        self._definitions: dict[int, bytes] = {}  # that came
        self._made: dict[int, Any] = {}  # what was made of these

    # The sender's side

    def describe(self, f: object) -> Description | None:
        """Describe a function, or return None if it must travel whole."""
        known = self._by_id.get(id(f))
        if known is not None and known.ref() is f:
            if known.guards and not all(g.get(n) is v for g, n, v in known.guards):
                return self._describe_anew(f)
            if known.home is not None and known.home.__spec__ is not known.spec:
                return self._describe_anew(f)  # by value, if it is not the module's any more
            return known
        return self._describe_anew(f)

    def _describe_anew(self, f: object) -> Description | None:
        found = self._description(f)
        if found is None:
            return None
        key = id(f)
        found.name = getattr(f, "__qualname__", "")
        found.plain = not (found.varies or found.names or found.guards)
        try:
            by_id = self._by_id
            found.ref = weakref.ref(f, lambda _: by_id.pop(key, None))
        except TypeError:  # builtins cannot be weakly referenced; they live as long as we do
            found.ref = lambda: f
        if len(self._by_id) >= _KEPT_MOST:
            self._by_id.clear()
        self._by_id[key] = found
        return found

    def _description(self, f: object) -> Description | None:
        if isinstance(f, FunctionType):
            if "<" not in f.__qualname__ and codec.by_reference(f):
                return self._named(f)
            if f.__globals__ is codec.main_globals():
                return self._skeleton(f)
            return _whole(f)
        if isinstance(f, BuiltinFunctionType) and isinstance(f.__self__, ModuleType):
            return self._named(f)
        if isinstance(f, type) and f.__module__ != "__main__" and codec.by_reference(f):
            return self._named(f)
        return None

    def _named(self, f: object) -> Description | None:
        try:
            reference = pickle.dumps(f, 5)
        except (pickle.PicklingError, AttributeError, TypeError):
            return None
        name = getattr(f, "__qualname__", ".")
        parts = ("object", reference) if "." in name else ("named", f.__module__, name, reference)
        made = _finished(parts, _flags(f))
        home = sys.modules.get(f.__module__)
        if isinstance(home, ModuleType):
            made.home, made.spec = home, self._reloads.look(home)
        return made

    def _skeleton(self, f: FunctionType) -> Description | None:
        """Describe a function of `__main__` by its code alone."""
        code, name = f.__code__, f.__qualname__
        kept = self._by_code.get(id(code))
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
            if len(self._by_code) >= _KEPT_MOST:
                self._by_code.clear()
            self._by_code[id(code)] = (code, name, base)
        made = Description(base.ident, base.definition, base.flags)
        made.names = base.names
        made.varies = bool(f.__closure__ or f.__defaults__ or f.__kwdefaults__ or f.__dict__)
        return made

    def news(self, names: tuple[str, ...], seen: dict[str, Any]) -> dict[str, Any] | None:
        """Pick the globals of `__main__` that a peer needs before it runs a function.

        Args:
            names: The globals the function uses.
            seen: The globals the peer has got so far. The sender of the news updates it.
        """
        out: dict[str, Any] = {}
        self._collect(names, seen, codec.main_globals(), out, set())
        return out or None

    def _collect(
        self,
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
                fresh = self._collect(inner, seen, main, out, done) or fresh or varies
            elif isinstance(value, ModuleType):
                self._reloads.look(value)
            elif not isinstance(value, type) and not _stays(value):
                fresh = True
            if fresh:
                out[name] = value
                anything = True
        return anything

    def notice_reloads(self, f: object) -> None:
        """Notice reloads of the modules that a function comes from, or names."""
        known = self.describe(f)
        if known is not None:
            self.news(known.names, {})

    # The receiver's side

    def define(self, ident: int, definition: bytes) -> None:
        """Keep a definition that arrived; it is read when a call first needs it."""
        if ident not in self._definitions:
            self._definitions[ident] = definition

    def function(self, ident: int, variable: tuple[object, ...] | None = None) -> Any:
        """Give the function of an id, with its captured values."""
        made = self._made.get(ident)
        if made is None:
            made = self._made[ident] = _read(self._definitions[ident])
        if type(made) is _Named:
            return made.space[made.name]
        if type(made) is _Code:
            return made.make(variable)
        return made

    def name_of(self, ident: int) -> str:
        """Name a function that has been called here; "": it is not known."""
        made = self._made.get(ident)
        if type(made) is _Named:
            return made.name
        if type(made) is _Code:
            return str(made.notes[1])
        return getattr(made, "__qualname__", "")

    def reload(self, name: str) -> None:
        """Reload a module that another process has reloaded, if it was imported here."""
        module = sys.modules.get(name)
        if module is not None:
            importlib.reload(module)
            self._reloads.look(module)
            self._made.clear()  # some are the old ones


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


def _flags(f: object) -> int:
    code = getattr(f, "__code__", None)
    return frames.ASYNC if code is not None and code.co_flags & _COROUTINE else 0


def _finished(parts: tuple[object, ...], flags: int) -> Description:
    definition = pickle.dumps(parts, 5)
    digest = hashlib.blake2b(definition, digest_size=8).digest()
    return Description(int.from_bytes(digest, "little") or 1, definition, flags)


def _stays(value: object) -> bool:
    """Tell whether a captured value cannot change under us."""
    if isinstance(value, _CONSTANT):
        return True
    if isinstance(value, tuple | frozenset):
        return all(_stays(v) for v in value)
    if isinstance(value, BuiltinFunctionType):  # a list's `append` changes with the list
        return isinstance(value.__self__, ModuleType | type | None)
    return isinstance(value, FunctionType | type) and codec.by_reference(value)


def captured(f: FunctionType) -> tuple[Any, ...]:
    """Return the parts of a by-value function that travel with each call."""
    cells = tuple(_content(c) for c in f.__closure__) if f.__closure__ else ()
    return cells, f.__defaults__, f.__kwdefaults__, f.__dict__ or None


class _Empty:
    """The content of a cell that has none yet."""


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _Empty


class _Named:
    """An importable function: looked up at each call, so that a reload takes effect."""

    __slots__ = ("name", "space")

    def __init__(self, space: dict[str, Any], name: str) -> None:
        self.space = space
        self.name = name


class _Code:
    """A function of `__main__` without its captured values."""

    __slots__ = ("bare", "code", "notes")

    def __init__(self, code: CodeType, notes: tuple[Any, ...]) -> None:
        self.code = code
        self.notes = notes
        self.bare: FunctionType | None = None

    def make(self, variable: tuple[Any, ...] | None) -> FunctionType:
        if variable is None:
            main = sys.modules["__main__"].__dict__  # `main_globals()`, which each call would call
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
    found = codec.loads(reference)  # imports the module
    space = getattr(sys.modules.get(module), "__dict__", {})
    return _Named(space, name) if space.get(name) is found else found
