"""Workers that greet and do not fit: what their user is told."""

from types import SimpleNamespace
from typing import Any

import pytest

from hpcdist._cluster.launch_errors import wrong_world
from hpcdist._wire import greeting


def complaint(*, is_job: bool = True, mpi: bool = True, **changes: Any) -> str | None:
    """Return what a world of two ranks says to the greeting of one of them."""
    world: Any = SimpleNamespace(
        launch=SimpleNamespace(jobs_of=is_job or None), mpi=mpi, expected=2
    )
    fitting = {**greeting.about(), "host": "n1", "size": 2, "multiple": True, "library": "MPICH 4"}
    return wrong_world(world, {**fitting, **changes})


def test_a_worker_that_fits_is_welcome() -> None:
    assert complaint() is None
    assert complaint(mpi=False, size=1, multiple=False) is None


@pytest.mark.parametrize("what", ["python", "hpcdist"])
def test_versions_are_compared(what: str) -> None:
    said = complaint(**{what: "0.0.1"})
    assert said is not None
    for word in ("n1", f"{what} 0.0.1", greeting.about()[what], "python="):
        assert word in said


def test_a_world_of_the_wrong_size_names_both_sizes_and_the_library() -> None:
    said = complaint(size=1)
    assert said is not None
    for word in ("1 ranks", "not 2", "MPICH 4", "do not match"):
        assert word in said


def test_threads_have_to_be_granted() -> None:
    said = complaint(multiple=False)
    assert said is not None
    assert "MPI_THREAD_MULTIPLE" in said
