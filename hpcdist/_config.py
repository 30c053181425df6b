"""Settings, in layers: an argument, `HPCDIST_*`, and three files from the nearest to the widest.

    ./hpcdist.toml    ~/.config/hpcdist/config.toml    /etc/hpcdist/config.toml

Files are read at the first question, once. A key nobody knows is an error that names the nearest
known one: a misspelt setting that is silently ignored is worse than none.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, TypeAlias

    Layer: TypeAlias = tuple[str, dict[str, Any]]  # where it was read, and what it says

__all__ = ["nearest", "one_typo_from", "setting", "table", "unknown_option"]

_PREFIX = "HPCDIST_"
_FILES = ("./hpcdist.toml", "~/.config/hpcdist/config.toml", "/etc/hpcdist/config.toml")
_TABLES = ("slurm", "pbs", "sge", "lsf", "profile")
_INTERNAL = ("JOIN", "RANK", "TEST_RUN")  # passed between our own processes; no settings
_TEST_PREFIX = "HPCDIST_TEST_"
_LEVELS = ("debug", "info", "warning")


def _seconds(value: object) -> float:
    number = _number(value)
    if number < 0:
        raise ValueError("must not be negative")
    return number


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("must be a number")
    try:
        return float(value)
    except ValueError:
        raise ValueError("must be a number") from None


def _path(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("must be a path")
    return os.path.expanduser(value)


def _level(value: object) -> str:
    if not isinstance(value, str) or value.lower() not in _LEVELS:
        raise ValueError(f"must be one of {', '.join(_LEVELS)}")
    return value.lower()


# name: (how a value is read, the built-in default)
_KEYS: dict[str, tuple[Callable[[object], Any], Any]] = {
    "timeout": (_seconds, 60.0),
    "spin_us": (_seconds, None),
    "heartbeat": (_seconds, 2.0),
    "heartbeat_limit": (_seconds, 10.0),
    "dir": (_path, "~/.hpcdist"),
    "log": (_level, "warning"),
}

_layers: list[Layer] | None = None


def setting(name: str, default: object = None, *, given: object = None) -> Any:
    """Return a setting: what was `given`, else the environment's, a file's, or the default.

    Args:
        name: One of the known keys.
        default: Takes the place of the built-in default.
        given: The argument of the caller's own caller; None when there was none.
    """
    read, built_in = _KEYS[name]
    for source, value in _candidates(name, given):
        if value is not None:
            try:
                return read(value)
            except ValueError as exc:
                raise ValueError(f"{source}: {name!r} {exc}, not {value!r}") from None
    if default is not None:
        return default
    return None if built_in is None else read(built_in)


def table(name: str) -> dict[str, Any]:
    """Return a table of the files, such as "slurm" or "profile.bigmem"; nearer files win by key."""
    merged: dict[str, Any] = {}
    for _, values in reversed(_files()):
        found: Any = values
        for part in name.split("."):
            found = found.get(part, {}) if isinstance(found, dict) else {}
        if isinstance(found, dict):
            merged = _merge(merged, found)
    return merged


def forget() -> None:
    """Read files and environment anew at the next question."""
    global _layers
    _layers = None


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """Return the choice that `name` was probably meant to be.

    >>> nearest("topolgy", ["timeout", "topology"])
    'topology'
    """
    from difflib import get_close_matches

    found = get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return found[0] if found else None


def one_typo_from(name: str, choices: Iterable[str]) -> str | None:
    """Return the choice that is one slip away: a letter more, less, other, or two swapped.

    Stricter than `nearest`, for places where an unknown name may well be right: Slurm's `time`
    is near our `timeout`, but no slip for it.

    >>> one_typo_from("templat", ["template"]), one_typo_from("time", ["timeout"])
    ('template', None)
    """
    return next((choice for choice in choices if _one_slip(name, choice)), None)


def unknown_option(name: str, choices: Iterable[str], what: str) -> TypeError:
    """Return the error for an option that `what` does not have.

    >>> unknown_option("topolgy", ["timeout", "topology"], "addprocs")
    TypeError("addprocs has no option 'topolgy'; did you mean 'topology'?")
    """
    return TypeError(f"{what} has no option {name!r}; {_hint(name, sorted(choices))}")


def _hint(name: str, choices: Iterable[str]) -> str:
    known = list(choices)
    meant = nearest(name, known)
    return f"did you mean {meant!r}?" if meant else f"known are {', '.join(known)}"


def _one_slip(name: str, choice: str) -> bool:
    if name == choice or abs(len(name) - len(choice)) > 1:
        return False
    start = 0
    while start < min(len(name), len(choice)) and name[start] == choice[start]:
        start += 1
    left, right = name[start:], choice[start:]
    if left[1:] == right[1:] or left[1:] == right or left == right[1:]:
        return True
    return left[:2] == right[:2][::-1] and left[2:] == right[2:]


def _candidates(name: str, given: object) -> Iterable[tuple[str, object]]:
    yield "argument", given
    files = _files()
    variable = _PREFIX + name.upper()
    yield variable, os.environ.get(variable) or None
    for source, values in files:
        yield source, values.get(name)


def _files() -> list[Layer]:
    global _layers
    if _layers is None:
        _check_environment()
        _layers = [layer for path in _FILES if (layer := _read(path)) is not None]
    return _layers


def _check_environment() -> None:
    known = [name.upper() for name in _KEYS] + list(_INTERNAL)
    for variable in os.environ:
        name = variable.removeprefix(_PREFIX)
        if name == variable or name in known or variable.startswith(_TEST_PREFIX):
            continue
        meant = _near_variable(name, known)
        if meant:
            raise ValueError(
                f"the environment variable {variable} is unknown; did you mean {_PREFIX}{meant}?"
            )


def _near_variable(name: str, known: list[str]) -> str | None:
    # Narrower than `nearest`: others may have good reasons for names that begin like ours.
    from difflib import get_close_matches

    found = get_close_matches(name, known, n=1, cutoff=0.7)
    return found[0] if found else None


def _read(path: str) -> Layer | None:
    full = os.path.expanduser(path)
    try:
        with open(full, "rb") as file:
            data = file.read()
    except (FileNotFoundError, NotADirectoryError, PermissionError):  # A home may be out of reach.
        return None
    import tomllib

    try:
        values = tomllib.loads(data.decode())
    except ValueError as exc:
        raise ValueError(f"{path} is not valid TOML: {exc}") from exc
    _check(path, values)
    return path, values


def _check(path: str, values: dict[str, Any]) -> None:
    for key, value in values.items():
        if key in _TABLES:
            if not isinstance(value, dict):
                raise ValueError(f"{path}: {key!r} must be a table: [{key}]")
        elif key not in _KEYS:
            kind = "table" if isinstance(value, dict) else "key"
            raise ValueError(f"{path}: unknown {kind} {key!r}; {_hint(key, [*_KEYS, *_TABLES])}")


def _merge(wide: dict[str, Any], near: dict[str, Any]) -> dict[str, Any]:
    merged = dict(wide)
    for key, value in near.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            value = _merge(below, value)
        merged[key] = value
    return merged
