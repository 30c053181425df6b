"""Makes a failing program shorter: leaves out what it fails without."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hpcdist.testing.swarm.play import Failure, play
from hpcdist.testing.swarm.program import Program

_TRIES = 200

Player = Callable[[Program], Failure | None]


def shrunk(program: Program, failure: Failure, player: Player = play) -> tuple[Program, Failure]:
    """Return the shortest program found that fails too, and how it does."""
    tries = 0
    while tries < _TRIES:
        for shorter in _shorter(program):
            tries += 1
            found = player(shorter)
            if found is not None:
                program, failure = shorter, found
                break
            if tries >= _TRIES:
                break
        else:
            break
    return program, failure


def _shorter(program: Program) -> Iterator[Program]:
    """Yield programs with some steps or blows left out: many at first, then one."""
    size = max(len(program.steps), len(program.blows)) // 2
    while size:
        for start in range(0, len(program.steps), size):
            steps = program.steps[:start] + program.steps[start + size :]
            yield program._replace(steps=steps)
        for start in range(0, len(program.blows), size):
            blows = program.blows[:start] + program.blows[start + size :]
            yield program._replace(blows=blows)
        size //= 2
    for index, step in enumerate(program.steps):
        if step.act == "elsewhere":
            pid, inner = step.args
            for k in range(len(inner)):
                shorter = step._replace(args=(pid, inner[:k] + inner[k + 1 :]))
                steps = (*program.steps[:index], shorter, *program.steps[index + 1 :])
                yield program._replace(steps=steps)
    if program.unrest:
        yield program._replace(unrest=0.0)
