"""Inputs: bytes at random, words of the format, and the corpus with changes here and there."""

from collections.abc import Sequence

from hypothesis import strategies as st

from tests.fuzz.target import Target

_LONGEST = 400
_EDITS = 6
_PIECES = 24
_SEED_MOST = 1 << 14  # bytes of a seed that is worth changing
_BYTES = st.binary(max_size=8) | st.sampled_from(
    [b"\0", b"\xff", b"\x7f\xff\xff\xff", b"\xff" * 8, b"\0" * 8, b"\x80", "²".encode(), b"-1"]
)

Edit = tuple[int, int, bytes]  # where, how many bytes go, what comes in their place


def inputs(target: Target) -> st.SearchStrategy[bytes]:
    """Make inputs for a target."""
    words = _one_of(target.words) if target.words else _BYTES
    ways = [st.binary(max_size=_LONGEST)]
    ways.append(st.lists(words | st.binary(max_size=4), max_size=_PIECES).map(b"".join))
    seeds = [path.read_bytes() for path in target.seeds() if path.stat().st_size <= _SEED_MOST]
    if seeds:
        edit = st.tuples(st.integers(0, 1 << 16), st.integers(0, 9), words | _BYTES)
        edits = st.lists(edit, min_size=1, max_size=_EDITS)
        ways.append(st.builds(_edited, _one_of(seeds), edits, st.integers(0, 1 << 16)))
    return st.one_of(ways)


def _one_of(given: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Choose one, without showing all of them in messages."""
    return st.integers(0, len(given) - 1).map(lambda k: given[k])


def _edited(seed: bytes, edits: list[Edit], length: int) -> bytes:
    """Change a seed, and cut it off if the length is within it; most lengths are not."""
    data = seed
    for at, gone, new in edits:
        at %= len(data) + 1
        data = data[:at] + new + data[at + gone :]
    return data[:length] if length % 3 == 0 else data
