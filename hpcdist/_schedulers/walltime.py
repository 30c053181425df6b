"""How long a job may run, as its options say: in each scheduler's notation."""

from __future__ import annotations

import re

from hpcdist._numbers import whole

_UNLIMITED = frozenset({"UNLIMITED", "INFINITE", "-1", "0"})  # sbatch(1), --time; 0 likewise


def slurm_seconds(text: object) -> float | None:
    """Read a time limit of sbatch: minutes, minutes:seconds, and so on; None: none is set.

    >>> [slurm_seconds(t) for t in ("5", "5:30", "1:00:00", "2-0", "1-12:30", "UNLIMITED", "soon")]
    [300.0, 330.0, 3600.0, 172800.0, 131400.0, None, None]
    """
    said = str(text).strip()
    if said.upper() in _UNLIMITED:
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", said)
    if match is None:
        return None
    days, first, second, third = (whole(part) or 0 for part in match.groups())
    if match[1] is not None or match[4] is not None:
        hours, minutes, seconds = first, second, third
    else:
        hours, minutes, seconds = 0, first, second
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def clock_seconds(text: object) -> float | None:
    """Read a time of PBS or Grid Engine: seconds, or [[hours:]minutes:]seconds.

    >>> [clock_seconds(t) for t in ("90", "1:30", "01:00:00", ":20:", "soon", "INFINITY")]
    [90.0, 90.0, 3600.0, 1200.0, None, None]
    """
    parts = re.sub(r"\.\d+$", "", str(text).strip()).split(":")
    numbers = [0 if not part else whole(part) for part in parts]
    if len(numbers) > 3 or not any(parts) or None in numbers:
        return None
    total = 0
    for number in numbers:
        total = total * 60 + (number or 0)
    return float(total)


def lsf_seconds(text: object) -> float | None:
    """Read a run limit of bsub: [hours:]minutes, and perhaps the host it is meant for.

    >>> [lsf_seconds(t) for t in ("30", "1:30", "2:00/hostA", "soon")]
    [1800.0, 5400.0, 7200.0, None]
    """
    parts = [whole(part) for part in str(text).partition("/")[0].strip().split(":")]
    if len(parts) > 2 or None in parts:
        return None
    hours, minutes = parts if len(parts) == 2 else (0, parts[0])
    return float(((hours or 0) * 60 + (minutes or 0)) * 60)


def among(options: tuple[str, ...], *patterns: str) -> str | None:
    """Find a time among directives that are passed on untouched: what a pattern's group has.

    >>> among(("--gres=gpu:1", "--time=5:00"), r"(?:--time=|-t\\s*)(\\S+)")
    '5:00'
    """
    for option in options:
        for pattern in patterns:
            match = re.search(pattern, option)
            if match is not None:
                return match[1]
    return None
