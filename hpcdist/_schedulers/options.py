"""Our own keywords and the scheduler's: whose each is, which one wins, which ones contradict.

Four layers, the nearest last: what we set by default, the table of the scheduler in the files of
settings, a profile in them, and the caller's keywords. A name in two spellings (`p`, `partition`,
`mem_per_cpu`, `mem-per-cpu`) is one option.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

from hpcdist import _config
from hpcdist._contract.interpreters import chosen, words
from hpcdist._contract.managers import COMMON
from hpcdist._numbers import whole
from hpcdist._public import public_in

# What an option is given: True (bare), a value, or several; None and False leave it out.
Value: TypeAlias = Any


@dataclass(frozen=True, kw_only=True)
class Own:
    """What a batch manager itself is asked for. None of it reaches the scheduler.

    Attributes:
        split: None: one job; "node": one a node; k: jobs of k workers.
        template: The name or the path of a template; None: the scheduler's.
        launcher: "auto", or one of those that the scheduler knows, such as "srun" or "mpiexec".
        mpi: The launcher's MPI flavour, as in `srun --mpi=…`.
        srun_args: More arguments for `srun`, as they are.
        gpus: Whether each worker is to see its share of its host's GPUs. Only "auto" is ours: any
            other value is an option of the scheduler's.
        interface: The network interface by which workers reach process 1.
        job_dir: The folder that gets the runs' folders.
        keep: Whether a run's folder stays.
        queue_timeout: Seconds a job may wait to start.
        linger: Seconds a job waits for another driver; None: it ends with its own.
        profile: A table `[profile.…]` of the files of settings.
        options: Directives that are passed on untouched.
    """

    split: int | str | None = None
    template: str | None = None
    setup: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    launcher: str = "auto"
    mpi: str | None = None
    srun_args: tuple[str, ...] = ()
    gpus: bool = False
    interface: str | None = None
    job_dir: str | None = None
    keep: bool = False
    queue_timeout: float | None = None
    linger: float | None = None
    profile: str | None = None
    options: tuple[str, ...] = ()


_SHARED = ("gpus", "auto")  # the one value that is ours
OWN = frozenset(field.name for field in fields(Own)) - {_SHARED[0]}


@public_in("managers")
@dataclass(frozen=True)
class Asked:
    """What a launch asks of a scheduler.

    Attributes:
        own: Our part.
        options: The scheduler's, by canonical name, as (name as written, value).
    """

    own: Own
    options: dict[str, tuple[str, Value]]

    def value(self, *names: str) -> Value:
        """Return the value of an option of the scheduler; None where it is not given.

        Args:
            names: Its canonical name; several: the first one that is given counts.
        """
        for name in names:
            _, value = self.options.get(name, ("", None))
            if value is not None and value is not False:
                return value
        return None

    def number(self, name: str) -> int | None:
        """Return the value of an option that is a number of 1 or more.

        Raises:
            ValueError: It is none.
        """
        value = self.value(name)
        number = None if value is None else whole(str(value))
        if value is not None and not number:
            raise ValueError(f"{self.spelling(name)}: must be a number of 1 or more")
        return number

    def spelling(self, name: str) -> str:
        """Return how the caller wrote an option, for messages."""
        written, value = self.options[name]
        return f"{written}={value!r}"

    def over(self, defaults: Mapping[str, Value], forced: Iterable[str] = ()) -> Asked:
        """Return this on top of defaults, of which the forced ones hold in any case."""
        kept = {name: option for name, option in self.options.items() if name not in forced}
        below = {name: (name, value) for name, value in defaults.items() if name not in kept}
        return Asked(self.own, below | kept)


def read(
    given: Mapping[str, object],
    scheduler: str,
    *,
    aliases: Mapping[str, str],
    launchers: Sequence[str],
) -> Asked:
    """Tell our keywords from the scheduler's, and put the layers together.

    Args:
        given: All keywords but the common ones.
        scheduler: Its table in the files of settings.
        aliases: Short names of its options, and the long ones they stand for.
        launchers: What `launcher` may be, beside "auto".

    Raises:
        TypeError: A keyword is one slip from one of ours, or has a value of a wrong type.
        ValueError: A value that cannot be; a profile that is not there.
    """
    wide = _normal(_config.table(scheduler))
    near = _normal(given)
    profile = near.get("profile", wide.get("profile"))
    middle = _normal(_profile(profile)) if profile is not None else {}
    own: dict[str, Any] = {}
    options: dict[str, tuple[str, Value]] = {}
    for source, layer in ((scheduler, wide), (f"profile.{profile}", middle), ("", near)):
        for name, value in layer.items():
            if name in OWN:
                own[name] = value
            elif (name, value) == _SHARED:
                own[name] = True
            elif name in COMMON:
                if source.startswith("profile."):
                    raise ValueError(
                        f"[{source}]: give {name!r} as an argument or in [{scheduler}]"
                    )
            else:
                _refuse_slips(name, source)
                key = aliases.get(name, name)
                options.pop(key, None)  # a later layer's place in the script is later
                options[key] = (name, value)
    _check_launcher(own.get("launcher"), scheduler, ("auto", *launchers))
    return Asked(_own({**own, "profile": profile}), options)


def common(scheduler: str) -> dict[str, Any]:
    """Return the common parameters that the scheduler's table in the files of settings sets."""
    table = _normal(_config.table(scheduler))
    return chosen({n: v for n, v in table.items() if n in COMMON}, f"[{scheduler}]")


