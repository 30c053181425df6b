"""What `renew=True` starts and retires, given what is there. No processes here."""

import pytest

from hpcdist._cluster.renewal import ATTEMPTS, Orders, Standing, orders, pause, wanted

NOTHING = Orders()


def single(**now: int) -> Standing:
    """Return a world of workers that are alone, each for itself."""
    return Standing(whole=False, **now)


@pytest.mark.parametrize(
    "worlds",
    [
        [Standing(living=3)],
        [Standing(living=1, coming=2)],
        [Standing(living=2, removed=1)],
        [single(living=2, died=1), single(living=1)],
        [single(living=2, died=1), single(coming=1)],
        [Standing(retired=True, living=2, died=1), Standing(living=3)],
        [Standing(living=2, died=1), Standing(coming=3)],
        [Standing(removed=3)],
    ],
)
def test_where_nobody_is_missing_nothing_is_done(worlds: list[Standing]) -> None:
    assert orders(3, worlds) == NOTHING


def test_single_workers_are_replaced_one_by_one() -> None:
    assert orders(3, [single(living=1, died=2)]) == Orders(start=2)
    assert orders(3, [single(living=1, died=2), single(coming=1)]) == Orders(start=1)
    assert orders(3, [single(living=2, died=1), single(died=1)]) == Orders(start=1)


def test_a_world_of_mpi_is_replaced_as_a_whole() -> None:
    damaged = Standing(living=2, died=1)
    assert orders(3, [damaged]) == Orders(start=3)
    assert orders(3, [Standing(died=3)]) == Orders(start=3)
    assert orders(3, [damaged, Standing(coming=3, ready=True)]) == Orders(retire=(0,))
    assert orders(3, [damaged, Standing(living=3)]) == Orders(retire=(0,))


def test_a_start_in_vain_is_followed_by_another() -> None:
    failed = Standing()
    assert orders(3, [Standing(living=2, died=1), failed]) == Orders(start=3)


def test_a_replacement_is_replaced_too() -> None:
    retired, damaged = Standing(retired=True, living=1, died=2), Standing(living=2, died=1)
    assert orders(3, [retired, damaged]) == Orders(start=3)
    assert orders(3, [retired, damaged, Standing(living=3)]) == Orders(retire=(1,))


def test_whom_the_user_removes_is_not_replaced() -> None:
    assert orders(3, [Standing(living=1, removed=1, died=1)]) == Orders(start=2)
    assert orders(3, [single(living=1, removed=1, died=1)]) == Orders(start=1)
    assert wanted(3, [Standing(living=1, removed=2)]) == 1
    assert wanted(3, [Standing(retired=True, removed=2), Standing(living=3)]) == 3


def test_pauses_grow_until_it_is_given_up() -> None:
    pauses = [pause(failures) for failures in range(ATTEMPTS + 1)]
    assert pauses[0] == 0
    assert pauses[-1] is None
    assert sorted(filter(None, pauses)) == pauses[1:-1]
