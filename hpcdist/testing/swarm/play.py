"""Plays a program on a simulated cluster, and looks whether all is as it must be."""

from __future__ import annotations

import concurrent.futures
import gc
import heapq
import itertools
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import hpcdist
from hpcdist.testing.baton import SimulationError
from hpcdist.testing.simulation import Simulation, Task
from hpcdist.testing.swarm import acts
from hpcdist.testing.swarm.acts import Ledger, Tokens
from hpcdist.testing.swarm.leftovers import Leftovers
from hpcdist.testing.swarm.program import FROM_BEGINNING, Blow, Program, Step

_LONGEST = 600.0  # virtual seconds that a program may take
_INTERRUPTS = {"interrupt", "sigint", "ctrl_c"}
_TICK = 1e-9  # virtual seconds that make no difference
_QUIET = 30.0  # virtual seconds until all is cleared away


class Failure(NamedTuple):
    """What was wrong, and the simulation's last records."""

    seed: int
    what: str
    trace: Sequence[object]

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.what}"


class Outcome(NamedTuple):
    """How a step ended."""

    step: Step
    tokens: Tokens
    error: BaseException | None
    told: str  # the error with its traceback


def play(program: Program) -> Failure | None:
    """Play a program; return what was wrong, if something was."""
    gc.freeze()  # its collections look at its own objects alone: at all, they took half of its time
    try:
        return _played(program)
    finally:
        gc.unfreeze()


def _played(program: Program) -> Failure | None:
    try:
        sim = Simulation(
            program.nodes,
            program.seed,
            worlds=program.worlds,
            unrest=program.unrest,
            isolation=program.isolation,
            concurrency=program.concurrency,
        )
    except Exception:
        return Failure(program.seed, traceback.format_exc(), [])
    with sim:
        try:
            _Play(sim, program).run()
        except (SimulationError, acts.Wrong) as exc:
            return Failure(program.seed, str(exc), sim.trace[:])
        except Exception:
            return Failure(program.seed, traceback.format_exc(), sim.trace[:])
    return None


