"""A random program: what the processes of a cluster do, and what is done to them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
_ISOLATIONS = ("world", "world", "process")
_CONCURRENCIES = (1, 1, 2, None)
_UNRESTS = (0.0, 0.0, 0.02, 0.1)
# Decades of seconds: within which things are done to the cluster, from its beginning or from a
# step's; from one thing of a series to the next; and that a slow process takes for a step.
_AT, _AFTER, _BETWEEN, _STEPS = (-4.0, 1.0), (-5.0, -1.0), (-4.5, -2.0), (-5.0, -2.5)
_MOST_IN_SERIES = 60
FROM_BEGINNING = -1


class Step(NamedTuple):
    """Something that a process does: the name of a function in `acts`, and its arguments."""

    actor: int
    act: str
    args: tuple[Any, ...]
    number: int = 0

    def __str__(self) -> str:
        return f"{self.number}, actor {self.actor}: {self.act}{self.args}"


class Blow(NamedTuple):
    """Something that is done to the cluster; `_Play._strike` knows how."""

    at: float
    what: str
    args: tuple[Any, ...]
    step: int = FROM_BEGINNING  # the number of the step from whose beginning the time counts

    def __str__(self) -> str:
        since = "" if self.step == FROM_BEGINNING else f" after step {self.step}"
        return f"at {self.at:.6f}{since}: {self.what}{self.args}"


class Program(NamedTuple):
    """A program, and the cluster that it is for."""

    seed: int
    rough: bool
    nodes: int
    worlds: int
    isolation: str
    concurrency: int | None
    unrest: float
    actors: tuple[int, ...]  # the process of each
    steps: tuple[Step, ...]
    blows: tuple[Blow, ...]

    def __str__(self) -> str:
        lines = [
            f"{'rough ' * self.rough}seed {self.seed}: {self.nodes} processes, "
            f"{self.worlds} worlds (isolation={self.isolation!r}), concurrency={self.concurrency}, "
            f"unrest={self.unrest}; actors in processes {list(self.actors)}",
            *map(str, self.steps),
            *map(str, self.blows),
        ]
        return "\n  ".join(lines)


def random_program(seed: int, *, rough: bool = False) -> Program:
    """Make the program of a seed.

    Args:
        seed: Decides what is in it.
        rough: Interrupt in series, aimed at workers that are busy, and let processes take their
            time for each step, so that much can come between.
    """
    return _Writer(seed, rough).program()


class _Writer:
    """Writes one program."""

    def __init__(self, seed: int, rough: bool) -> None:
        self._seed = seed
        self._rough = rough
        self._chance = random.Random(f"swarm {seed}").random
        self._tokens = 0
        self._busy: list[tuple[int, int]] = []  # steps that do much on a worker, and which
        self._aim = 0  # the worker that is mostly meant by the next blow

    def _below(self, n: int) -> int:
        return int(self._chance() * n)

    def _one_of(self, choices: Sequence[T]) -> T:
        return choices[self._below(len(choices))]

    def _seconds(self, most: float) -> float:
        return round(self._chance() ** 3 * most, 4)

    def _some(self, choices: Sequence[T], least: int = 1) -> tuple[T, ...]:
        left, count = list(choices), least + self._below(len(choices) - least + 1)
        return tuple(left.pop(self._below(len(left))) for _ in range(count))

    def _few(self, choices: Sequence[_Write]) -> Sequence[_Write]:
        """Choose a few kinds, mostly: alone they meet each other more often than among all."""
        return choices if self._chance() < 0.3 else self._some(choices)[: 1 + self._below(4)]

    def _token(self) -> int:
        self._tokens += 1
        return self._tokens

    def program(self) -> Program:
        self._nodes = 8 + self._below(5) if self._chance() < 0.15 else 3 + self._below(5)
        worlds = 1 + self._below(2)
        self._pids = range(1, self._nodes + 1)
        self._workers = range(2, self._nodes + 1)
        self._acts = self._few(_ACTS)
        actors = (1, *(self._one_of(self._pids) for _ in range(self._below(4))))
        self._count = 1 + self._below(14)
        steps = [self._step(self._below(len(actors)), number) for number in range(self._count)]
        return Program(
            self._seed,
            self._rough,
            self._nodes,
            worlds,
            self._one_of(_ISOLATIONS),
            self._one_of(_CONCURRENCIES),
            self._one_of(_UNRESTS),
            actors,
            tuple(steps),
            tuple(sorted(self._blows())),
        )

    # What processes do

    def _step(self, actor: int, number: int) -> Step:
        self._number = number
        if self._chance() < (0.35 if self._rough else 0.1):
            inner = tuple(self._act() for _ in range(1 + self._below(20 if self._rough else 5)))
            pid = self._one_of(self._workers)
            self._busy.append((number, pid))
            return Step(actor, "elsewhere", (pid, inner), number)
        return Step(actor, *self._act(), number)

    def _act(self) -> tuple[str, tuple[Any, ...]]:
        write = self._one_of(self._acts)
        return write.__name__.removeprefix("_write_"), write(self)

    def _write_call(self) -> tuple[Any, ...]:
        return self._one_of(self._pids), self._token()

    def _write_nested(self) -> tuple[Any, ...]:
        path = tuple(self._one_of(self._pids) for _ in range(1 + self._below(5)))
        return path, self._token()

    def _write_doze(self) -> tuple[Any, ...]:
        return self._one_of(self._pids), self._seconds(5.0), self._token(), self._chance() < 0.5

    def _write_fail(self) -> tuple[Any, ...]:
        return self._one_of(self._pids), self._token()

    def _write_many(self) -> tuple[Any, ...]:
        calls = [
            (self._one_of(self._pids), self._seconds(1.0), self._token())
            for _ in range(1 + self._below(6))
        ]
        return tuple(calls), self._chance() < 0.5

    def _write_cancel(self) -> tuple[Any, ...]:
        return self._one_of(self._pids), self._token(), self._token()

    def _write_promise(self) -> tuple[Any, ...]:
        return self._one_of(self._pids), self._one_of(self._pids), self._token()

    def _write_forward(self) -> tuple[Any, ...]:
        return self._one_of(self._pids), self._one_of(self._pids), self._token()

    def _write_give_up(self) -> tuple[Any, ...]:
        return self._one_of(self._pids), self._seconds(2.0), self._seconds(2.0), self._token()

    def _write_map(self) -> tuple[Any, ...]:
        sizes = ("auto", 1, 3)
        return self._below(30), self._one_of(sizes), self._seconds(0.5), self._chance() < 0.3

    def _write_reduce(self) -> tuple[Any, ...]:
        return (self._token(),)

    def _write_everywhere(self) -> tuple[Any, ...]:
        return (self._token(),)

    def _write_loop(self) -> tuple[Any, ...]:
        return (self._below(50),)

    def _write_broadcast(self) -> tuple[Any, ...]:
        return self._one_of(self._pids), self._token()

    def _write_channel(self) -> tuple[Any, ...]:
        putters = [
            (self._one_of(self._pids), tuple(self._token() for _ in range(self._below(8))))
            for _ in range(1 + self._below(3))
        ]
        takers = [
            (self._one_of(self._pids), self._below(9), self._seconds(1.0))
            for _ in range(1 + self._below(3))
        ]
        self._note_busy(takers[0][0])
        return self._one_of(self._pids), self._below(4), tuple(putters), tuple(takers)

    def _write_lend(self) -> tuple[Any, ...]:
        borrowers = tuple(self._one_of(self._pids) for _ in range(1 + self._below(4)))
        self._note_busy(borrowers[0])
        return self._some(self._workers), borrowers, 1 + self._below(5), self._seconds(0.1)

    def _write_hold(self) -> tuple[Any, ...]:
        return self._one_of(self._pids), self._token()

    def _write_late(self) -> tuple[Any, ...]:
        return self._one_of(self._pids), self._seconds(0.1), self._token()

    def _write_to_itself(self) -> tuple[Any, ...]:
        tokens = tuple(self._token() for _ in range(1 + self._below(6)))
        return self._one_of(self._pids), tokens

    def _write_call_back(self) -> tuple[Any, ...]:
        first, second = self._token(), self._token()
        return self._one_of(self._pids), self._one_of(self._pids), first, second

    def _write_pool(self) -> tuple[Any, ...]:
        tokens = tuple(self._token() for _ in range(1 + self._below(5)))
        return self._some(self._workers), tokens, self._seconds(0.5)

    def _note_busy(self, pid: int) -> None:
        if self._rough and pid != 1:
            self._busy.append((self._number, pid))

    # What is done to them

    def _blows(self) -> list[Blow]:
        among = (_BLOWS, _INTERRUPTING, _INTERRUPTING, _ENDING) if self._rough else (_BLOWS,)
        writers = self._few(self._one_of(among))
        blows = []
        if (
            self._rough and self._chance() < 0.6
        ):  # else all that a process does takes no time: nothing comes between
            for pid in self._some(self._pids):
                blows.append(Blow(0.0, "slow", (pid, round(self._moment(_STEPS), 6))))
        for _ in range(self._below(7)):
            write = self._one_of(writers)
            at, step, count, between = self._moment(_AT), FROM_BEGINNING, 1, 0.0
            self._aim = 0
            if self._busy and self._chance() < 0.6:
                at = self._moment(_AFTER)
                step, self._aim = self._one_of(self._busy)
            elif self._chance() < 0.5:
                at, step = self._moment(_AFTER), self._below(self._count)
                self._aim = self._one_of(self._workers)
            if self._rough and write in _IN_SERIES and self._chance() < 0.6:
                count, between = 1 + self._below(_MOST_IN_SERIES), self._moment(_BETWEEN)
            for _ in range(count):
                what = write.__name__.removeprefix("_write_")
                blows.append(Blow(round(at, 6), what, write(self), step))
                at += 2 * self._chance() * between
        return blows

    def _moment(self, decades: tuple[float, float]) -> float:
        """Choose seconds, from each decade equally often."""
        first, last = decades
        return float(10.0 ** (first + (last - first) * self._chance()))

    def _write_kill(self) -> tuple[Any, ...]:
        return (self._one_of(self._workers),)

    def _write_interrupt(self) -> tuple[Any, ...]:
        return (self._aim,) if self._aim and self._chance() < 0.8 else self._some(self._workers)

    def _write_sigint(self) -> tuple[Any, ...]:
        return (self._aim if self._aim and self._chance() < 0.8 else self._one_of(self._workers),)

    def _write_ctrl_c(self) -> tuple[Any, ...]:
        return ()

    def _write_stop(self) -> tuple[Any, ...]:
        return self._one_of(self._workers), self._seconds(5.0)

    def _write_partition(self) -> tuple[Any, ...]:
        return self._some(self._workers), self._seconds(5.0)

    def _write_slow(self) -> tuple[Any, ...]:
        return self._one_of(self._pids), self._seconds(0.05)

    def _write_delay(self) -> tuple[Any, ...]:
        return (self._seconds(0.5),)

    def _write_remove(self) -> tuple[Any, ...]:
        return (self._one_of(self._workers),)

    def _write_join(self) -> tuple[Any, ...]:
        return (1 + self._below(2),)


_Write = Callable[[_Writer], tuple[Any, ...]]
_ACTS: tuple[_Write, ...] = (
    _Writer._write_call,
    _Writer._write_nested,
    _Writer._write_doze,
    _Writer._write_fail,
    _Writer._write_many,
    _Writer._write_cancel,
    _Writer._write_promise,
    _Writer._write_forward,
    _Writer._write_give_up,
    _Writer._write_map,
    _Writer._write_reduce,
    _Writer._write_everywhere,
    _Writer._write_loop,
    _Writer._write_broadcast,
    _Writer._write_channel,
    _Writer._write_pool,
    _Writer._write_lend,
    _Writer._write_hold,
    _Writer._write_late,
    _Writer._write_to_itself,
    _Writer._write_call_back,
)
_BLOWS: tuple[_Write, ...] = (
    _Writer._write_kill,
    _Writer._write_interrupt,
    _Writer._write_sigint,
    _Writer._write_ctrl_c,
    _Writer._write_stop,
    _Writer._write_partition,
    _Writer._write_slow,
    _Writer._write_delay,
    _Writer._write_remove,
    _Writer._write_join,
)
_IN_SERIES = (_Writer._write_interrupt, _Writer._write_sigint, _Writer._write_ctrl_c)
_INTERRUPTING: tuple[_Write, ...] = (*_IN_SERIES, _Writer._write_slow, _Writer._write_delay)
_ENDING: tuple[_Write, ...] = tuple(write for write in _BLOWS if write not in _IN_SERIES)
