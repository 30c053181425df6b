"""Numbers in texts that others wrote: schedulers, launchers, ranks, the other end of a line."""

from __future__ import annotations

_DIGITS = frozenset("0123456789")
_LONGEST = 18  # digits: all that fit into 64 bits, and into whatever is done with them here


def whole(text: object) -> int | None:
    """Read a number without a sign; None where there is none.

    `str.isdigit` says yes to "²", of which `int` makes a ValueError, as it does of 5,000 digits.

    >>> whole("007"), whole("²"), whole("-1"), whole(""), whole("9" * 5000)
    (7, None, None, None, None)
    """
    if not isinstance(text, str) or not 0 < len(text) <= _LONGEST or not _DIGITS.issuperset(text):
        return None
    return int(text)


def signed(text: object) -> int | None:
    """Read a number with or without a minus; None where there is none.

    >>> signed("-9"), signed("7"), signed("--7")
    (-9, 7, None)
    """
    minus = isinstance(text, str) and text.startswith("-")
    number = whole(text[1:] if isinstance(text, str) and minus else text)
    return None if number is None else -number if minus else number


def clock(seconds: float) -> str:
    """Write a time as a clock does, or a timetable.

    >>> clock(130), clock(3661), clock(90061)
    ('2:10', '1:01:01', '1-01:01:01')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}-{hours:02}:{minutes:02}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
