"""What runs the Python of workers: an interpreter, a command that ends with one, or a container."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

# The keywords, in one place for what has to know them all.
KEYWORDS = ("python", "exename", "wrapper", "container", "container_args")

_CONTAINER = ("apptainer", "exec")  # apptainer-exec(1): `apptainer exec [options] image command`
_IN_CONTAINER = "python3"


def chosen(layer: Mapping[str, Any], where: str = "addprocs") -> dict[str, Any]:
    """Return what one layer of settings says, such that it hides what wider ones say of the same.

    `python` and `container` are one choice: the nearest layer that makes it, makes it.

    Args:
        where: What the layer is, for errors.

    >>> chosen({"container": "app.sif"}), chosen({"exename": "python3"})
    ({'container': 'app.sif', 'python': None}, {'python': 'python3', 'container': None})
    """
    said = {name: value for name, value in layer.items() if name != "exename"}
    if layer.get("exename") is not None:
        said["python"] = layer["exename"]
    by_path, by_image = said.get("python") is not None, said.get("container") is not None
    if by_path and by_image:
        raise ValueError(
            f"{where}: python={said['python']!r} and container={said['container']!r} are one "
            "choice: a container's interpreter is its python3; for another one give the whole "
            "command by python=[...]"
        )
    if by_path:
        said["container"] = None
    if by_image:
        said["python"] = None
    return said


def wrapper_of(given: object) -> tuple[str, ...]:
    """Read what `wrapper=` says: the words that stand before the interpreter's.

    >>> wrapper_of(["numactl", "--localalloc"]), wrapper_of(None)
    (('numactl', '--localalloc'), ())
    """
    if given is None:
        return ()
    found = words("wrapper", given)
    if not found:
        raise TypeError(f"wrapper= is a command such as ['numactl', '--localalloc'], not {given!r}")
    return found


def command_of(merged: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the command that is the workers' interpreter.

    >>> command_of({"container": "app.sif", "container_args": ["--nv"], "wrapper": ["numactl"]})
    ('numactl', 'apptainer', 'exec', '--nv', 'app.sif', 'python3')
    """
    before = wrapper_of(merged.get("wrapper"))
    image = merged.get("container")
    if image is not None:
        args = words("container_args", merged.get("container_args") or ())
        return (*before, *_CONTAINER, *args, _image(image), _IN_CONTAINER)
    python = interpreter(merged.get("python"))
    if before and len(python) == 1 and os.sep in python[0]:
        return (*before, os.path.abspath(python[0]))
    return (*before, *python)


def interpreter(given: object) -> tuple[str, ...]:
    """Read what `python=` says: an interpreter, or a command whose last word is one.

    >>> interpreter("python3"), interpreter(["nice", "-n", "5", "python3"])
    (('python3',), ('nice', '-n', '5', 'python3'))
    """
    several = given if isinstance(given, list | tuple) else [given or sys.executable]
    paths = [os.fspath(word) for word in several if isinstance(word, str | os.PathLike)]
    if several and len(paths) == len(several) and all(paths):
        return tuple(map(str, paths))
    raise TypeError(
        "python= is an interpreter, or a command that ends with one, such as "
        f"['nice', '-n', '5', 'python3'], not {given!r}"
    )


def words(name: str, given: object) -> tuple[str, ...]:
    """Read a list of words; a text is none, as nobody knows how it is to be divided.

    >>> words("srun_args", ["--cpu-bind=none"])
    ('--cpu-bind=none',)
    """
    if isinstance(given, list | tuple):
        texts = [os.fspath(w) for w in given if isinstance(w, str | os.PathLike)]
        if len(texts) == len(given) and all(_is_word(text) for text in texts):
            return tuple(map(str, texts))
    raise TypeError(f"{name}= is a list of words, such as ['--one', '--two=2'], not {given!r}")


def _image(given: object) -> str:
    """Return the name of an image: of a file here by its full path, whatever folder workers get."""
    if not isinstance(given, str | os.PathLike):
        raise TypeError(f"container= is an image for apptainer, such as 'app.sif', not {given!r}")
    name = str(os.fspath(given))
    if not _is_word(name):
        raise ValueError(f"container={given!r}: that is no name of an image")
    return os.path.abspath(name) if os.path.exists(name) else name


def _is_word(text: object) -> bool:
    return isinstance(text, str) and bool(text) and not any(c in text for c in "\n\r\0")