def gnu_style(name: str) -> tuple[str, str]:
    """Write a long option as most programs want it: what it begins with, and its separator.

    >>> gnu_style("mem_per_cpu")
    ('--mem-per-cpu', '=')
    """
    return "--" + name.replace("_", "-"), "="


def directives(
    asked: Asked,
    quote: Callable[[str], str],
    *,
    long: Callable[[str], tuple[str, str]] = gnu_style,
) -> tuple[str, ...]:
    """Write the scheduler's options as they stand in a script.

    Args:
        quote: How the scheduler wants a value written in a script.
        long: How it wants a long option written.
    """
    lines: list[str] = []
    for name, value in asked.options.values():
        flag, between = (f"-{name}", " ") if len(name) == 1 else long(name)
        lines += _directive(name, value, quote, flag, between)
    return (*lines, *asked.own.options)


def _directive(
    name: str, value: Value, quote: Callable[[str], str], flag: str, between: str
) -> Iterable[str]:
    for item in value if isinstance(value, list | tuple) else [value]:
        if item is True:
            yield flag
        elif item is not None and item is not False:
            yield flag + between + quote(text_of(name, item))


def text_of(name: str, value: Value) -> str:
    """Return the text of a value; one that a directive cannot hold is refused."""
    if not isinstance(value, str | int | float | os.PathLike):
        raise TypeError(f"{name}= takes a text, a number, True or a list of these, not {value!r}")
    text = os.fspath(value) if isinstance(value, os.PathLike) else str(value)
    if not isinstance(text, str) or not _on_one_line(text):
        raise ValueError(f"{name}={value!r}: a directive is one line of text")
    return text


def contradiction(ours: str, theirs: str, advice: str) -> ValueError:
    """Return the error for two options that cannot both hold."""
    return ValueError(f"{theirs} contradicts {ours}: {advice}")


def _normal(layer: Mapping[str, object]) -> dict[str, Any]:
    return {str(name).lstrip("-").replace("-", "_"): value for name, value in layer.items()}


def _profile(name: object) -> dict[str, Any]:
    if not isinstance(name, str):
        raise TypeError(f"profile= is the name of a profile, not {name!r}")
    profiles = _config.table("profile")
    if isinstance(profiles.get(name), dict):
        found: dict[str, Any] = profiles[name]
        return found
    meant = _config.nearest(name, profiles)
    known = f"did you mean {meant!r}?" if meant else f"known are: {', '.join(profiles) or 'none'}"
    raise ValueError(f"there is no [profile.{name}] in the files of settings; {known}")


def _refuse_slips(name: str, source: str) -> None:
    meant = _config.one_typo_from(name, sorted(OWN | COMMON))
    if meant is not None:
        where = f"[{source}]" if source else "addprocs"
        raise TypeError(
            f"{where} has no option {name!r}; did you mean {meant!r}? (options={[_long(name)]!r} "
            "passes it to the scheduler all the same)"
        )
    if not all(part.isalnum() for part in name.split("_")):
        raise ValueError(f"{name!r} is no name of an option")


def _long(name: str) -> str:
    return "--" + name.replace("_", "-") + "=…"


def _own(values: dict[str, Any]) -> Own:
    made = {name: _READ[name](name, value) for name, value in values.items() if value is not None}
    return Own(**made)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name}= is a text, not {value!r}")
    text = os.fspath(value)
    if not isinstance(text, str) or not text:
        raise ValueError(f"{name}={value!r} is empty")
    return text


def _path(name: str, value: object) -> str:
    return os.path.abspath(os.path.expanduser(_text(name, value)))


def _texts(name: str, value: object) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, Sequence) or not all(isinstance(item, str) for item in items):
        raise TypeError(f"{name}= is a text or a list of texts, not {value!r}")
    return tuple(items)


def _lines(name: str, value: object) -> tuple[str, ...]:
    lines = _texts(name, value)
    for line in lines:
        if not _on_one_line(line):
            raise ValueError(f"{name}=: {line!r} is not one line")
    return lines


def _on_one_line(text: str) -> bool:
    return not any(char in text for char in "\n\r\0")


def _split(name: str, value: object) -> int | str:
    if value == "node":
        return "node"
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f'split= is "node" or a number of workers of 1 or more, not {value!r}')
    return value


def _check_launcher(value: object, scheduler: str, known: Sequence[str]) -> None:
    if value is not None and value not in known:
        raise ValueError(f"launcher= is one of {', '.join(known)} with {scheduler}, not {value!r}")


def _seconds(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise ValueError(f"{name}= is a number of seconds, not {value!r}")
    return float(value)


def _positive(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name}= is a number of seconds above 0, not {value!r}")
    return float(value)


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}= is True or False, not {value!r}")
    return value


_READ: dict[str, Callable[[str, Any], Any]] = {
    "split": _split,
    "template": _text,
    "setup": _texts,
    "modules": _texts,
    "launcher": _text,
    "mpi": _text,
    "srun_args": words,
    "gpus": _flag,
    "interface": _text,
    "job_dir": _path,
    "keep": _flag,
    "queue_timeout": _seconds,
    "linger": _positive,
    "profile": _text,
    "options": _lines,
}
