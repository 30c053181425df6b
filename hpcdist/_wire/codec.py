"""Values to bytes and back: pickle protocol 5, cloudpickle where that is not enough.

Plain pickle takes 0.2 us for small arguments, cloudpickle ten times that, so plain comes first.
It fails at once on what it cannot do, with one exception: objects of `__main__` pickle by name
and then fail on the receiver, whose `__main__` is another. Their name stands in the bytes.
"""

from __future__ import annotations

import pickle
import sys
import threading
from collections.abc import Callable, Sequence
from types import CodeType, FunctionType
from typing import Any

from cloudpickle import cloudpickle as _cloud

from hpcdist import _pickler
from hpcdist._wire.blocks import blank
from hpcdist._wire.frames import Buffer

APART_MIN = 32 * 1024  # a smaller buffer is copied into the pickle: cheaper than a message
_APART_MOST = 1000  # their sizes stand in the header
_ATOMS = {int, float, complex, bool, str, bytes, type(None)}  # nothing inside to look after
_only_atoms = _ATOMS.issuperset
_NOT_PICKLED = (pickle.PicklingError, AttributeError, TypeError, NotImplementedError)


class _Met(threading.local):
    """The references that a thread has met while pickling: the sender of the bytes counts them."""

    def __init__(self) -> None:
        self.refs: list[Any] = []


met = _Met()


class Payload:
    """A pickled value: the stream, its buffers, and the references inside it.

    `names` are the globals of `__main__` that unpickling it assigns, for functions inside it.
    """

    __slots__ = ("body", "buffers", "names", "refs")

    def __init__(
        self, body: bytes, buffers: Sequence[Buffer] = (), refs: Sequence[Any] = ()
    ) -> None:
        self.body = body
        self.buffers = buffers
        self.refs = refs
        self.names: Sequence[str] = ()

    def own(self) -> Payload:
        """Copy the buffers that belong to the sender's objects, which may change meanwhile."""
        if self.buffers:
            self.buffers = [copied(b) for b in self.buffers]
        return self

    @property
    def nbytes(self) -> int:
        return len(self.body) + sum(memoryview(b).nbytes for b in self.buffers)


def copied(buffer: Buffer) -> Buffer:
    """Copy a buffer to memory that is ours to write to."""
    view = memoryview(buffer).cast("B")
    copy = blank(view.nbytes)
    memoryview(copy)[:] = view
    return copy


def main_globals() -> dict[str, Any]:
    """Return the globals in which by-value functions of `__main__` run, on every process."""
    return sys.modules["__main__"].__dict__


class _MainGlobals:
    """Stands for `main_globals()` of the process that unpickles."""

    def __reduce__(self) -> Any:
        return main_globals, ()


_MAIN = _MainGlobals()


class _Pickler(_pickler.Pickler):
    """cloudpickle, except that functions of `__main__` run in the receiver's `__main__`.

    cloudpickle gives such functions a private copy of their globals; Julia gives them the
    worker's Main, so that what `everywhere` defined there is seen. The globals they use are
    assigned by cloudpickle's own state setter, into the dictionary named here.
    """

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)
        self.main_names: set[str] = set()

    def _function_getnewargs(self, func: FunctionType) -> tuple[Any, ...]:
        code, base, name, defaults, closure = super()._function_getnewargs(func)
        if func.__globals__ is main_globals():
            base = _MAIN
            self.main_names.update(global_names(func.__code__))
        return code, base, name, defaults, closure


def dumps(value: object) -> Payload:
    """Pickle a value completely; nothing has been sent if this raises."""
    if type(value) in _ATOMS or (type(value) is tuple and _only_atoms(map(type, value))):
        return Payload(pickle.dumps(value, 5))
    buffers: list[Buffer] = []
    try:
        body = pickle.dumps(value, 5, buffer_callback=_set_apart(buffers))
        if b"__main__" not in body:
            return Payload(body, buffers, _taken()) if met.refs else Payload(body, buffers)
    except _NOT_PICKLED:
        pass
    except BaseException:
        _taken()
        raise
    _taken()
    pieces, payload = _by_cloudpickle(value)
    payload.body = b"".join(pieces)
    return payload


def in_pieces(value: object) -> tuple[list[bytes], Payload]:
    """Pickle a value; the stream comes in pieces, large objects as they are."""
    buffers: list[Buffer] = []
    stream = _Pieces()
    try:
        _dump(pickle.Pickler(stream, 5, buffer_callback=_set_apart(buffers)), value)
        if not any(b"__main__" in piece for piece in stream.pieces):
            return stream.pieces, Payload(b"", buffers, _taken())
        _taken()
    except _NOT_PICKLED:
        pass
    return _by_cloudpickle(value)


def _by_cloudpickle(value: object) -> tuple[list[bytes], Payload]:
    buffers: list[Buffer] = []
    stream = _Pieces()
    pickler = _Pickler(stream, 5, buffer_callback=_set_apart(buffers))
    _dump(pickler, value)
    payload = Payload(b"", buffers, _taken())
    payload.names = tuple(pickler.main_names)
    return stream.pieces, payload


def _dump(pickler: pickle.Pickler, value: object) -> None:
    """Pickle a value; if that fails, the references met on the way are forgotten."""
    try:
        pickler.dump(value)
    except BaseException:
        _taken()
        raise


class _Pieces:
    """The file a pickler writes to. It is given large bytes themselves: nothing is copied."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def write(self, data: Any) -> int:
        self.pieces.append(data if type(data) is bytes else bytes(data))
        return len(data)


def _set_apart(buffers: list[Buffer]) -> Callable[[pickle.PickleBuffer], bool]:
    """Make the callback that keeps large buffers out of the stream."""

    def apart(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < APART_MIN or len(buffers) >= _APART_MOST:
            return True
        buffers.append(view)
        return False

    return apart


def dump_atoms(args: tuple[object, ...]) -> bytes | None:
    """Pickle arguments with nothing inside to look after; None: they are not of that kind."""
    return pickle.dumps(args, 5) if _only_atoms(map(type, args)) else None


def loads(body: bytes | bytearray | memoryview, buffers: Sequence[Buffer] = ()) -> Any:
    """Rebuild a value from its stream and buffers."""
    try:
        return pickle.loads(body, buffers=buffers) if buffers else pickle.loads(body)
    except ModuleNotFoundError as exc:
        if _PATH_ADVICE not in str(exc.msg):
            exc.msg = f"{exc.msg}: {_PATH_ADVICE}"
            exc.args = (exc.msg,)
        raise


_PATH_ADVICE = (
    "this process cannot import what it was sent. Workers take over sys.path when they start. To "
    """change it later: everywhere("import sys; sys.path.insert(0, '/the/folder')", later=True)"""
)


def _taken() -> Sequence[Any]:
    """Take the references this thread met since it last asked."""
    refs = met.refs
    if not refs:
        return ()
    met.refs = []
    return refs


def by_reference(f: object) -> bool:
    """Tell whether a function or class can be found by name on any process."""
    return bool(_cloud._should_pickle_by_reference(f))


def global_names(code: CodeType) -> Sequence[str]:
    """Return the names of the globals a function's code uses, nested functions included."""
    return list(_cloud._extract_code_globals(code))
