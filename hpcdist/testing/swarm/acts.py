"""What the processes of a random program do. Each act checks what it gets.

An act returns the tokens whose calls have surely run, or raises what it got; `Wrong` if that is not
what it must be.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import hpcdist
from hpcdist._runtime.node import Node, Service
from hpcdist.testing.simulation import compute

Tokens = list[int]
_PATIENCE = 60
_ABANDONED = 25.0  # seconds after which a putter has no taker any more: the process that had died


class Wrong(Exception):
    """A result is not what it must be."""


class Fault(Exception):
    """What a call of a program raises."""


class Ledger(Service):
    """What has run in a process."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.tokens: Tokens = []
        self.tries: dict[int, int] = {}


def must(got: object, wanted: object) -> None:
    """Check a result."""
    if got != wanted:
        raise Wrong(f"{got!r} came, and {wanted!r} was right")


# What runs on other processes


def echo(token: int) -> int:
    Ledger.here().tokens.append(token)
    return token


def echo_along(path: Sequence[int], token: int) -> int:
    if path:
        got: int = hpcdist.remotecall_fetch(echo_along, path[0], path[1:], token)
        return got
    return echo(token)


def echo_late(seconds: float, token: int) -> int:
    hpcdist.sleep(seconds)
    return echo(token)


def echo_busy(seconds: float, token: int) -> int:
    compute(seconds)
    return echo(token)


async def echo_asleep(seconds: float, token: int) -> int:
    import asyncio

    await asyncio.sleep(seconds)
    return echo(token)


def fault(token: int) -> None:
    echo(token)
    raise Fault(token)


def put_into(future: hpcdist.Future, token: int) -> None:
    future.put(echo(token))


def fetch_it(future: hpcdist.Future) -> Any:
    return future.fetch()


def square_late(seconds: float, fails: bool, k: int) -> int:
    if seconds:
        hpcdist.sleep(seconds * (k % 3))
    tries = Ledger.here().tries
    tries[k] = tries.get(k, 0) + 1
    if fails and tries[k] == 1 and k % 4 == 1:
        raise Fault(k)
    return k * k


# An interrupt may come wherever a function of ours begins: hence `+=`, and what an item or a worker
# is in is assigned at once.


def put_all(channel: Any, tokens: Sequence[int]) -> Tokens:
    put, ran = list[int](), Ledger.here().tokens
    for token in tokens:
        try:
            channel.put(token, timeout=_ABANDONED)
            put += [token]
            ran += [token]
        except KeyboardInterrupt as exc:
            if getattr(exc, "__notes__", ()):  # whether it has been put is not known
                raise
    return put


def take_some(channel: Any, count: int, timeout: float) -> Tokens:
    taken = list[int]()
    for _ in range(count):
        try:
            item = channel.take(timeout=timeout)
            taken += [item]
        except (TimeoutError, KeyboardInterrupt):
            pass
    return taken


def borrow(lender: hpcdist.WorkerPool, times: int, seconds: float) -> None:
    for _ in range(times):
        pid = 0
        try:
            pid = lender.take(timeout=_PATIENCE)
            hpcdist.sleep(seconds)
        except KeyboardInterrupt:
            pass
        while pid:
            try:
                lender.put(pid)
                pid = 0
            except KeyboardInterrupt:
                pass


class Late:
    """A result that takes its time to be pickled: an interrupt comes too late for its call."""

    def __init__(self, seconds: float, token: int) -> None:
        self._seconds = seconds
        self._token = token

    def __int__(self) -> int:  # where it was a call to oneself
        return self._token

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        hpcdist.sleep(self._seconds)
        return int, (self._token,)


def make_late(seconds: float, token: int) -> Late:
    echo(token)
    return Late(seconds, token)


def call_oneself(tokens: Sequence[int]) -> Tokens:
    ran = list[int]()
    for token in tokens:
        try:
            got = hpcdist.remotecall_fetch(echo, hpcdist.myid(), token)
            ran += [got]
        except KeyboardInterrupt:
            pass
        except hpcdist.RemoteException as exc:
            if not is_interrupt(exc):
                raise
    return ran


