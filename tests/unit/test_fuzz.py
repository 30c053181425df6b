"""What others say and write is read, or refused: the corpus, and some inputs of each target.

The same ones at every run. `python -m tests.fuzz --minutes 60` looks for others.
"""

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz import all_targets
from tests.fuzz.inputs import inputs
from tests.fuzz.target import CORPUS, Target

pytestmark = pytest.mark.any_mpi

TARGETS = all_targets()


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_the_corpus_is_read_or_refused(target: Target) -> None:
    for path in target.seeds():
        try:
            target.accepts(path.read_bytes())
        except Exception as exc:
            exc.add_note(f"by {path}")
            raise


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_any_bytes_are_read_or_refused(target: Target) -> None:
    @settings(
        max_examples=60,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=inputs(target))
    def attempt(data: bytes) -> None:
        target.accepts(data)

    attempt()


def test_no_input_lies_where_nothing_reads_it() -> None:
    known = {target.folder for target in TARGETS} | {"any"}
    assert {path.name for path in CORPUS.iterdir()} <= known
