"""cloudpickle, except that code keeps the name of the file it was read from.

Tracebacks show that name, and the source lines that are found by it. From 3.1.3 on cloudpickle
writes "<dynamic-code>" in its place. The name travels beside each code object: functions and
classes nest them, and each comes to the pickler by itself.
"""

from __future__ import annotations

import io
from collections import ChainMap
from types import CodeType
from typing import Any, ClassVar

import cloudpickle

_reduce_code = cloudpickle.Pickler.dispatch_table[CodeType]


def _code(file: str, parts: tuple[Any, ...]) -> CodeType:
    return CodeType(*parts).replace(co_filename=file)


def _reduce_with_file(code: CodeType) -> tuple[Any, ...]:
    # A new string each time, as cloudpickle makes them: pickle refers back to one it has seen,
    # and equal functions have to give equal bytes.
    file = "".join(code.co_filename)
    return _code, (file, _reduce_code(code)[1])


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickle functions and classes by value with the names of their files."""

    dispatch_table: ClassVar[ChainMap[Any, Any]] = ChainMap(
        {CodeType: _reduce_with_file}, *cloudpickle.Pickler.dispatch_table.maps
    )


def dumps(value: object) -> bytes:
    """Pickle a value; what lies in `__main__` goes by value."""
    with io.BytesIO() as stream:
        Pickler(stream, 5).dump(value)
        return stream.getvalue()
