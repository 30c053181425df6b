"""Which map a checkpoint belongs to: its function, how many items it has, its seed.

A function is known by its name, and a lambda, which has none, by its code. What a function has
captured, or `functools.partial` binds to it, counts where it is a plain value. A function that has
a name and was changed since is the same function: the bug in line 40 may just have been mended.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import sys
from dataclasses import asdict, dataclass
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from hpcdist._errors import HpcdistError
from hpcdist._public import public

_SHOWN = 80  # characters of a value
_PLAIN = (int, float, complex, str, bytes, bool, type(None))


@public
class CheckpointMismatch(HpcdistError):
    """A file is not the checkpoint of this map.

    Attributes:
        path: The file.
        found: What it belongs to.
        wanted: What it was to be used for.

    Example:
        >>> import hpcdist, tempfile
        >>> file = tempfile.mkdtemp() + "/run.ckpt"
        >>> hpcdist.pmap(abs, [-1, 2], checkpoint=file)
        [1, 2]
        >>> try:
        ...     hpcdist.pmap(abs, [-1, 2, -3], checkpoint=file)
        ... except hpcdist.CheckpointMismatch as error:
        ...     print(error.found, "|", error.wanted)
        builtins.abs over 2 items | builtins.abs over 3 items
    """

    def __init__(self, message: str, path: str = "", found: str = "", wanted: str = "") -> None:
        super().__init__(message)
        self.path = path
        self.found = found
        self.wanted = wanted

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.path, self.found, self.wanted)


@dataclass(frozen=True)
class Function:
    """How a function is known.

    Attributes:
        name: Its name, with the plain values that belong to it.
        where: Where a function without a name is written.
        code: The hash of its code; empty where it has none in Python.
    """

    name: str
    where: str = ""
    code: str = ""

    @property
    def nameless(self) -> bool:
        """Whether its name says nothing of what it does."""
        return "<lambda>" in self.name

    def __str__(self) -> str:
        return f"{self.name} ({self.where})" if self.where else self.name


@dataclass(frozen=True)
class Belonging:
    """What a checkpoint belongs to.

    Attributes:
        items: How many there are; None: not known in advance.
        keyed: Whether items go by the user's keys, not by index.
        python: Which Python compiled the function.
    """

    function: Function
    items: int | None
    keyed: bool
    seed: int
    python: str = sys.implementation.cache_tag or ""

    def to_json(self) -> bytes:
        """Write it."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Belonging:
        """Read it.

        Raises:
            ValueError: It is something else.
        """
        try:
            facts = json.loads(text)
            return cls(**{**facts, "function": Function(**facts["function"])})
        except (TypeError, KeyError) as exc:
            raise ValueError(f"not the description of a map: {text[:_SHOWN]!r}") from exc

    def __str__(self) -> str:
        if self.keyed:
            return f"{self.function}, with keys"
        items = "items" if self.items is None else f"{self.items} items"
        return f"{self.function} over {items}"


def check(path: str, found: Belonging, wanted: Belonging, *, seeded: bool) -> None:
    """Check that a file belongs to the map that is to use it.

    Args:
        path: The file.
        found: What it says.
        wanted: The map.
        seeded: Whether the user has chosen the map's seed.

    Raises:
        CheckpointMismatch: It does not.
    """
    if not (
        _is_same(found.function, wanted.function, found.python == wanted.python)
        and found.keyed == wanted.keyed
        and (wanted.keyed or None in (found.items, wanted.items) or found.items == wanted.items)
    ):
        _refuse(path, found, wanted)
    if seeded and found.seed != wanted.seed:
        _refuse(path, found, wanted, f" with seed={found.seed}", f" with seed={wanted.seed}")


def _is_same(found: Function, wanted: Function, comparable: bool) -> bool:
    if found.name != wanted.name:
        return False
    return not (found.nameless and comparable) or found.code == wanted.code


def was_changed(found: Belonging, wanted: Belonging) -> bool:
    """Tell whether the function's own code is another than when the file was begun."""
    return found.python == wanted.python and found.function.code != wanted.function.code


def _refuse(
    path: str, found: Belonging, wanted: Belonging, of_found: str = "", of_wanted: str = ""
) -> None:
    raise CheckpointMismatch(
        f"the checkpoint {path} belongs to another map: to {found}{of_found}. This one is "
        f"{wanted}{of_wanted}. Give it a file of its own, or remove that one to begin anew",
        path,
        f"{found}{of_found}",
        f"{wanted}{of_wanted}",
    )


# Functions


def describe(f: Any) -> Function:
    """Say how a function is known.

    >>> str(describe(functools.partial(pow, 2, mod=7)))
    'functools.partial(builtins.pow, 2, mod=7)'
    """
    if isinstance(f, functools.partial):
        inner = describe(f.func)
        bound = [_shown(v) for v in f.args] + [f"{k}={_shown(v)}" for k, v in f.keywords.items()]
        text = f"functools.partial({', '.join([inner.name, *bound])})"
        return Function(text, inner.where, inner.code)
    if isinstance(f, MethodType):
        inner = describe(f.__func__)
        return Function(f"{inner.name} of {_shown(f.__self__)}", inner.where, inner.code)
    if isinstance(f, FunctionType):
        return _describe_function(f)
    name: Any = getattr(f, "__qualname__", None) or getattr(f, "__name__", None)
    if not isinstance(name, str):
        kind = type(f)
        return Function(f"{kind.__module__}.{kind.__qualname__} {_shown(f)}")
    owner = getattr(f, "__self__", None)
    if owner is not None and not isinstance(owner, ModuleType | type):
        return Function(f"{name} of {_shown(owner)}")
    return Function(f"{getattr(f, '__module__', None) or type(f).__module__}.{name}")


def _describe_function(f: FunctionType) -> Function:
    captured = [
        f"{name}={_shown(cell.cell_contents)}"
        for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True)
        if _is_plain(cell)
    ]
    name = f"{f.__module__}.{f.__qualname__}"
    if captured:
        name += f" with {', '.join(captured)}"
    code = f.__code__
    where = f"{code.co_filename}:{code.co_firstlineno}" if "<lambda>" in name else ""
    digest = hashlib.sha256()
    _feed(digest, code)
    defaults = (*(f.__defaults__ or ()), *(f.__kwdefaults__ or {}).items())
    digest.update(repr([v for v in defaults if _has_plain_parts(v)]).encode())
    return Function(name, where, digest.hexdigest()[:16])


def _feed(digest: Any, code: CodeType) -> None:
    """Take in what code does, not where it stands."""
    digest.update(code.co_code)
    digest.update(repr((code.co_names, code.co_varnames, code.co_freevars)).encode())
    for value in code.co_consts:
        if isinstance(value, CodeType):
            _feed(digest, value)
        elif isinstance(value, frozenset):  # in an order that is another in each process
            digest.update(repr(sorted(map(repr, value))).encode())
        else:
            digest.update(repr(value).encode())


def _is_plain(cell: Any) -> bool:
    try:
        return _has_plain_parts(cell.cell_contents)
    except ValueError:  # empty
        return False


def _has_plain_parts(value: object) -> bool:
    if type(value) is tuple:
        return all(map(_has_plain_parts, value))
    return type(value) in _PLAIN


def _shown(value: object) -> str:
    """Show a value, without what is another each time: addresses."""
    try:
        text = repr(value)
    except Exception:  # the user's own: it is of no use
        text = f"<{type(value).__qualname__}>"
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    if len(text) <= _SHOWN:
        return text
    return f"{text[:_SHOWN]}… ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
