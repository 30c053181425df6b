"""Batches: the worker's side of `pmap`, and functions that are sent once and kept.

A batch is an ordinary call of `run` with a part of each collection. Its items wait in a deque
from which the running thread takes on the left. When the map wants them back (the batch overruns,
another worker is idle, the map has failed) a control takes them away on the right, on the
progress side, whatever the user's function does meanwhile: both ends are atomic, so an item is
either started or handed back.

What a batch is at stands on a board in shared memory, so that a worker's death tells which item it
was running. Writing costs too much for items of a tenth of a microsecond, so these are entered a
few at a time; an item of more than a fraction of a millisecond is entered alone.
"""

from __future__ import annotations

import inspect
import mmap
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, repeat, starmap
from types import CoroutineType
from typing import Any

from hpcdist import _errors
from hpcdist._parallel import copies
from hpcdist._parallel.segments import Place
from hpcdist._runtime.controls import FORGET, TAKE_BACK
from hpcdist._runtime.node import node, unpack_head
from hpcdist._transport.router import Peer
from hpcdist._wire import codec, frames, functions
from hpcdist._wire.codec import Payload
from hpcdist._wire.frames import Buffer

Token = tuple[int, int]  # names a kept function: the process that sent it, and a number of its own

BUDGET = 0.005  # seconds of work an "auto" batch aims at
_ENTRY = 0.0002  # items of this much work together are entered on the board as one
_ENTRY_MOST = 64
_clock = time.perf_counter


# Functions that were sent once

_kept: dict[Token, Any] = {}
_forgotten: dict[Token, None] = {}  # the last ones: what names them may still be in the queue
_FORGOTTEN_MOST = 4096
_arrived = threading.Condition()  # guards both, and tells of new ones


class _Broken:
    """Stands for a function that could not be unpickled here."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class Forgotten(Exception):
    """The sender has dropped the function that a call names."""


class Unmapped(Exception):
    """The function lies in memory that cannot be opened from here: another container's, say."""


_UNMAPPED = object()  # stands for such a function


def keep(token: Token, body: Any, buffers: Sequence[Buffer], board: Any = None) -> None:
    """Take in a function for the calls that follow."""
    if board is not None:
        attach(token[0], board)
    with _arrived:
        if _kept.get(token) is _UNMAPPED:
            del _kept[token]  # with several turns: it is coming now, do not ask again
    try:
        value = codec.loads(body, buffers)
    except BaseException as exc:  # whoever calls it is told
        value = _Broken(exc)
    _keep(token, value)


def _keep(token: Token, value: Any) -> None:
    with _arrived:
        if token not in _forgotten and not (value is _UNMAPPED and token in _kept):
            _kept[token] = value
        _arrived.notify_all()


def keep_shared(token: Token, place: Place, layout: copies.Layout, board: Any) -> None:
    """Take in a function that lies in shared memory."""
    value: Any = _UNMAPPED
    copy = None
    try:
        copy = copies.mapped_copy(place, layout, ())
        attach(token[0], board)
        if token not in _forgotten:
            value = codec.loads(copy.body, [codec.copied(b) for b in copy.buffers])
    except BaseException as exc:  # whoever calls it is told
        if copy is not None or not isinstance(exc, OSError):
            value = _Broken(exc.with_traceback(None))
    del copy  # and so says that we have no view any more
    _keep(token, value)


def kept(token: Token) -> Any:
    """Give a kept function; with several turns its arrival may be going on beside us."""
    found = _kept.get(token)
    if found is None:
        with _arrived:
            _arrived.wait_for(lambda: token in _kept or token in _forgotten, 60)
            found = _kept.get(token)
    if found is None:
        raise Forgotten
    if found is _UNMAPPED:
        raise Unmapped
    if type(found) is _Broken:
        raise found.error
    return found


