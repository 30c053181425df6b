"""Faults that this repository once had, to be put back: does the swarm find them?

    $ python -m tests.old_faults --seeds 300

puts back one after the other, plays rough random programs until one fails, and prints after how
many. Each fault is a change of a few lines of today's source: what its commit mended, undone.
"""

from __future__ import annotations
import __future__

import argparse
import inspect
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

from hpcdist._collective.broadcast import Broadcasts
from hpcdist._collective.trees import Job, Root, Trees
from hpcdist._maps.pools import WorkerPool
from hpcdist._remote.calls import Calls
from hpcdist._remote.channels import Channel
from hpcdist._remote.futures import Future
from hpcdist._remote.remote_channels import RemoteChannel
from hpcdist._runtime.loop import Loop
from hpcdist._runtime.references import References
from hpcdist._runtime.running import Runner
from hpcdist._runtime.turns import Turns, _Spare
from hpcdist._transport.router import Peer
from hpcdist.testing.swarm.play import Failure, play
from hpcdist.testing.swarm.program import random_program


class Change(NamedTuple):
    """Lines of a method, and what stood in their place."""

    owner: type
    method: str
    now: str
    before: str


class Fault(NamedTuple):
    """A fault, and what puts it back."""

    commit: str  # that mended it
    what: str
    changes: tuple[Change, ...]
    seed: int | None = None  # of the first 300 programs, the one that found it last; or none does


FAULTS = (
    Fault(
        "34486dc",
        "the main thread, just woken, loses its turn where the one that wakes it is interrupted",
        (
            Change(
                Turns,
                "_wake_main",
                "idle.ready = True  # here already: an interrupt may hit us before the next line\n",
                "pass\n",
            ),
        ),
    ),
    Fault(
        "712dda1",
        "a call that is interrupted as it answers is never answered",
        (
            Change(
                Runner,
                "run",
                "except KeyboardInterrupt:  # an interrupt that came too late for the function\n"
                "            continue",
                "except KeyboardInterrupt:\n            return",
            ),
        ),
        seed=146,
    ),
    Fault(
        "354f431",
        "a share of a tree that is answered twice counts twice",
        (
            Change(
                Job,
                "done",
                "if self.own:\n",
                "if True:\n",
            ),
        ),
    ),
    Fault(
        "6fff09a",
        "an interrupt that comes late hits what its thread does next",
        (Change(_Spare, "_work_on", "self._turns.interrupts.forget(_ident())\n", "pass\n"),),
    ),
    Fault(
        "8e7cc2c",
        "a taker that is interrupted loses its item: it acknowledges too early",
        (
            Change(
                RemoteChannel,
                "_outcome",
                "if flags & REFS:\n",
                "peer.acknowledge(ident)\n            if flags & REFS:\n",
            ),
        ),
    ),
    Fault(
        "8e7cc2c",
        "a taker on the owner's own process that is interrupted loses its item",
        (
            Change(
                Channel,
                "_wait_for",
                "node.wait_out(slot, section, exc)  # done, or just being done by another thread\n",
                "raise\n",
            ),
        ),
    ),
    Fault(
        "8e7cc2c",
        "a pool loses the worker whose taker is interrupted",
        (
            Change(
                WorkerPool,
                "_wait_here",
                "state.withdraw(node.me, ident, give_back=True)",
                "state.withdraw(node.me, ident)",
            ),
        ),
        seed=124,
    ),
    Fault(
        "b94b4e5",
        "a channel whose construction is interrupted stays for ever",
        (Change(RemoteChannel, "_have_made", "slot.abandoned = self\n", "pass\n"),),
        seed=1,
    ),
    Fault(
        "57171b6",
        "the word that a value is freed overtakes the value",
        (
            Change(
                Broadcasts,
                "free",
                "ways = self._ways.pop(key, None)\n",
                "self._ways.pop(key, None)\n    ways = None\n",
            ),
        ),
        seed=32,
    ),
    Fault(
        "ece17c8",
        "a copy that outlives its freed value is counted for ever",
        (Change(References, "_count", "if ref in self._outlived:\n", "if False:\n"),),
        seed=1,
    ),
    Fault(
        "ece17c8",
        "what the dead have sent before is counted for ever",
        (
            Change(
                References,
                "_count",
                "if pid in self.node.members.gone and not buries:\n",
                "if False:\n",
            ),
        ),
    ),
    Fault(
        "9101b00",
        "the wait for orphans of a tree ends early",
        (Change(Root, "_hand_out", "self.all_in = Slot()\n        ", ""),),
    ),
    Fault(
        "d9d8334",
        "outcomes for a job that was interrupted are kept for ever",
        (Change(Trees, "expect_in_vain", "if left:\n", "if False:\n"),),
        seed=8,
    ),
    Fault(
        "32ecf33",
        "an outcome is waited for that came as its job was interrupted",
        (Change(Job, "take", "if self.ended:", "if False:"),),
    ),
    Fault(
        "9f3303a",
        "a coroutine that is interrupted as it arrives is never answered",
        (
            Change(
                Loop,
                "_cancel_all",
                "self._loop.call_soon(self._cancel, task)",
                "self._cancel(task)",
            ),
        ),
    ),
    Fault(
        "3153056",
        "a call to many that nobody waits for any more is kept for ever",
        (Change(Root, "look", "self.trees.jobs.pop(self.key, None)", "pass"),),
    ),
    Fault(
        "3153056",
        "a reference is announced, and never sent",
        (Change(Calls, "post", "with self.node.progress.interrupts.section():", "if True:"),),
    ),
    Fault(
        "3153056",
        "a message that an interrupt comes behind stays until the next one",
        (
            Change(
                Peer,
                "post",
                "finally:  # an interrupt may come behind `append`: what is in there has to leave",
                "except ZeroDivisionError:\n        pass\n    else:",
            ),
        ),
    ),
    Fault(
        "496d345",
        "a call to oneself that is cancelled never ends",
        (
            Change(
                Future,
                "cancel",
                'self.value = (CANCELLED, b"", ())\n        node.complete(self)\n',
                "pass\n",
            ),
        ),
        seed=1,
    ),
)


