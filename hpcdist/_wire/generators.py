"""Random generators that travel with a function: each copy gives the same numbers.

The sender of a function looks for them in the bytes, which costs a few tens of nanoseconds, and
looks into the function itself only if there may be one.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from types import CodeType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from hpcdist._wire import codec, object_paths

_KINDS = (
    ("random", "Random"),
    ("numpy.random", "Generator"),
    ("numpy.random", "RandomState"),
    ("numpy.random", "BitGenerator"),
    ("torch", "Generator"),
)
_FRESH = (("random", "SystemRandom"),)  # the system's own: no two copies give the same
# What stands in the pickle of one: numpy's __generator_ctor, __bit_generator_ctor and
# __randomstate_ctor (numpy/random/_pickle.py); a class called Random or Generator.
_MARKS = (b"generator_ctor", b"randomstate_ctor", b"\x06Random", b"\x09Generator")
_LARGE = 1 << 17  # bytes: a search in more would be felt, and mostly they are data
_LIGHT = 256  # bytes: it takes less time to look at a larger item than to search its bytes
_ADVICE = (
    "every copy gives the same numbers. hpcdist.rng() gives each item a generator of its own: see "
    "docs/random-numbers.md"
)

_LOOKS_MOST = 8  # a function whose bytes only look like it is left in peace

# Both belong to the interpreter, as Python's own register of warnings does: its user is told once.
_told: WeakSet[CodeType | type] = WeakSet()  # functions whose users have been warned
_looks: WeakKeyDictionary[CodeType | type, int] = WeakKeyDictionary()  # how often, in vain


def is_generator(value: object) -> bool:
    """Tell whether a value is a random generator of Python's, numpy's or torch's."""
    kind: type = type(value)
    return _is_kind(kind)


@lru_cache(1024)
def _is_kind(kind: type) -> bool:
    return issubclass(kind, _loaded(_KINDS)) and not issubclass(kind, _loaded(_FRESH))


def _loaded(kinds: Sequence[tuple[str, str]]) -> tuple[type, ...]:
    found = [getattr(sys.modules.get(module), name, None) for module, name in kinds]
    return tuple(k for k in found if isinstance(k, type))


def warn_of_copies(f: object, pieces: Sequence[bytes]) -> None:
    """Warn, once a function, if it brings a random generator along.

    Args:
        f: The function.
        pieces: The bytes that it was pickled to.
    """
    if not any(_is_marked(piece) for piece in pieces):
        return
    known = object_paths.identity_of(f)
    looks = _looks.get(known, 0)
    if known in _told or looks >= _LOOKS_MOST:
        return
    _looks[known] = looks + 1
    path = object_paths.find(object_paths.parts_of_function(f), _holds_one, is_generator)
    if not path or not is_generator(path[-1][1]):
        return
    if len(path) > 1 and _are_several(path[-2][1]):
        return  # one for each item, say
    where = ", in ".join(name for name, _ in path)
    _warn(f, f"{where} is a random generator, and travels with the function: {_ADVICE}")


def _is_marked(body: bytes) -> bool:
    if len(body) > _LARGE:
        return False
    numpys, numpys_old, pythons, torchs = _MARKS  # a loop over them takes thrice the time
    return numpys in body or numpys_old in body or pythons in body or torchs in body


def _holds_one(value: object) -> bool:
    if is_generator(value):
        return True
    try:
        return _is_marked(codec.dumps(value).body)
    except Exception:  # it cannot travel
        return False


def _are_several(container: Any) -> bool:
    values = container.values() if isinstance(container, dict) else container
    return isinstance(container, list | tuple | dict) and sum(map(is_generator, values)) > 1


def _warn(f: object, text: str) -> None:
    _told.add(object_paths.identity_of(f))
    warnings.warn(text, stacklevel=object_paths.level_of_user())


class Repeats:
    """The random generators among the items of one map: the same one twice is worth a warning."""

    def __init__(self, f: Any) -> None:
        self._f = f
        self._seen: dict[int, tuple[int, Any]] = {}  # by id: the index of an item, the generator

    def look(self, start: int, columns: Sequence[Sequence[object]], body: bytes) -> None:
        """Look at the items of a batch.

        Args:
            start: The index of the first.
            columns: The items, a column for each collection.
            body: The bytes that they were pickled to.
        """
        count = len(columns) * len(columns[0])
        if len(body) > _LIGHT * count or _is_marked(body):
            for column in columns:
                for k, value in enumerate(column):
                    self.look_at(start + k, value)

    def watched(self, items: Iterable[tuple[object, ...]]) -> Iterator[tuple[Any, ...]]:
        """Look at the arguments of each item as it is taken."""
        for index, args in enumerate(items):
            for value in args:
                self.look_at(index, value)
            yield args

    def look_at(self, index: int, value: object) -> None:
        """Look at one argument of an item."""
        if not is_generator(value):
            return
        first, _ = self._seen.setdefault(id(value), (index, value))
        if first != index and object_paths.identity_of(self._f) not in _told:
            name = object_paths.name_of(self._f)
            text = f"items {first} and {index} of {name} are given the same random generator"
            _warn(self._f, f"{text}: {_ADVICE}")