def forget(tokens: Sequence[Token]) -> None:
    """Drop kept functions."""
    with _arrived:
        for token in tokens:
            _kept.pop(token, None)
            _forgotten[token] = None
        while len(_forgotten) > _FORGOTTEN_MOST:
            del _forgotten[next(iter(_forgotten))]
        _arrived.notify_all()


def call_first(token: Token, f: Any, args: tuple[Any, ...], kw: dict[str, Any]) -> Any:
    """Keep a function and call it."""
    with _arrived:
        if token not in _forgotten:
            _kept[token] = f
    return f(*args, **kw)


def call_kept(token: Token, args: tuple[Any, ...], kw: dict[str, Any]) -> Any:
    """Call a kept function."""
    return kept(token)(*args, **kw)


def _on_death(pid: int) -> None:
    forget([token for token in _kept if token[0] == pid])


node.on_death.append(_on_death)


# The board

_LINE = struct.Struct("<QII")  # the batch, and the half-open range of its items that runs
_LINES = 4096
_COOKIE = 16


class Board:
    """What the batches of this process's maps are at, written by the workers of this host."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("hpcdist-board", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, _COOKIE + _LINE.size * _LINES)
        self._memory = mmap.mmap(self._fd, 0)
        cookie = os.urandom(_COOKIE)
        self._memory[:_COOKIE] = cookie
        # Another host, or another container, has a different file there, or none.
        self.address = (f"/proc/{os.getpid()}/fd/{self._fd}", cookie)

    def read(self, ident: int) -> tuple[int, int] | None:
        """Tell which items of a batch run, if the batch has said so."""
        number, first, end = _LINE.unpack_from(self._memory, _place(ident))
        return (first, end) if number == ident else None


def _place(ident: int) -> int:
    return _COOKIE + _LINE.size * (ident % _LINES)


_boards: dict[int, mmap.mmap] = {}  # by the process they belong to


def attach(pid: int, address: tuple[str, bytes]) -> None:
    """Open the board of a process, if it can be reached from here."""
    if pid in _boards:
        return
    path, cookie = address
    try:
        with open(path, "r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
    except (OSError, ValueError):
        return
    if memory[:_COOKIE] == cookie:
        _boards[pid] = memory


# Running a batch


class Work:
    """What a map does to each item."""

    def __init__(
        self, f: Callable[..., Any], on_error: Callable[[Any], Any] | None, several: bool
    ) -> None:
        self.f = f
        self.on_error = on_error
        self.several = several  # several collections: an item is a tuple of arguments

    def __reduce__(self) -> Any:
        return Work, (self.f, self.on_error, self.several)

    @property
    def is_async(self) -> bool:
        """Whether the function is a coroutine function."""
        return inspect.iscoroutinefunction(self.f)

    def guarded(self, *item: Any) -> Any:
        """Run one item; its error is `on_error`'s."""
        try:
            return self.f(*item)
        except Exception as exc:
            assert self.on_error is not None
            return self.on_error(exc)

    def mapped(self, items: Iterator[Any]) -> Iterator[Any]:
        """Run items as they are asked for."""
        f = self.f if self.on_error is None else self.guarded
        return starmap(f, items) if self.several else map(f, items)

    async def awaited(self, item: Any) -> Any:
        """Run one item of a coroutine function."""
        try:
            return await (self.f(*item) if self.several else self.f(item))
        except Exception as exc:
            if self.on_error is None:
                raise
            return self.on_error(exc)


class Outcome:
    """How a batch ended: results of its first items, then perhaps an error; the rest never ran."""

    __slots__ = ("error", "results", "seconds")

    def __init__(self) -> None:
        self.results: list[Any] = []
        self.error: BaseException | None = None
        self.seconds = 0.0


class Running:
    """The items of a batch that runs."""

    __slots__ = ("lock", "queue", "taken", "total", "unit")

    def __init__(self, columns: Sequence[Any], unit: int) -> None:
        first = columns[0]
        self.queue: deque[Any] = deque(first if len(columns) == 1 else zip(*columns, strict=False))
        self.total = len(self.queue)
        self.unit = unit
        self.lock = threading.Lock()  # guards taking away, and the count of it
        self.taken = 0

    def is_over(self, done: int) -> bool:
        """Tell whether every item was run or taken away."""
        with self.lock:
            return not self.queue and done + self.taken == self.total


