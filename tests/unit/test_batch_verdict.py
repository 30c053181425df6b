"""The state machine of jobs: the end is final, silence says nothing."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcdist._schedulers.verdict import JobState, Verdict, merge

TIMES = st.none() | st.datetimes(timezones=st.just(UTC))
VERDICTS = st.builds(
    Verdict,
    state=st.sampled_from(JobState),
    word=st.sampled_from(["PENDING", "CANCELLED", "CANCELLED by 1000", "FAILED", "??"]),
    reason=st.sampled_from(["", "Priority", "TimeLimit", "None"]),
    start=TIMES,
    end=TIMES,
    nodes=st.sampled_from(["", "n1"]),
    exit_code=st.none() | st.integers(0, 255),
    signal=st.none() | st.integers(1, 15),
    source=st.sampled_from(["squeue", "sacct"]),
)
WORDS = st.lists(st.none() | VERDICTS, max_size=12)


def fold(words: list[Verdict | None]) -> list[Verdict | None]:
    known: list[Verdict | None] = [None]
    for word in words:
        known.append(merge(known[-1], word))
    return known


@given(WORDS)
def test_a_terminal_state_is_final(words: list[Verdict | None]) -> None:
    ended: JobState | None = None
    for known in fold(words):
        if ended is not None:
            assert known is not None
            assert known.state is ended
        if known is not None and known.state.terminal:
            ended = known.state


@given(WORDS)
def test_what_is_known_of_an_end_is_not_lost(words: list[Verdict | None]) -> None:
    for before, after in zip(fold(words), fold(words)[1:], strict=False):
        if before is None or not before.state.terminal:
            continue
        assert after is not None
        assert after.word.startswith(before.word)
        for name in ("exit_code", "signal", "start", "end"):
            if getattr(before, name) is not None:
                assert getattr(after, name) == getattr(before, name)


@given(st.none() | VERDICTS)
def test_silence_changes_nothing(known: Verdict | None) -> None:
    assert merge(known, None) == known


@given(VERDICTS, VERDICTS)
def test_an_unknown_word_hides_no_known_state(old: Verdict, new: Verdict) -> None:
    merged = merge(old, new)
    assert merged is not None
    if new.state is JobState.UNKNOWN:
        assert merged.state is old.state


@given(VERDICTS)
def test_the_same_word_twice_is_once(word: Verdict) -> None:
    assert merge(word, word) == word


def test_a_job_may_run_again_until_it_has_ended() -> None:
    words = ["RUNNING", "PREEMPTED", "QUEUED", "RUNNING", "DONE", "RUNNING"]
    states = [known.state.name for known in fold([verdict(w) for w in words]) if known is not None]
    assert states == ["RUNNING", "PREEMPTED", "QUEUED", "RUNNING", "DONE", "DONE"]


def verdict(state: str, word: str = "", **rest: object) -> Verdict:
    return Verdict(state=JobState[state], word=word or state, **rest)  # type: ignore[arg-type]


def test_a_later_source_adds_what_the_first_left_out() -> None:
    first = verdict("CANCELLED", source="squeue", nodes="n1")
    second = verdict("CANCELLED", "CANCELLED by 20001", exit_code=0, signal=9, source="sacct")
    merged = merge(first, second)
    assert merged is not None
    assert (merged.word, merged.exit_code, merged.nodes) == ("CANCELLED by 20001", 0, "n1")


def test_a_preempted_job_whose_script_was_told_to_end_has_ended_so() -> None:
    exit_file = verdict("FAILED", signal=15, exit_code=143, source="exit file")
    merged = merge(verdict("PREEMPTED", reason="Preempted"), exit_file)
    assert merged is not None
    assert (merged.word, merged.state) == ("PREEMPTED", JobState.FAILED)
    for other in (verdict("FAILED", signal=9, source="sacct"), verdict("RUNNING")):
        assert merge(verdict("PREEMPTED"), other) == other  # it was queued again


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (verdict("FAILED", "OUT_OF_MEMORY", reason="OutOfMemory", exit_code=0), "OUT_OF_MEMORY"),
        (verdict("CANCELLED", "CANCELLED by 20001", signal=15), "CANCELLED by 20001"),
        (verdict("TIMEOUT", reason="TimeLimit"), "TIMEOUT (TimeLimit)"),
        (verdict("FAILED", exit_code=7, reason="NonZeroExitCode"), "FAILED, exit code 7"),
        (verdict("FAILED", exit_code=0, signal=9), "FAILED, killed by SIGKILL"),
        (verdict("FAILED", signal=99), "FAILED, killed by signal 99"),
        (verdict("FAILED", "NODE_FAIL", reason="NodeDown"), "NODE_FAIL (NodeDown)"),
        (verdict("DONE", "COMPLETED", exit_code=0), "COMPLETED"),
    ],
)
def test_a_verdict_in_one_line(said: Verdict, told: str) -> None:
    assert said.describe() == told


def test_times_are_part_of_it() -> None:
    when = datetime(2026, 11, 21, 14, 5, tzinfo=UTC)
    merged = merge(verdict("DONE"), verdict("DONE", end=when))
    assert merged is not None
    assert merged.end == when