@contextmanager
def put_back(fault: Fault) -> Iterator[None]:
    """Have a fault again for a while."""
    healthy = [(c.owner, c.method, vars(c.owner)[c.method]) for c in fault.changes]
    try:
        for change in fault.changes:
            setattr(change.owner, change.method, _changed(change))
        yield
    finally:
        for owner, name, method in healthy:
            setattr(owner, name, method)


@cache
def _changed(change: Change) -> Callable[..., Any]:
    """Compile a method with the change."""
    method = inspect.unwrap(vars(change.owner)[change.method])
    source = textwrap.dedent(inspect.getsource(method))
    if source.count(change.now) != 1:
        raise LookupError(f"{change.method} has not once, as it should: {change.now!r}")
    line = method.__code__.co_firstlineno
    code = compile(
        "\n" * (line - 1) + source.replace(change.now, change.before),
        inspect.getsourcefile(method) or "",
        "exec",
        flags=__future__.annotations.compiler_flag,
    )
    made: dict[str, Callable[..., Any]] = {}
    exec(code, method.__globals__, made)
    return made[change.method]


class Found(NamedTuple):
    """After how many seeds a fault was found."""

    seeds: int
    failure: Failure


def find(fault: Fault, most: int, first: int = 0) -> Found | None:
    """Play programs, `first` before all others, until one fails that does not without the fault."""
    for seed in sorted(range(most), key=lambda seed: seed != first):
        program = random_program(seed, rough=True)
        with put_back(fault):
            failure = play(program)
        if failure is not None and play(program) is None:
            return Found(seed + 1, failure)
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.old_faults", description=__doc__)
    parser.add_argument("--seeds", type=int, default=300, help="how many to play at the most")
    parser.add_argument("--only", default="", help="the commit that mended it")
    args = parser.parse_args(argv)
    missed = 0
    for fault in FAULTS:
        if not fault.commit.startswith(args.only):
            continue
        begin = time.monotonic()
        found = find(fault, args.seeds)
        missed += found is None
        after = "not found" if found is None else f"after {found.seeds:3} seeds"
        seconds = time.monotonic() - begin
        print(f"{fault.commit}  {after}  {fault.what}  ({seconds:.0f} s)", flush=True)
        if found is not None:
            print("    " + " | ".join(found.failure.what.splitlines()[:3])[:150], flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