def call_back_there(pid: int, first: int, second: int) -> Any:
    """Have a callback call, and say how that ended."""
    ended = hpcdist.Channel(1)

    def call_second(_: object) -> None:
        try:
            told: object = hpcdist.remotecall_fetch(echo, pid, second)
        except KeyboardInterrupt:
            told = "an interrupt, which is not for callbacks"
        except Exception as exc:
            told = exc
        ended.put(told)

    hpcdist.remotecall(echo_late, pid, 0.001, first).add_done_callback(call_second)
    while True:
        try:
            return ended.take(timeout=_PATIENCE)
        except KeyboardInterrupt:
            pass


def is_interrupt(error: BaseException | None) -> bool:
    """Tell whether an interrupt is at the bottom of an error."""
    while isinstance(error, hpcdist.RemoteException):
        error = error.cause
    if isinstance(error, hpcdist.CompositeException):
        return all(is_interrupt(part) for part in error.exceptions)
    return isinstance(error, KeyboardInterrupt)


def do_all(steps: Sequence[tuple[str, tuple[Any, ...]]]) -> Tokens:
    """Do one act after the other, also where an interrupt breaks one off."""
    done = list[int]()
    for act, args in steps:
        try:
            tokens = globals()[act](*args)
            done += tokens
        except KeyboardInterrupt:
            pass
        except (hpcdist.RemoteException, hpcdist.CompositeException) as exc:
            if not is_interrupt(exc):
                raise
    return done


# Acts


def call(pid: int, token: int) -> Tokens:
    must(hpcdist.remotecall_fetch(echo, pid, token), token)
    return [token]


def nested(path: Sequence[int], token: int) -> Tokens:
    must(hpcdist.remotecall_fetch(echo_along, path[0], path[1:], token), token)
    return [token]


def doze(pid: int, seconds: float, token: int, asynchronously: bool) -> Tokens:
    f: Callable[..., Any] = echo_asleep if asynchronously else echo_late
    must(hpcdist.remotecall_fetch(f, pid, seconds, token), token)
    return [token]


def fail(pid: int, token: int) -> Tokens:
    try:
        hpcdist.remotecall_fetch(fault, pid, token)
    except Fault:
        return [token]
    raise Wrong("a call that raises has returned")


def many(calls: Sequence[tuple[int, float, int]], backwards: bool) -> Tokens:
    futures = [hpcdist.remotecall(echo_busy if one[-1] % 2 else echo_late, *one) for one in calls]
    if backwards:
        futures.reverse()
    wanted = [token for _, _, token in calls]
    got = [future.fetch() for future in futures]
    must(sorted(got), wanted)
    return wanted


def cancel(pid: int, first: int, second: int) -> Tokens:
    future = hpcdist.remotecall(echo_busy, pid, 0.1, first)
    other = hpcdist.remotecall(echo, pid, second)
    cancelled = other.cancel()
    must(future.fetch(), first)
    must(other.cancelled(), cancelled)
    if cancelled:
        return [first]
    must(other.fetch(), second)
    return [first, second]


def promise(owner: int, putter: int, token: int) -> Tokens:
    future = hpcdist.Future(owner)
    done = hpcdist.remotecall(put_into, putter, future, token)
    done.fetch()
    must(future.fetch(), token)
    return [token]


def forward(runner: int, fetcher: int, token: int) -> Tokens:
    future = hpcdist.remotecall(echo_late, runner, 0.05, token)
    must(hpcdist.remotecall_fetch(fetch_it, fetcher, future), token)
    return [token]


def give_up(pid: int, seconds: float, patience: float, token: int) -> Tokens:
    future = hpcdist.remotecall(echo_late, pid, seconds, token)
    try:
        must(future.fetch(timeout=patience), token)
    except TimeoutError:
        must(future.fetch(), token)
    return [token]


def map(count: int, size: Any, seconds: float, fails: bool) -> Tokens:
    delays = [0.1] * 20 if fails else ()
    got = hpcdist.pmap(
        square_late,
        [seconds] * count,
        [fails] * count,
        range(count),
        batch_size=size,
        retry_delays=delays,
    )
    must(got, [k * k for k in range(count)])
    return []


def reduce(token: int) -> Tokens:
    pids = hpcdist.workers()
    must(hpcdist.reduce(operator.add, hpcdist.myid, pids=pids), sum(pids))
    return []


