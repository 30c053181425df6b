"""Random programs on simulated clusters: a few seeds here, more in the gate."""

import pytest

import hpcdist
from hpcdist.testing.__main__ import main
from hpcdist.testing.swarm.play import Failure, play
from hpcdist.testing.swarm.program import Blow, Program, Step, random_program
from hpcdist.testing.swarm.shrinking import shrunk

pytestmark = pytest.mark.any_mpi


@pytest.mark.parametrize("seed", range(20))
def test_a_random_program(seed: int) -> None:
    failure = play(random_program(seed))
    assert failure is None, f"{failure}\n{random_program(seed)}"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("first", range(20, 320, 50))
def test_fifty_random_programs(first: int) -> None:
    failures = [play(random_program(seed)) for seed in range(first, first + 50)]
    assert [failure.what for failure in failures if failure is not None] == []


@pytest.mark.parametrize("seed", [205086, 205138])
def test_a_program_that_once_failed(seed: int) -> None:
    """A worker left, and an item it had taken came twice; an outcome came twice, and stayed."""
    failure = play(random_program(seed))
    assert failure is None, f"{failure}\n{random_program(seed)}"


def test_a_seed_is_one_program() -> None:
    assert random_program(5) == random_program(5)
    assert random_program(5) != random_program(5, rough=True)
    assert len({str(random_program(seed)) for seed in range(10)}) == 10


def of(*steps: Step) -> Program:
    return Program(1, False, 3, 1, "world", 1, 0.0, (1, 2), steps, ())


def test_a_wrong_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hpcdist, "reduce", lambda *args, **kw: -1)
    failure = play(of(Step(0, "reduce", (1,))))
    assert failure is not None
    assert "-1 came" in failure.what


def test_an_error_that_nothing_explains_is_found() -> None:
    failure = play(of(Step(1, "call", (9, 1))))
    assert failure is not None
    assert "no process with id 9" in failure.what


def test_what_is_left_behind_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []
    fetch = hpcdist.Future.fetch

    def keep(self: hpcdist.Future, timeout: float | None = None) -> object:
        kept.append(self)
        return fetch(self, timeout)

    monkeypatch.setattr(hpcdist.Future, "fetch", keep)
    failure = play(of(Step(0, "promise", (2, 2, 1))))
    assert failure is not None
    assert "process 1: References.handles" in failure.what


def test_an_outcome_that_comes_in_vain_stays_nowhere() -> None:
    """Process 2 is interrupted while it combines, and then hears of process 4."""
    blows = (Blow(0.0001, "stop", (4, 0.9955)), Blow(0.7555, "interrupt", (2,)))
    steps = (Step(0, "reduce", (1,)),)
    program = Program(359, False, 5, 2, "process", 1, 0.0, (1, 2), steps, blows)
    assert play(program) is None


def test_shrinking_keeps_what_matters() -> None:
    guilty = Step(1, "reduce", (7,))
    steps = [Step(0, "call", (1, k)) for k in range(20)]
    steps.insert(13, guilty)

    def player(program: Program) -> Failure | None:
        return Failure(1, "guilty", []) if guilty in program.steps else None

    program, failure = shrunk(of(*steps), Failure(1, "guilty", []), player)
    assert program.steps == (guilty,)
    assert failure.what == "guilty"


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["swarm", "--seeds", "3..5"]) == 0
    assert "3 seeds" in capsys.readouterr().out
    assert main(["replay", "3"]) == 0
    assert "\nseed 3:" in f"\n{capsys.readouterr().out}"
    assert main(["replay", "--rough", "3"]) == 0
    assert "rough seed 3:" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["swarm", "--seeds", "nine"])
