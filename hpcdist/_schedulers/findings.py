"""What a check of `hpcdist doctor` finds, and how it is shown."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hpcdist._public import public_in
from hpcdist._schedulers.launchers import WorldLauncher


class Mark(enum.Enum):
    """How a check came out: the sign, and what to write where it cannot be shown."""

    GOOD = ("✓", "ok")
    BAD = ("✗", "FAILED")
    DOUBT = ("!", "!")
    FACT = ("·", "-")


@public_in("managers")
@dataclass(frozen=True)
class Finding:
    """One line of `hpcdist doctor`.

    Attributes:
        fix: What to do about it.
        more: Further lines, as they are: a table, the words of another program.

    Example:
        >>> from hpcdist.managers import Finding
        >>> Finding.bad("no flux on PATH", "load the site's module").fix
        "load the site's module"
    """

    mark: Mark
    text: str
    fix: str = ""
    more: str = ""

    @classmethod
    def good(cls, text: str) -> Finding:
        """Return the finding that a check has passed."""
        return cls(Mark.GOOD, text)

    @classmethod
    def bad(cls, text: str, fix: str, more: str = "") -> Finding:
        """Return the finding that a check has failed."""
        return cls(Mark.BAD, text, fix, more)

    @classmethod
    def doubt(cls, text: str, fix: str, more: str = "") -> Finding:
        """Return the finding that something may be wrong."""
        return cls(Mark.DOUBT, text, fix, more)

    @classmethod
    def fact(cls, text: str, more: str = "") -> Finding:
        """Return a finding that is neither good nor bad."""
        return cls(Mark.FACT, text, more=more)


good, bad, doubt, fact = Finding.good, Finding.bad, Finding.doubt, Finding.fact


@public_in("managers")
@dataclass(frozen=True)
class Trial:
    """The job that `hpcdist doctor` would run, as the checks of a scheduler see it.

    Attributes:
        script: Renders its script.
        launcher: Chooses what would start its ranks.
        family: Of the MPI library in use: "mpich", "intel" or "openmpi"; None: there is none.
    """

    script: Callable[[], str]
    launcher: Callable[[], WorldLauncher]
    family: str | None


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


def table(headline: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table; the last column is as wide as it is.

    >>> print(table(["A", "B"], [["long", "x"], ["s", "y"]]))
    A     B
    long  x
    s     y
    """
    lines = [list(headline), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headline) - 1)]
    return "\n".join(
        "  ".join(
            [*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[-1]]
        )
        for line in lines
    )
