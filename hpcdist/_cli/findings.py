"""What a check of `hpcdist doctor` finds, and how it is shown."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Mark(enum.Enum):
    """How a check came out: the sign, and what to write where it cannot be shown."""

    GOOD = ("✓", "ok")
    BAD = ("✗", "FAILED")
    DOUBT = ("!", "!")
    FACT = ("·", "-")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's.

    Attributes:
        fix: What to do about it.
        more: Further lines, as they are: a table, the words of another program.
    """

    mark: Mark
    text: str
    fix: str = ""
    more: str = ""


def good(text: str) -> Finding:
    """Return the finding that a check has passed."""
    return Finding(Mark.GOOD, text)


def bad(text: str, fix: str, more: str = "") -> Finding:
    """Return the finding that a check has failed."""
    return Finding(Mark.BAD, text, fix, more)


def doubt(text: str, fix: str, more: str = "") -> Finding:
    """Return the finding that something may be wrong."""
    return Finding(Mark.DOUBT, text, fix, more)


def fact(text: str, more: str = "") -> Finding:
    """Return a finding that is neither good nor bad."""
    return Finding(Mark.FACT, text, more=more)


def show(finding: Finding, encoding: str = "utf-8") -> str:
    """Write a finding.

    Args:
        encoding: What the signs must be written in.

    >>> print(show(bad("no sinfo on PATH", "load the module", "words\\nwords")))
    ✗ no sinfo on PATH
        words
        words
      fix: load the module
    """
    sign, plain = finding.mark.value
    try:
        sign.encode(encoding)
    except UnicodeEncodeError:
        sign = plain
    lines = [f"{sign} {finding.text}"]
    lines += [f"    {line}" for line in finding.more.splitlines()]
    lines += [f"  fix: {finding.fix}"] if finding.fix else []
    return "\n".join(lines)