_active: dict[tuple[int, int], Running] = {}  # by (caller, batch)
_steps: dict[Token, int] = {}


def perform(work: Work, token: Token, ident: int, unit: int, columns: Sequence[Any]) -> Outcome:
    """Run the items of a batch in order.

    Args:
        work: What to do.
        token: Its name; its first half is the process whose map this is.
        ident: The batch's number there.
        unit: How many items belong together: the batch ends early only between such groups.
        columns: The same part of each collection.
    """
    out = Outcome()
    key = (token[0], ident)
    running = Running(columns, unit)
    queue = running.queue
    memory, place = _boards.get(token[0]), _place(ident)
    results, mapped = out.results, work.mapped
    # No Python code of ours between two items: a tenth of a microsecond each is what this costs.
    source = map(deque.popleft, repeat(queue))
    step, done = 1 if unit > 1 else _steps.get(token, 1), 0
    start = now = _clock()
    end = start + 2 * BUDGET
    _active[key] = running
    try:
        while queue:
            many = min(step, len(queue) if unit == 1 else unit - done % unit)
            if memory is not None:
                _LINE.pack_into(memory, place, ident, done, done + many)
            results.extend(mapped(islice(source, many)))
            done += many
            before, now = now, _clock()
            if now > end and done % unit == 0:  # slower than thought: others may have the rest
                break
            if now - before > _ENTRY:
                step = max(1, step // 4)
            elif step < _ENTRY_MOST and now - before < _ENTRY / 2:
                step *= 2
    except BaseException as exc:  # the item's: it goes to the caller
        # Or ours: items were taken away while we were about to run them.
        if type(exc) is not IndexError or not running.is_over(len(results)):
            out.error = exc
    finally:
        _active.pop(key, None)
    if unit == 1:
        _steps[token] = step if out.error is None else 1
        if len(_steps) > 64:
            del _steps[next(iter(_steps))]
    out.seconds = _clock() - start
    return out


def _fed(queue: deque[Any]) -> Iterator[Any]:
    while queue:
        try:
            item = queue.popleft()
        except IndexError:  # taken away between the two lines
            return
        yield item


async def perform_async(
    work: Work, token: Token, ident: int, unit: int, columns: Sequence[Any]
) -> Outcome:
    """Run the items of a batch in order, on the event loop."""
    import asyncio  # 20 ms: not before the first map

    out = Outcome()
    key = (token[0], ident)
    running = Running(columns, unit)
    memory = _boards.get(token[0])
    start = _clock()
    _active[key] = running
    try:
        for done, item in enumerate(_fed(running.queue)):
            if memory is not None:
                _LINE.pack_into(memory, _place(ident), ident, done, done + 1)
            out.results.append(await work.awaited(item))
            if (done + 1) % unit == 0 and _clock() - start > 2 * BUDGET:
                break
    except asyncio.CancelledError:  # interrupted: the event loop tells the caller
        raise
    except BaseException as exc:  # the item's: it goes to the caller
        out.error = exc
    finally:
        _active.pop(key, None)
    out.seconds = _clock() - start
    return out


def run(token: Token, ident: int, unit: int, columns: Sequence[Any]) -> Any:
    """Run a batch for another process; return what to send back."""
    try:
        work = kept(token)
    except (Forgotten, Unmapped) as exc:
        return _cannot(exc)
    out = perform(work, token, ident, unit, columns)
    if hides_coroutines(out):
        return _awaited(work, out, token)
    return _packed(work, out, token)


def _cannot(why: Forgotten | Unmapped) -> bool | None:
    """Say that a batch could not be run: None, nobody wants it; False, send the function."""
    return False if type(why) is Unmapped else None


def hides_coroutines(out: Outcome) -> bool:
    """Tell whether the function was a coroutine function in disguise: a lambda around one, say."""
    return bool(out.results) and type(out.results[0]) is CoroutineType


async def _awaited(work: Work, out: Outcome, token: Token) -> Payload:
    await settle(work, out)
    return _packed(work, out, token)


async def settle(work: Work, out: Outcome) -> None:
    """Put what coroutines among the results return in their place."""
    pending, out.results = out.results, []
    for k, value in enumerate(pending):
        if type(value) is CoroutineType:
            try:
                value = await value
            except Exception as exc:
                if work.on_error is None:
                    out.error = exc
                    for other in pending[k + 1 :]:
                        if type(other) is CoroutineType:
                            other.close()
                    return
                value = work.on_error(exc)
        out.results.append(value)


async def run_async(token: Token, ident: int, unit: int, columns: Sequence[Any]) -> Any:
    """Run a batch of a coroutine function for another process."""
    try:
        work = kept(token)
    except (Forgotten, Unmapped) as exc:
        return _cannot(exc)
    return _packed(work, await perform_async(work, token, ident, unit, columns), token)


def _packed(work: Work, out: Outcome, token: Token) -> Payload:
    """Pickle an outcome here, where a result that cannot be pickled can still be told apart."""
    error = None if out.error is None else _errors.encode_error(out.error, node.me)
    on_board = token[0] in _boards
    try:
        return codec.dumps((out.results, error, out.seconds, on_board))
    except Exception:
        results = []
        for value in out.results:
            try:
                codec.dumps(value)
            except Exception as exc:
                if work.on_error is None:
                    error = _errors.encode_error(exc, node.me)
                    break
                value = work.on_error(exc)
            results.append(value)
        return codec.dumps((results, error, out.seconds, on_board))


# Handing items back. Called by the driver, beside the thread that runs the batch.


def take_back(caller: Peer | None, pid: int, everything: bool, idents: Sequence[int]) -> Any:
    """Take items away that have not started; return (batch, how many) for each that had some.

    Args:
        caller: Whose batches they are; None: this process's own.
        pid: Its id.
        everything: All of them; else the newest batch that waits for its turn, or half of those
            that the running one has left.
        idents: The batches, the newest first.
    """
    taken: list[tuple[int, int]] = []
    for ident in idents:
        if node.turns.withdraw(caller, ident):
            taken.append((ident, -1))
        else:
            count = _shorten((pid, ident), everything)
            if count:
                taken.append((ident, count))
        if taken and not everything:
            break
    return taken


def _shorten(key: tuple[int, int], everything: bool) -> int:
    running = _active.get(key)
    if running is None:
        return 0
    queue, unit = running.queue, running.unit
    count = 0
    with running.lock:
        left = len(queue)
        started = running.total - running.taken - left
        loose = max(0, left - (-started % unit))  # what belongs to a begun group stays with it
        groups = -(-loose // unit)
        wanted = loose if everything else loose - groups // 2 * unit
        try:
            while count < wanted:
                queue.pop()
                count += 1
        except IndexError:  # the running thread was quicker
            pass
        running.taken += count
    return count


@node.control(TAKE_BACK)
def _on_take_back(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    (everything, idents), _ = unpack_head(body)
    taken = take_back(peer, peer.pid, everything, idents)
    node.reply(peer, ident, frames.OK, codec.dumps(taken).body)


@node.control(FORGET)
def _on_forget(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    (tokens, idents), _ = unpack_head(body)
    forget(tokens)
    for token in tokens:
        call = node.turns.withdraw(peer, token[1])  # what brings it, if it has not started
        if call is not None and functions.function(call.aux) is keep_shared:
            _, place, *_ = codec.loads(call.body)
            copies.dropped.append((place[0], place[3]))
    if idents:
        take_back(peer, peer.pid, True, idents)