class _Play:
    """One program under way."""

    def __init__(self, sim: Simulation, program: Program) -> None:
        self._sim = sim
        self._program = program
        self._outcomes: list[Outcome] = []
        self._struck: set[str] = {blow.what for blow in program.blows}
        self._ended: set[int] = set()  # processes that were killed or removed
        self._due: list[tuple[float, int, Callable[[], Sequence[Task[Any]] | None]]] = []
        self._serial = itertools.count()

    def run(self) -> None:
        sim, program = self._sim, self._program
        leftovers = Leftovers(sim)
        tasks = [self._start(number, pid) for number, pid in enumerate(program.actors)]
        self._begin_blows(FROM_BEGINNING)
        self._await(tasks)
        self._judge()
        tasks.clear()
        sim.collect()
        sim.advance(_QUIET)
        sim.collect()  # what went meanwhile
        sim.advance(1.0)
        leftovers.check()

    def _start(self, number: int, pid: int) -> Task[None]:
        steps = [step for step in self._program.steps if step.actor == number]
        return self._sim.node(pid).start(self._act, steps)

    def _act(self, steps: Sequence[Step]) -> None:
        for step in steps:
            self._begin_blows(step.number)
            tokens: Tokens = []
            error: BaseException | None = None
            try:
                tokens = getattr(acts, step.act)(*step.args)
            except Exception as exc:
                error = exc
            except KeyboardInterrupt as exc:
                error = exc
            told = "" if error is None else "".join(traceback.format_exception(error))
            if error is not None:  # its frames hold what is to be let go
                error.__traceback__ = error.__context__ = error.__cause__ = None
            self._outcomes.append(Outcome(step, tokens, error, told))
            del error, tokens

    # What is done to the cluster

    def _begin_blows(self, step: int) -> None:
        """Have done, in time, what follows the beginning of a step."""
        for blow in self._program.blows:
            if blow.step == step:
                self._later(blow.at, partial(self._strike, blow))

    def _later(self, seconds: float, act: Callable[[], Sequence[Task[Any]] | None]) -> None:
        """Have something done to the cluster in so many seconds."""
        heapq.heappush(self._due, (self._sim.now + seconds, next(self._serial), act))
        self._sim.baton.stop()  # the thread outside is to look at it

    def _strike(self, blow: Blow) -> list[Task[Any]]:
        sim = self._sim
        match blow.what:
            case "kill":
                self._ended.update(blow.args)
                sim.kill(*blow.args)
            case "interrupt":
                living = [pid for pid in blow.args if not sim.has_ended(pid)]
                if living:
                    return [sim.node(1).start_beside(_interrupt, living)]
            case "sigint":
                if not sim.has_ended(*blow.args):
                    sim.press_ctrl_c(*blow.args)
            case "ctrl_c":
                sim.press_ctrl_c()
            case "stop":
                pid, seconds = blow.args
                sim.stop(pid)
                self._later(seconds, lambda: sim.go_on(pid))
            case "partition":
                pids, seconds = blow.args
                others = set(range(1, self._program.nodes + 1)) - set(pids)
                sim.partition(others, pids)
                self._later(seconds, sim.heal)
            case "slow":
                sim.slow(*blow.args)
            case "delay":
                sim.delay(0.0, *blow.args)
            case "remove":
                self._ended.update(blow.args)
                return [sim.node(1).start_beside(hpcdist.rmprocs, *blow.args)]
            case "join":
                return [sim.node(1).start_beside(hpcdist.addprocs, *blow.args)]
        return []

    def _await(self, tasks: list[Task[Any]]) -> None:
        """Run until all is done, and all is done to the cluster."""
        sim = self._sim
        end = sim.now + _LONGEST
        left = tasks
        while left or self._due:
            if self._due and self._due[0][0] <= sim.now + _TICK:
                left += heapq.heappop(self._due)[2]() or ()
            elif sim.now < end:
                soon = min(sim.now + 5.0, self._due[0][0] if self._due else end)
                sim.advance(max(0.0, soon - sim.now))
            else:
                raise acts.Wrong(f"{left[0].name} never ends:\n{sim.baton.stacks()}")
            left = [task for task in left if not task.done() and not task.process.is_dead]

    # What must be true

    def _judge(self) -> None:
        for outcome in self._outcomes:
            self._check(outcome)
        self._check_tokens()
        self._outcomes.clear()

    def _check(self, outcome: Outcome) -> None:
        error = outcome.error
        if error is None:
            return
        cause: BaseException = error
        while isinstance(cause, hpcdist.RemoteException) and cause.cause is not None:
            cause = cause.cause
        if isinstance(cause, hpcdist.CompositeException):
            for part in cause.exceptions:
                self._check(outcome._replace(error=part))
            return
        if isinstance(cause, hpcdist.ProcessExitedException) and cause.pid in self._ended:
            return
        if isinstance(cause, KeyboardInterrupt) and self._struck & _INTERRUPTS:
            return
        if isinstance(cause, concurrent.futures.CancelledError) and self._struck & _INTERRUPTS:
            return
        if _is_about_the_ended(cause, self._ended) or _is_about_the_new(cause, self._struck):
            return
        raise acts.Wrong(f"{outcome.step} has ended with\n{outcome.told}")

    def _check_tokens(self) -> None:
        """See that each call has run once, or its process has ended."""
        ran: list[int] = []
        for pid in self._sim.pids:
            ran += self._sim.node(pid).node.service(Ledger).tokens
        twice = sorted(token for token in set(ran) if ran.count(token) > 1)
        if twice:
            raise acts.Wrong(f"calls {twice} have run twice")
        for outcome in self._outcomes:
            missing = sorted(set(outcome.tokens) - set(ran))
            if missing:
                raise acts.Wrong(f"calls {missing} of {outcome.step} have never run")


def _interrupt(pids: Sequence[int]) -> None:
    try:
        hpcdist.interrupt(*pids)
    except (ValueError, hpcdist.ProcessExitedException):  # it has ended meanwhile
        pass


def _is_about_the_ended(error: object, ended: set[int]) -> bool:
    """Tell whether an error says that there is nobody left."""
    text = str(error)
    return bool(ended) and isinstance(error, RuntimeError) and "No active worker" in text


def _is_about_the_new(error: object, struck: set[str]) -> bool:
    """Tell whether a process had not heard yet of one that has joined."""
    return (
        "join" in struck
        and isinstance(error, ValueError)
        and str(error).startswith("no process with id")
    )
