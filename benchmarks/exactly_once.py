"""Maps, channels and futures under random kills, stops and interrupts: nothing lost, nothing twice.

python -m benchmarks.exactly_once [--minutes 10] [--seed N] [--isolation auto|process]

Three things go on without a pause, each on a thread of process 1, on workers that come and go:

maps        Each item comes back once, in its place. An item that has run to its end runs again only
            if it had run on a worker that was killed.
channels    Putters and takers are on workers that are hurt, the channel on one that is not. Each
            item is taken once. One that a taker had in its hands as it was killed may be gone with
            it, or be taken again by another: at most one for each that was killed.
futures     Each call has one outcome, its own, and runs once at the most. An empty future is put
            once, by one of several.

Meanwhile a worker is killed, stopped for a while, or interrupted every half second or so, and
others come in its place. The exit code is 1 if anything was lost or came twice.
"""

import argparse
import collections
import concurrent.futures
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hpcdist
from hpcdist import (
    Future,
    HpcdistError,
    ProcessExitedException,
    RemoteChannel,
    RemoteException,
    remotecall,
)
from tests.helpers import mpi_environment, mpi_flavour

_WORLD = 3  # workers that come together
_FEWEST = 4  # workers that are hurt
_ITEMS = 300
_PUT = 100
_LATE = 90.0  # seconds after which a wait is taken for lost
_HARM = ("kill", "stop", "interrupt")


# --- on workers -----------------------------------------------------------------------------------


def note(log: str, *words: object) -> None:
    """Write a line that stays, whatever befalls this process next."""
    with open(log, "ab", buffering=0) as file:
        file.write((" ".join(map(str, words)) + "\n").encode())


def work(item: int, log: str) -> int:
    """An item of a map, which an interrupt does not end."""
    seconds = 0.002 if item % 7 else 0.02
    for _ in range(100):
        try:
            time.sleep(seconds)
            break
        except KeyboardInterrupt:
            continue
    note(log, item, os.getpid())
    return item * item


def put_some(channel: Any, putter: int, first: int) -> int:
    """Put the items of a putter, from the first that was not put; return how many have been."""
    k = first
    try:
        while k < _PUT:
            channel.put((putter, k), timeout=_LATE)
            k += 1
    except KeyboardInterrupt:
        pass
    return k


def take_some(channel: Any, log: str, taker: int) -> None:
    """Take what there is; an interrupt ends that, and what was taken is noted all the same."""
    count, item = 0, None
    try:
        while True:
            item = channel.take(timeout=0.3)
            count += 1
            note(log, taker, count, *item)
            item = None
    except TimeoutError:
        pass
    except KeyboardInterrupt:
        if item is not None:  # perhaps noted already: then as the same one
            note(log, taker, count, *item)


def answer(k: int, log: str) -> int:
    """A call that takes a moment."""
    note(log, k, "began")
    time.sleep(0.001)
    return 3 * k


def put_once(future: Any, mine: int) -> bool:
    """Put a value into a future that is put once; tell whether it was this one's."""
    try:
        future.put(mine)
    except (RuntimeError, RemoteException):
        return False
    return True


# --- on process 1 ---------------------------------------------------------------------------------


class Cluster:
    """The workers of a run: one that is safe, others that are hurt and replaced."""

    def __init__(self, seed: int, isolation: str) -> None:
        self._rng = random.Random(seed)
        self._isolation = isolation
        (self.safe,) = hpcdist.addprocs(1, isolation=isolation)
        self._os_pids: dict[int, int] = {}  # of those that are hurt, dead or not
        self.killed: set[int] = set()  # numbers with the operating system
        self.renew()

    def living(self) -> list[int]:
        """Return the workers that may be hurt."""
        return [pid for pid in hpcdist.workers() if pid in self._os_pids]

    def any(self, rng: random.Random) -> int:
        """Choose a worker."""
        while not (living := self.living()):
            time.sleep(0.05)
        return rng.choice(living)

    def renew(self) -> None:
        """Bring others in place of those that have been killed."""
        while len(self.living()) < _FEWEST:
            for pid in hpcdist.addprocs(_WORLD, isolation=self._isolation):
                self._os_pids[pid] = hpcdist.remotecall_fetch(os.getpid, pid)

    def harm(self) -> str:
        """Do something to a worker; return what."""
        how, pid = self._rng.choice(_HARM), self.any(self._rng)
        os_pid = self._os_pids[pid]
        if how == "interrupt":
            hpcdist.interrupt(pid)
        elif how == "kill":
            self.killed.add(os_pid)
            os.kill(os_pid, signal.SIGKILL)
        else:
            os.kill(os_pid, signal.SIGSTOP)
            time.sleep(self._rng.uniform(0.05, 1.0))
            os.kill(os_pid, signal.SIGCONT)
        return how


