"""The files through which a job gets its call and gives its result: pickles that name their maker.

Each begins with a line of JSON: one that another version of Python or hpcdist has written says so
instead of failing to unpickle. Each appears in its folder at once and whole.
"""

from __future__ import annotations

import json
import os
import pickle
import secrets
import sys
from dataclasses import dataclass
from typing import Any

from hpcdist import _pickler
from hpcdist._errors import HpcdistError
from hpcdist._version import VERSION

# The files' names: the function, where its modules are looked for, and the options of its jobs; the
# arguments of one call, and what became of it.
FUNCTION, PATH, OPTIONS, CALL, OUTCOME = "function", "path", "options", "call", "outcome"
STARTED, STDOUT, STDERR = "started", "stdout", "stderr"  # that rank 0 runs; and what it prints
ENDED = "ended"  # the scheduler's last word on a job that gave no result; it forgets jobs
_PYTHON = "{}.{}".format(*sys.version_info)
_LONGEST_LINE = 4096


@dataclass(frozen=True)
class Outcome:
    """What became of a call.

    Attributes:
        body: The pickled result; or the error, as `encode_error` has it.
        failed: Which of the two.
    """

    body: bytes
    failed: bool


def pack(value: object) -> tuple[bytes, bool]:
    """Pickle a value; tell whether any Python will do to unpickle it.

    What the script defines goes by value, with its code, as the other side may not be that script.
    """
    try:
        body = pickle.dumps(value, 5)
        if b"__main__" not in body:
            return body, True
    except Exception:  # lambdas and the like
        pass
    return _pickler.dumps(value), False


def write(folder: str, name: str, value: object) -> None:
    """Write a value into a folder."""
    write_bytes(folder, name, *pack(value))


def write_bytes(folder: str, name: str, body: bytes, plain: bool, **more: object) -> None:
    """Write what is pickled already."""
    made = {"hpcdist": VERSION, "python": _PYTHON, "plain": plain, "size": len(body), **more}
    path = os.path.join(folder, name)
    draft = f"{path}.{secrets.token_hex(4)}"  # several may write at once: the last one stays
    with open(draft, "wb") as file:
        file.write(json.dumps(made).encode() + b"\n" + body)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def read(path: str) -> Any:
    """Read a value.

    Raises:
        HpcdistError: It was written by another version, or is not whole.
    """
    made, body = _read(path)
    return _unpickle(path, made, body)


def read_outcome(folder: str) -> Outcome | None:
    """Read what became of a call; None: nothing yet."""
    try:
        made, body = _read(os.path.join(folder, OUTCOME))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Outcome(body, bool(made.get("failed")))


def result_of(folder: str) -> Any:
    """Unpickle the result of a call."""
    return read(os.path.join(folder, OUTCOME))


def _read(path: str) -> tuple[dict[str, Any], bytes]:
    with open(path, "rb") as file:
        line = file.readline(_LONGEST_LINE)
        body = file.read()
    try:
        made = json.loads(line)
        whole = made["size"] == len(body)
    except (ValueError, TypeError, KeyError):
        whole = False
    if not whole:
        raise HpcdistError(f"{path} is not what hpcdist has written there: it was cut or changed")
    return made, body


def _unpickle(path: str, made: dict[str, Any], body: bytes) -> Any:
    by, here = _version(made), f"Python {_PYTHON} with hpcdist {VERSION}"
    differs = f"{path} was written by {by}, and this is {here}"
    if made["python"] != _PYTHON and not made["plain"]:  # it holds code, which is that Python's own
        raise HpcdistError(f"{differs}. It holds functions or classes of the script: read it there")
    try:
        return pickle.loads(body)
    except Exception as exc:
        if by == here:
            exc.add_note(f"It is what {path} holds. Has a module changed since it was written?")
            raise
        raise HpcdistError(f"{differs}; it cannot be unpickled here: {exc}") from exc


def _version(made: dict[str, Any]) -> str:
    return f"Python {made.get('python')} with hpcdist {made.get('hpcdist')}"
