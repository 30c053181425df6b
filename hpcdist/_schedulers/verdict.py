"""What a scheduler says of a job, and the one state machine that its words go through.

A terminal state is final: a later word adds what is still unknown (an exit code), and never moves
the job to another state. "Not listed" and a failed poll are no words at all.
"""

from __future__ import annotations

import dataclasses
import enum
import signal as signals
from dataclasses import dataclass
from datetime import datetime

from hpcdist._public import public_in


@public_in("managers")
class JobState(enum.Enum):
    """Where a job is, in words that all schedulers share."""

    QUEUED = "QUEUED"
    HELD = "HELD"
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    PREEMPTED = "PREEMPTED"  # it may be queued again, so it is not the end
    UNKNOWN = "UNKNOWN"
    DONE = "DONE"
    FAILED = "FAILED"
    TIMEOUT = "TIMEOUT"
    CANCELLED = "CANCELLED"

    @property
    def terminal(self) -> bool:
        """Whether a job in this state has ended for good."""
        return self in _TERMINAL

    @property
    def waiting(self) -> bool:
        """Whether a job in this state has yet to start."""
        return self in (JobState.QUEUED, JobState.HELD)


_TERMINAL = frozenset({JobState.DONE, JobState.FAILED, JobState.TIMEOUT, JobState.CANCELLED})
# Words that say no more than the state itself does.
_PLAIN_REASONS = frozenset({"", "None", "NonZeroExitCode", "(null)"})


@public_in("managers")
@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One word of the scheduler on one job.

    Attributes:
        state: The state in our words.
        word: The state in the scheduler's own, such as "OUT_OF_MEMORY".
        reason: Why it waits, or why it ended, as the scheduler puts it.
        start: When it started, or is estimated to.
        end: When it ended, or is to end at the latest.
        nodes: Where it runs or ran, in the scheduler's notation.
        source: Who said so: "squeue", "sacct", "exit file", …

    Example:
        >>> from hpcdist.managers import JobState, Verdict
        >>> Verdict(state=JobState.QUEUED, word="PD", reason="Priority").describe()
        'PD (Priority)'
    """

    state: JobState
    word: str
    reason: str = ""
    start: datetime | None = None
    end: datetime | None = None
    nodes: str = ""
    exit_code: int | None = None
    signal: int | None = None
    source: str = ""

    def describe(self) -> str:
        """Say it in one line.

        >>> Verdict(state=JobState.TIMEOUT, word="TIMEOUT", reason="TimeLimit").describe()
        'TIMEOUT (TimeLimit)'
        >>> Verdict(state=JobState.FAILED, word="FAILED", exit_code=7).describe()
        'FAILED, exit code 7'
        """
        text = self.word
        if self.state is JobState.CANCELLED:  # the reason is still that of its waiting
            return text
        same = self.reason.upper() == self.word.replace("_", "")
        if self.reason not in _PLAIN_REASONS and not same:
            text += f" ({self.reason})"
        if self.state is JobState.FAILED and self.signal:
            return f"{text}, {_signal_name(self.signal)}"
        if self.state is JobState.FAILED and self.exit_code:
            return f"{text}, exit code {self.exit_code}"
        return text


def merge(old: Verdict | None, new: Verdict | None) -> Verdict | None:
    """Return what is known of a job after a new word on it (None: it was not listed)."""
    if old is None or new is None:
        return new or old
    if old.state.terminal:
        return _completed(old, new) if new.state is old.state else old
    if new.state is JobState.UNKNOWN and old.state is not JobState.UNKNOWN:
        return old
    if old.state is JobState.PREEMPTED and new.source == "exit file" and new.signal:
        return dataclasses.replace(new, word=old.word, reason=old.reason)
    return new


def _completed(old: Verdict, new: Verdict) -> Verdict:
    """Fill in what the first word on a job's end left out."""
    changes = {
        field.name: getattr(new, field.name)
        for field in dataclasses.fields(Verdict)
        if getattr(old, field.name) in (None, "", "None") and getattr(new, field.name)
    }
    if new.word.startswith(old.word):  # "CANCELLED" and, from another source, "CANCELLED by 1000"
        changes["word"] = new.word
    if old.exit_code is None and new.exit_code is not None:
        changes["exit_code"] = new.exit_code
        changes["reason"] = new.reason or old.reason  # from one who knows more
    return dataclasses.replace(old, **changes)


def _signal_name(number: int) -> str:
    try:
        return f"killed by {signals.Signals(number).name}"
    except ValueError:
        return f"killed by signal {number}"