def everywhere(token: int) -> Tokens:
    got = hpcdist.everywhere.call(hpcdist.myid)
    must(got, {pid: pid for pid in got})
    return []


def loop(count: int) -> Tokens:
    total = hpcdist.distributed(range(count), operator.add, init=0)
    must(total(operator.pos), sum(range(count)))
    return []


def broadcast(pid: int, token: int) -> Tokens:
    with hpcdist.bcast([token] * 3) as value:
        must(hpcdist.remotecall_fetch(sum, pid, value), 3 * token)
    return []


def pool(pids: Sequence[int], tokens: Sequence[int], seconds: float) -> Tokens:
    lender = hpcdist.WorkerPool(list(pids))
    try:
        futures = [hpcdist.remotecall(echo_late, lender, seconds, token) for token in tokens]
        must([future.fetch() for future in futures], list(tokens))
    finally:
        all_come_back(lender)
    return list(tokens)


def all_come_back(lender: hpcdist.WorkerPool) -> None:
    """See that a pool gets back what it has lent, whatever has come between."""
    taken = list[int]()
    while True:
        try:
            if len(taken) >= len(lender.workers()):
                return
            pid = lender.take(timeout=_PATIENCE)
            taken += [pid]
        except KeyboardInterrupt:
            continue
        except RuntimeError:  # all have died
            return
        except TimeoutError:
            if len(taken) < len(lender.workers()):
                raise Wrong("a pool never gets back a worker that it has lent") from None


def elsewhere(pid: int, steps: Sequence[tuple[str, tuple[Any, ...]]]) -> Tokens:
    tokens: Tokens = hpcdist.remotecall_fetch(do_all, pid, steps)
    return tokens


def lend(pids: Sequence[int], borrowers: Sequence[int], times: int, seconds: float) -> Tokens:
    lender = hpcdist.WorkerPool(list(pids))
    futures = [hpcdist.remotecall(borrow, pid, lender, times, seconds) for pid in borrowers]
    for future in futures:
        future.fetch()
    all_come_back(lender)
    return []


def hold(owner: int, token: int) -> Tokens:
    """Leave a channel to the count of its references."""
    made = hpcdist.RemoteChannel(1, owner)
    made.put(token)
    must(made.take(), token)
    return []


def late(pid: int, seconds: float, token: int) -> Tokens:
    must(int(hpcdist.remotecall_fetch(make_late, pid, seconds, token)), token)
    return [token]


def to_itself(pid: int, tokens: Tokens) -> Tokens:
    ran: Tokens = hpcdist.remotecall_fetch(call_oneself, pid, tokens)
    return ran


def call_back(pid: int, other: int, first: int, second: int) -> Tokens:
    told = hpcdist.remotecall_fetch(call_back_there, pid, other, first, second)
    if isinstance(told, Exception):
        raise told
    must(told, second)
    return [second]


def channel(
    owner: int,
    size: int,
    putters: Sequence[tuple[int, Tokens]],
    takers: Sequence[tuple[int, int, float]],
) -> Tokens:
    made = hpcdist.RemoteChannel(size, owner)
    try:
        return _through(made, putters, takers)
    finally:
        free(made)  # whoever still waits gets ChannelClosed


def free(made: hpcdist.RemoteChannel) -> None:
    """Free a channel, whatever comes between."""
    while True:
        try:
            made.free()
            return
        except KeyboardInterrupt:
            continue
        except hpcdist.ProcessExitedException:
            return


def _through(
    made: hpcdist.RemoteChannel,
    putters: Sequence[tuple[int, Tokens]],
    takers: Sequence[tuple[int, int, float]],
) -> Tokens:
    putting = [hpcdist.remotecall(put_all, pid, made, tokens) for pid, tokens in putters]
    taking = [hpcdist.remotecall(take_some, pid, made, *rest) for pid, *rest in takers]
    taken = [token for future in taking for token in future.fetch()]
    while not all(future.done() for future in putting):
        taken += take_some(made, 1, 0.2)
    wanted = [token for future in putting for token in future.fetch()]
    for _ in range(_PATIENCE):  # an item may be on its way back from a taker that has given up
        if len(taken) >= len(wanted):
            break
        taken += take_some(made, 1, 0.5)
    must(sorted(taken), sorted(wanted))
    return wanted
