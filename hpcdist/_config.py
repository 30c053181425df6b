"""Settings, in layers: an argument, `HPCDIST_*`, and three files from the nearest to the widest.

    ./hpcdist.toml    ~/.config/hpcdist/config.toml    /etc/hpcdist/config.toml

`$XDG_CONFIG_HOME`, where it is set, takes the place of `~/.config`. Files are read at the first
question, once. An unknown key is an error that names the nearest known one: a misspelt setting
that is silently ignored is worse than none. A table may also belong to a scheduler that another
package brings along.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, TypeAlias

    Layer: TypeAlias = tuple[str, dict[str, Any]]  # where it was read, and what it says

__all__ = ["nearest", "one_typo_from", "setting", "table", "unknown_option"]

PLUGINS = "hpcdist.managers"  # the entry points by which packages bring schedulers along

_PREFIX = "HPCDIST_"
_FILES = ("./hpcdist.toml", "$XDG_CONFIG_HOME/hpcdist/config.toml", "/etc/hpcdist/config.toml")
_TABLES = ("slurm", "pbs", "sge", "lsf", "profile")
# Passed between our own processes; no settings.
_INTERNAL = (
    *("GPUS", "IDENT", "JOB_END", "JOIN", "MARK", "PMI_KEEPERS_END", "RANK", "SCRUBBED"),
    "RUN",
    "TEST_RUN",
)
_GONE = ("SPIN_US",)  # settings of earlier versions, which would now be ignored
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


def _memory(value: object) -> int:
    text = str(value).strip().upper()
    scale = max(0, " KMGT".find(text[-1:]))
    number = text[:-1] if scale else text
    if not (number.isascii() and number.isdigit() and len(number) < 16 and int(number)):
        raise ValueError("must be a number of bytes, such as 256M")
    return int(number) << 10 * scale


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
    "heartbeat": (_seconds, 2.0),
    "heartbeat_limit": (_seconds, 10.0),
    "dir": (_path, "~/.hpcdist"),
    "log": (_level, "warning"),
    "trace": (_path, None),
    "outstanding": (_memory, "256M"),
}


class _Files:
    """The files of settings, read at the first question."""

    def __init__(self) -> None:
        self._layers: list[Layer] | None = None

    def layers(self) -> list[Layer]:
        """Return what they say, the nearest first."""
        if self._layers is None:
            _check_environment()
            self._layers = [layer for path in _FILES if (layer := _read(path)) is not None]
        return self._layers

    def forget(self) -> None:
        """Read files and environment anew at the next question."""
        self._layers = None


_files = _Files()
forget = _files.forget
_learned: set[str] = set()  # tables of schedulers that are defined in this program


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


def sayings() -> list[tuple[str, Any, str]]:
    """Return each setting, its value, and who has said so; then the entries of tables.

    Raises:
        ValueError: One of them is wrong.
    """
    found: list[tuple[str, Any, str]] = []
    for name in _KEYS:
        said = (source for source, value in _candidates(name, None) if value is not None)
        found.append((name, setting(name), next(said, "default")))
    known: dict[str, tuple[Any, str]] = {}
    for path, values in _files.layers():
        for name, value in _flat(values):
            known.setdefault(name, (value, path))
    return found + [(name, *known[name]) for name in sorted(known) if "." in name]


def _flat(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def table(name: str) -> dict[str, Any]:
    """Return a table of the files, such as "slurm" or "profile.bigmem"; nearer files win by key."""
    merged: dict[str, Any] = {}
    for _, values in reversed(_files.layers()):
        found: Any = values
        for part in name.split("."):
            found = found.get(part, {}) if isinstance(found, dict) else {}
        if isinstance(found, dict):
            merged = _merge(merged, found)
    return merged


def learn(*tables: str) -> None:
    """Let files of settings have these tables: those of schedulers that are none of ours."""
    _learned.update(tables)


def learned() -> list[str]:
    """Return the tables that other processes of this cluster need."""
    return sorted(_learned)


def config_home(path: str) -> str:
    """Expand a path of a user's files: `$XDG_CONFIG_HOME` is `~/.config` unless it is set."""
    home = os.environ.get("XDG_CONFIG_HOME", "")
    if not os.path.isabs(home):  # the specification: others are to be ignored
        home = "~/.config"
    return os.path.expanduser(path.replace("$XDG_CONFIG_HOME", home))


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
    files = _files.layers()
    variable = _PREFIX + name.upper()
    yield variable, os.environ.get(variable) or None
    for source, values in files:
        yield source, values.get(name)


def _check_environment() -> None:
    known = [name.upper() for name in _KEYS] + list(_INTERNAL)
    for variable in os.environ:
        name = variable.removeprefix(_PREFIX)
        if variable.startswith(_PREFIX) and name in _GONE:
            raise ValueError(f"the environment variable {variable} is no longer a setting")
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
    path = config_home(path)
    try:
        with open(path, "rb") as file:
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
    tables = {*_TABLES, *_learned}
    if not tables.union(_KEYS).issuperset(values):
        tables |= _brought()
    for key, value in values.items():
        if key in tables:
            if not isinstance(value, dict):
                raise ValueError(f"{path}: {key!r} must be a table: [{key}]")
        elif key not in _KEYS:
            kind = "table" if isinstance(value, dict) else "key"
            known = [*_KEYS, *sorted(tables)]
            raise ValueError(f"{path}: unknown {kind} {key!r}; {_hint(key, known)}")


def _brought() -> set[str]:
    """Return the schedulers that installed packages bring along; nothing of theirs is imported."""
    from importlib.metadata import entry_points  # 10 ms and more

    return {entry.name for entry in entry_points(group=PLUGINS)}


def _merge(wide: dict[str, Any], near: dict[str, Any]) -> dict[str, Any]:
    merged = dict(wide)
    for key, value in near.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            value = _merge(below, value)
        merged[key] = value
    return merged
