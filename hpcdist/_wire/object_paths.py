"""Where inside a value something lies: what cannot be pickled, say.

The walk follows what a pickler would: items, attributes, the captured variables and globals of
functions sent by value. It goes down into the first part that is suspect, and so ends at the
innermost one. It is for errors and warnings: it pickles the same things again and again.
"""

from __future__ import annotations

import copyreg
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from hpcdist._wire import codec

Named = tuple[str, Any]  # what a part of something is called, and the part
_DEEP = 20


def dumps(value: object, name: str) -> codec.Payload:
    """Pickle a value completely; an error says where inside it the cause lies."""
    try:
        return codec.dumps(value)
    except Exception as exc:
        name_unpicklable(exc, [(name, value)])
        raise


def dumps_call(
    value: object, f: object, args: tuple[object, ...] = (), kw: Mapping[str, object] | None = None
) -> codec.Payload:
    """Pickle what a call is made into; an error says which part of the call it comes from."""
    try:
        return codec.dumps(value)
    except Exception as exc:
        name_unpicklable(exc, parts_of_call(f, args, kw or {}))
        raise


def name_unpicklable(error: BaseException, parts: Iterable[Named]) -> None:
    """Let an error of pickling say which of these parts it comes from, and where inside it."""
    path = find(parts, _fails)
    if not path:
        return
    where = ", in ".join(name for name, _ in path)
    if len(error.args) == 1 and isinstance(error.args[0], str):
        if where not in error.args[0]:
            error.args = (f"{error.args[0]}: {where}",)
    else:
        error.add_note(f"It comes from {where}")


def _fails(value: object) -> bool:
    try:
        codec.dumps(value)
    except Exception:
        return True
    return False


def find(
    parts: Iterable[Named],
    suspect: Callable[[Any], bool],
    found: Callable[[Any], bool] = lambda _: False,
) -> list[Named]:
    """Find the way from one of these parts to the innermost suspect one; nothing if none is.

    Args:
        parts: Where to look.
        suspect: Tells whether something lies in a value, however deep.
        found: Tells whether a value is that itself: there the way ends.
    """
    path: list[Named] = []
    seen: set[int] = set()
    while len(path) < _DEEP:
        step = next((p for p in parts if _is_new(p[1], seen) and suspect(p[1])), None)
        if step is None:
            break
        path.append(step)
        if found(step[1]):
            break
        parts = _parts_of(step[1])
    return path


def _is_new(value: object, seen: set[int]) -> bool:
    known = id(value) in seen
    seen.add(id(value))
    return not known


def parts_of_call(f: object, args: tuple[object, ...], kw: Mapping[str, object]) -> Iterator[Named]:
    """Name the parts of a call: the arguments, and what its function brings along."""
    of = f" of {name_of(f)}"
    names = _parameters(f)
    for k, value in enumerate(args):
        name = f" ({names[k]!r})" if k < len(names) else ""
        yield f"argument {k + 1}{name}{of}", value
    for key, value in kw.items():
        yield f"argument {key!r}{of}", value
    yield from parts_of_function(f)


def parts_of_function(f: object) -> Iterator[Named]:
    """Name what a function brings along when it is sent by value."""
    if isinstance(f, FunctionType) and not codec.by_reference(f):
        yield from _inside_function(f)
    else:
        yield f"function {name_of(f)}", f


def name_of(f: object) -> str:
    """Name a function in a few words."""
    if isinstance(f, partial):
        return f"partial({name_of(f.func)})"
    name = getattr(f, "__qualname__", None) or type(f).__name__
    return name.rpartition("<locals>.")[2] + "()"


def identity_of(f: object) -> Any:
    """Give what stays the same when a function is defined again, by a cell of a notebook say."""
    while isinstance(f, partial | MethodType):
        f = f.func if isinstance(f, partial) else f.__func__
    return getattr(f, "__code__", type(f))


def level_of_user() -> int:
    """Tell the `stacklevel` at which a warning of our caller's is the user's."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("hpcdist."):
        level, frame = level + 1, frame.f_back
    return level


def _parameters(f: Any) -> list[str]:
    try:
        parameters = inspect.signature(f).parameters.values()
    except (TypeError, ValueError):  # a builtin
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _parts_of(value: object) -> Iterator[Named]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"item [{key!r:.60}]", item
            yield f"key {key!r:.60}", key
    elif isinstance(value, list | tuple | set | frozenset):
        for k, item in enumerate(value):
            yield f"item [{k}]", item
    elif isinstance(value, FunctionType):
        yield from _inside_function(value)
    elif isinstance(value, MethodType):
        yield f"the {type(value.__self__).__name__} of method {name_of(value)}", value.__self__
    elif isinstance(value, partial):
        yield from parts_of_call(value.func, value.args, value.keywords)
    elif isinstance(value, type):
        for name, part in vars(value).items():
            yield f"attribute .{name} of class {value.__name__}", part
    else:
        yield from _inside_object(value)


def _inside_function(f: FunctionType) -> Iterator[Named]:
    of = f" of {name_of(f)}"
    for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
        try:
            yield f"captured variable {name!r}{of}", cell.cell_contents
        except ValueError:  # it has none yet
            continue
    for name in codec.global_names(f.__code__):
        if name in f.__globals__:
            yield f"global {name!r}{of}", f.__globals__[name]
    defaults = f.__defaults__ or ()
    names = f.__code__.co_varnames[: f.__code__.co_argcount]
    for name, value in zip(names[len(names) - len(defaults) :], defaults, strict=True):
        yield f"default of {name!r}{of}", value
    for name, value in (f.__kwdefaults__ or {}).items():
        yield f"default of {name!r}{of}", value
    for name, value in vars(f).items():
        yield f"attribute .{name}{of}", value


def _inside_object(value: object) -> Iterator[Named]:
    """Name what a pickler finds in an object: what its `__reduce__` gives."""
    of = f" of {type(value).__name__}"
    try:
        reducer = copyreg.dispatch_table.get(type(value))
        reduced = reducer(value) if reducer is not None else value.__reduce_ex__(5)
    except Exception:  # this is the one that cannot be pickled
        return
    if not isinstance(reduced, tuple):
        return
    parts: tuple[Any, ...] = (*reduced, None, None, None, None)
    _, args, state, items, pairs, *_ = parts
    for one in state if type(state) is tuple and len(state) == 2 else (state,):
        if isinstance(one, dict):  # the attributes; with __slots__ there are two of these
            for name, part in one.items():
                yield f"attribute .{name}{of}", part
        elif one is not None:
            yield f"the state{of}", one
    for k, item in enumerate(items or ()):
        yield f"item [{k}]{of}", item
    for key, item in pairs or ():
        yield f"item [{key!r:.60}]{of}", item
    for item in args or ():
        yield f"what makes the {type(value).__name__}", item
