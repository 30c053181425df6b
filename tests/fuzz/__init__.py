"""Whatever bytes come: readers read them, or refuse them with the error they document.

`tests/unit/test_fuzz.py` tries the corpus and some inputs of each target at every run of the tests;
`python -m tests.fuzz --minutes 60` goes on for as long as is wanted. What failed once lies in the
corpus, and is tried for ever after.
"""

from tests.fuzz import formats, parsers
from tests.fuzz.target import Target


def all_targets() -> list[Target]:
    """List all that is fuzzed."""
    return [*formats.targets(), *parsers.targets()]