class Run:
    """One run, and what it has found."""

    def __init__(self, seed: int, isolation: str, folder: Path) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []
        self._cluster = Cluster(seed, isolation)
        self._folder = folder
        self._seed = seed
        self._over = threading.Event()

    def go(self, seconds: float) -> None:
        """Run for so long, and until all has come to its end."""
        jobs = {"maps": self._map, "channels": self._channel, "futures": self._calls}
        threads = {
            name: threading.Thread(target=self._again_and_again, args=(name, job), daemon=True)
            for name, job in jobs.items()
        }
        for thread in threads.values():
            thread.start()
        end, pauses = time.monotonic() + seconds, random.Random(self._seed)
        while time.monotonic() < end and not self.faults:
            time.sleep(pauses.uniform(0.05, 0.8))
            self.counts[self._cluster.harm()] += 1
            self._cluster.renew()
        self._over.set()
        for name, thread in threads.items():
            thread.join(2 * _LATE)
            if thread.is_alive():
                self.faults.append(f"{name}: a round does not end")
        if not self.faults:
            hpcdist.shutdown()

    def _again_and_again(self, name: str, job: Callable[[random.Random, str], None]) -> None:
        rng = random.Random(f"{self._seed} {name}")
        log = self._folder / name
        while not self._over.is_set() and not self.faults:
            log.write_text("")
            try:
                job(rng, str(log))
            except Exception as exc:
                self.faults.append(f"{name}: {type(exc).__name__}: {exc}")
            self.counts[f"{name}, rounds"] += 1

    # --- maps

    def _map(self, rng: random.Random, log: str) -> None:
        pool = hpcdist.WorkerPool(self._cluster.living())
        try:
            got = hpcdist.pmap(work, range(_ITEMS), [log] * _ITEMS, pool=pool)
        except RemoteException as exc:  # interrupted before the item could catch it
            self._expect(isinstance(exc.cause, KeyboardInterrupt), f"a map: {exc}")
            self.counts["maps, interrupted"] += 1
            got = None
        except ProcessExitedException:  # all of its workers have been killed
            self.counts["maps, without workers"] += 1
            got = None
        self._expect(got in (None, [k * k for k in range(_ITEMS)]), f"a map returned {got}")
        runs: dict[int, list[int]] = {}
        for item, os_pid in _lines(log):
            runs.setdefault(item, []).append(os_pid)
        for item, os_pids in runs.items():
            twice = [os_pid for os_pid in os_pids if os_pid not in self._cluster.killed]
            self._expect(len(twice) <= 1, f"item {item} ran in {os_pids}")
            self.counts["items, run again after a death"] += len(os_pids) - 1
        self._expect(got is None or len(runs) == _ITEMS, "an item came back that has not run")
        self.counts["items"] += _ITEMS if got is not None else 0

    # --- channels

    def _channel(self, rng: random.Random, log: str) -> None:
        channel: Any = RemoteChannel(16, self._cluster.safe)
        done: dict[int, int] = {}  # how many a putter has put for certain
        lost_takers: set[int] = set()
        under_way: dict[Any, tuple[str, int]] = {}

        def put(putter: int) -> None:
            call = self._call(rng, put_some, channel, putter, done.setdefault(putter, 0))
            under_way[call] = ("put", putter)

        def take(taker: int) -> None:
            under_way[self._call(rng, take_some, channel, log, taker)] = ("take", taker)

        for k in range(3):
            put(k)
            take(1000 + k)
        takers = 1003
        while any(kind == "put" for kind, _ in under_way.values()):
            ready, _ = concurrent.futures.wait(under_way, _LATE, "FIRST_COMPLETED")
            self._expect(ready, f"nothing ends: {sorted(under_way.values())}")
            for call in ready:
                kind, who = under_way.pop(call)
                value, died = self._outcome(call)
                if kind == "take":
                    lost_takers |= {who} if died else set()
                    take(takers)
                    takers += 1
                elif died:
                    pass  # what it was putting is in the channel or not; nobody puts for it
                else:
                    done[who] = done[who] if value is None else value
                    if done[who] < _PUT:
                        put(who)
        for call in concurrent.futures.wait(under_way, _LATE).not_done:
            self._expect(False, f"a taker does not end: {under_way[call]}")
        for call, (_, who) in under_way.items():
            lost_takers |= {who} if self._outcome(call)[1] else set()
        self._drain(channel, log)
        self._judge_items(log, done, lost_takers)
        channel.free()

    def _drain(self, channel: Any, log: str) -> None:
        """Take the rest here; what a dead taker has given back may come a moment later."""
        count = 0
        patience = 2
        while patience:
            try:
                item = channel.take(timeout=0.5)
            except TimeoutError:
                patience -= 1
                continue
            count += 1
            note(log, 1, count, *item)

    def _judge_items(self, log: str, done: dict[int, int], lost_takers: set[int]) -> None:
        taken: dict[tuple[int, int], list[int]] = {}
        for taker, _, putter, k in sorted(set(_lines(log))):
            taken.setdefault((putter, k), []).append(taker)
        # One that was killed before the channel knew that it has its item: another gets that, too.
        again = [taker for takers in taken.values() if len(takers) > 1 for taker in takers]
        for item, takers in taken.items():
            twice = [taker for taker in takers if taker not in lost_takers]
            self._expect(len(twice) <= 1, f"item {item} was taken by {takers}")
        often = collections.Counter(taker for taker in again if taker in lost_takers)
        self._expect(all(n == 1 for n in often.values()), f"more than one item again: {often}")
        missing = 0
        for putter, count in done.items():
            items = {k for who, k in taken if who == putter}
            # Beyond what it is known to have put, a putter that was killed may have put more.
            missing += max([count, *(k + 1 for k in items)]) - len(items)
        self._expect(
            missing <= len(lost_takers),
            f"{missing} items lost, with {len(lost_takers)} takers killed",
        )
        self.counts["items through channels"] += len(taken)
        self.counts["items, taken again after a death"] += often.total()
        self.counts["taken along by the dead"] += missing
        self.counts["takers killed"] += len(lost_takers)

    # --- calls and futures

    def _calls(self, rng: random.Random, log: str) -> None:
        calls = [(k, self._call(rng, answer, k, log)) for k in range(60)]
        outcomes = [(k, *self._outcome(call)) for k, call in calls]
        runs = collections.Counter(int(words[0]) for words in _texts(log))
        for k, value, died in outcomes:
            self._expect(runs[k] <= 1, f"call {k} ran {runs[k]} times")
            self._expect(value in (None, 3 * k), f"call {k} returned {value}")
            self._expect(value is None or runs[k] == 1, f"call {k} returned and has not run")
            self.counts["calls, their workers killed"] += died
            self.counts["calls, interrupted"] += value is None and not died
        self.counts["calls"] += len(calls)
        future: Any = Future(self._cluster.safe)
        putters = [(k, self._call(rng, put_once, future, k)) for k in range(4)]
        results = [(k, *self._outcome(call)) for k, call in putters]
        winners = [k for k, won, _ in results if won]
        unknown = [k for k, won, _ in results if won is None]
        self._expect(len(winners) <= 1, f"{winners} all put the same future")
        if winners or future.isready():
            value = future.fetch(timeout=_LATE)
            self._expect(value in (winners or unknown), f"{value} was put, {winners} put it")
            self.counts["futures put once"] += 1
        else:
            self._expect(unknown, "nobody put a future, and all could")

    def _call(self, rng: random.Random, f: Any, *args: Any) -> Any:
        """Call a function on one of those that are hurt."""
        while True:
            try:
                return remotecall(f, self._cluster.any(rng), *args)
            except ProcessExitedException:  # between the choice and the call
                continue

    def _outcome(self, call: Any) -> tuple[Any, bool]:
        """Return what a call has returned, None if it was interrupted; and whether it died."""
        try:
            return call.fetch(timeout=_LATE), False
        except ProcessExitedException:
            return None, True
        except RemoteException as exc:
            if isinstance(exc.cause, KeyboardInterrupt):
                return None, False
            raise
        except TimeoutError:
            raise HpcdistError(f"no outcome of {call} after {_LATE:g} s") from None

    def _expect(self, holds: object, text: str) -> None:
        if not holds:
            raise AssertionError(text)


def _texts(log: str) -> list[list[str]]:
    return [line.split() for line in Path(log).read_text().splitlines()]


def _lines(log: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, words)) for words in _texts(log)]


def main() -> int:
    """Run, and print the figures; 1 if anything was lost or came twice."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exactly_once")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10_000))
    parser.add_argument("--isolation", choices=["auto", "process"], default="auto")
    options = parser.parse_args()
    os.environ.update(mpi_environment())
    folder = Path(tempfile.mkdtemp(prefix="hx-"))
    print(f"{mpi_flavour()}, isolation {options.isolation}, seed {options.seed}", flush=True)
    try:
        run = Run(options.seed, options.isolation, folder)
        run.go(60 * options.minutes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for name, count in sorted(run.counts.items()):
        print(f"{name:34}{count:>10,}")
    for fault in run.faults:
        print(f"WRONG: {fault}")
    print("something was lost, or came twice" if run.faults else "nothing lost, nothing twice")
    sys.stdout.flush()
    return int(bool(run.faults))


if __name__ == "__main__":
    sys.exit(main())
