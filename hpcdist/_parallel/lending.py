"""The owner's side of a worker pool: who is free, who waits, who has borrowed."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hpcdist import _errors
from hpcdist._runtime import references
from hpcdist._runtime.controls import POOL
from hpcdist._runtime.node import node, unpack_head
from hpcdist._transport.router import Peer
from hpcdist._wire import codec
from hpcdist._wire.frames import FAILED, OK, Buffer


class Taker:
    """A take, or a wait, that has not had its turn."""

    def __init__(self, done: Callable[[int], None], holder: int, ident: int, takes: bool) -> None:
        self.done = done  # called with the worker; with 0 if there can be none
        self.holder = holder
        self.ident = ident
        self.takes = takes


class State:
    """The members of a pool, those that are free, and who waits for one."""

    def __init__(self, pids: Iterable[int], *, is_default: bool = False) -> None:
        self._lock = threading.Lock()  # guards all below
        self._members: dict[int, None] = dict.fromkeys(pids)
        self._free = deque(self._members)
        self._takers: deque[Taker] = deque()
        self._held: list[tuple[int, int, int]] = []  # (holder, the take's number, worker)
        self._is_default = is_default

    def _tidy(self) -> None:
        """Forget members that have left the cluster; the default pool also those that leave."""
        if self._is_default:
            left = [p for p in self._members if p not in node.members.living]
        else:
            left = [p for p in self._members if p in node.members.gone]
        for pid in left:
            del self._members[pid]
            if pid in self._free:
                self._free.remove(pid)

    def _serve(self) -> list[tuple[Taker, int]]:
        """Give free workers to those that wait; return whom to tell what."""
        told: list[tuple[Taker, int]] = []
        self._tidy()
        while self._takers:
            while self._free and not _lives(self._free[0]):
                self._members.pop(self._free.popleft(), None)
            taker = self._takers[0]
            if self._free:
                pid = self._free[0]
                if taker.takes:
                    self._free.popleft()
                    self._held.append((taker.holder, taker.ident, pid))
            elif self._members:
                break
            else:
                pid = 1 if self._is_default else 0
            told.append((self._takers.popleft(), pid))
        return told

    def _tell(self, told: Sequence[tuple[Taker, int]]) -> None:
        for taker, pid in told:
            taker.done(pid)
        _changed()

    def start(self, taker: Taker) -> None:
        """Let somebody have a worker, now or later."""
        with self._lock:
            self._takers.append(taker)
            told = self._serve()
        self._tell(told)

    def withdraw(self, holder: int, ident: int, *, give_back: bool = False) -> bool:
        """Take a waiting take back; tell whether it was still waiting."""
        told: list[tuple[Taker, int]] = []
        with self._lock:
            for taker in self._takers:
                if taker.holder == holder and taker.ident == ident:
                    self._takers.remove(taker)
                    return True
            if give_back:
                for entry in self._held:
                    if entry[:2] == (holder, ident):
                        self._held.remove(entry)
                        told = self._return(entry[2])
                        break
        self._tell(told)
        return False

    def push(self, pid: int) -> None:
        """Add a worker."""
        with self._lock:
            told = []
            if pid not in self._members:
                self._members[pid] = None
                told = self._return(pid)
        self._tell(told)

    def _return(self, pid: int) -> list[tuple[Taker, int]]:
        if pid in self._members and pid not in self._free:
            self._free.append(pid)
        return self._serve()

    def put(self, pid: int, holder: int) -> None:
        """Take a worker back that was lent; one that is no member is ignored."""
        with self._lock:
            mine = [e for e in self._held if e[2] == pid]
            for entry in sorted(mine, key=lambda e: e[0] != holder)[:1]:
                self._held.remove(entry)
            told = self._return(pid)
        self._tell(told)

    def lost(self, pid: int) -> None:
        """Take note of a death: of a member, or of one who had borrowed or waits."""
        with self._lock:
            if pid in self._members:
                del self._members[pid]
                if pid in self._free:
                    self._free.remove(pid)
            self._takers = deque(t for t in self._takers if t.holder != pid)
            borrowed = [e for e in self._held if e[0] == pid]
            told = []
            for entry in borrowed:
                self._held.remove(entry)
                told += self._return(entry[2])
            told += self._serve()
        self._tell(told)

    def isready(self) -> bool:
        """Tell whether a take would be served at once."""
        with self._lock:
            self._tidy()
            ready = any(_lives(p) for p in self._free)
            return ready or (self._is_default and not self._members)

    def workers(self) -> list[int]:
        """List the members."""
        with self._lock:
            self._tidy()
            return sorted(self._members) or ([1] if self._is_default else [])

    def size(self) -> int:
        """Count the members."""
        return len(self.workers())

    def usable(self) -> list[int]:
        """List the members nobody has taken; all, if all are taken."""
        with self._lock:
            self._tidy()
            taken = {e[2] for e in self._held}
            members = sorted(self._members)
        free = [p for p in members if p not in taken and _lives(p)]
        return free or [p for p in members if _lives(p)]


def _lives(pid: int) -> bool:
    return pid == 1 or pid in node.members.living


_states: weakref.WeakSet[State] = weakref.WeakSet()
watchers: list[Callable[[], None]] = []  # who wants to know that some pool has changed


def _changed() -> None:
    for fn in watchers:
        fn()


def state_of(ref: tuple[int, int]) -> State | None:
    entry = references.owned.get(ref)
    return entry.value if entry is not None and isinstance(entry.value, State) else None


def own(ref: tuple[int, int], state: State) -> None:
    references.count(ref, node.me, 1, lambda: state)
    _states.add(state)


def _on_death(pid: int) -> None:
    for state in list(_states):
        state.lost(pid)


node.on_death.append(_on_death)


@node.control(POOL)
def _on_pool(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    (ref, name, arg), _ = unpack_head(body)
    state = state_of(ref)
    if state is None:
        if ident:
            error = _errors.HpcdistError("this pool is no longer there")
            node.reply(peer, ident, FAILED, _errors.encode_error(error, node.me))
        return
    if name in ("take", "wait"):

        def done(pid: int) -> None:
            node.reply(peer, ident, OK, pid.to_bytes(8, "little"))
            node.progress.soon()

        state.start(Taker(done, peer.pid, ident, name == "take"))
        return
    value: Any = None
    if name == "put":
        state.put(arg, peer.pid)
    elif name == "withdraw":
        value = state.withdraw(peer.pid, arg)
    elif name == "abandon":
        state.withdraw(peer.pid, arg, give_back=True)
    elif name == "push":
        state.push(arg)
    else:
        value = getattr(state, name)()
    if ident:
        node.reply(peer, ident, OK, codec.dumps(value).body)
