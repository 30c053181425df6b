"""The owner's side of a worker pool: its free workers, its waiters and its borrowers."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hpcdist import _errors
from hpcdist._runtime.node import Mail, Node, Service, on
from hpcdist._runtime.references import References
from hpcdist._wire import codec
from hpcdist._wire.frames import FAILED, OK
from hpcdist._wire.messages import OperatePool, RefId


class Taker:
    """A take, or a wait, that has not had its turn."""

    def __init__(self, done: Callable[[int], None], holder: int, ident: int, takes: bool) -> None:
        self.done = done  # called with the worker; with 0 if there can be none
        self.holder = holder
        self.ident = ident
        self.takes = takes


class State:
    """The members of a pool, the free ones, and the takers that wait for one.

    Args:
        pids: The members.
        node: The process that owns it.
        changed: Called after each change.
        is_default: Whether it is the pool of all workers.
        tag: Of the workers that it has, also of those that join later.
    """

    def __init__(
        self,
        pids: Iterable[int],
        node: Node,
        changed: Callable[[], None],
        *,
        is_default: bool = False,
        tag: str = "",
    ) -> None:
        self.tag = tag
        self._cluster = node.members
        self._changed = changed
        self._lock = node.machine.lock()  # guards all below
        self._members: dict[int, None] = dict.fromkeys(pids)
        self._free = deque(self._members)
        self._takers: deque[Taker] = deque()
        self._held: list[tuple[int, int, int]] = []  # (holder, the take's number, worker)
        self._is_default = is_default
        self._follows = is_default or bool(tag)  # workers that join enter it by themselves
        self._last_left = 0  # the member that left the cluster last

    def _tidy(self) -> None:
        """Forget members that have left the cluster.

        A pool that workers enter by themselves forgets those that are leaving, too.
        """
        if self._follows:
            left = [p for p in self._members if p not in self._cluster.living]
        else:
            left = [p for p in self._members if p in self._cluster.gone]
        for pid in left:
            self._leave(pid)

    def _leave(self, pid: int) -> None:
        if pid in self._members:
            del self._members[pid]
            self._last_left = pid
        if pid in self._free:
            self._free.remove(pid)

    def _serve(self) -> list[tuple[Taker, int]]:
        """Give free workers to takers that wait; return who gets which."""
        told: list[tuple[Taker, int]] = []
        self._tidy()
        while self._takers:
            while self._free and not self._lives(self._free[0]):
                self._leave(self._free[0])
            taker = self._takers[0]
            if self._free:
                pid = self._free[0]
                if taker.takes:
                    self._free.popleft()
                    self._held.append((taker.holder, taker.ident, pid))
            elif self._members or (self._follows and self._cluster.awaits(self.tag)):
                break
            else:
                pid = 1 if self._is_default else 0
            told.append((self._takers.popleft(), pid))
        return told

    def _hand_out(self, told: Sequence[tuple[Taker, int]]) -> None:
        for taker, pid in told:
            taker.done(pid)
        self._changed()

    def start(self, taker: Taker) -> None:
        """Let somebody have a worker, now or later."""
        with self._lock:
            self._takers.append(taker)
            told = self._serve()
        self._hand_out(told)

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
        self._hand_out(told)
        return False

    def push(self, pid: int) -> None:
        """Add a worker."""
        with self._lock:
            told = []
            if pid not in self._members:
                self._members[pid] = None
                told = self._return(pid)
        self._hand_out(told)

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
        self._hand_out(told)

    def look(self) -> None:
        """Answer the takers that can be answered now."""
        with self._lock:
            told = self._serve()
        self._hand_out(told)

    def lost(self, pid: int) -> None:
        """Take note of a death: of a member, or of one who had borrowed or waits."""
        with self._lock:
            self._leave(pid)
            self._takers = deque(t for t in self._takers if t.holder != pid)
            borrowed = [e for e in self._held if e[0] == pid]
            told = []
            for entry in borrowed:
                self._held.remove(entry)
                told += self._return(entry[2])
            told += self._serve()
        self._hand_out(told)

    def isready(self) -> bool:
        """Tell whether a take would be served at once."""
        with self._lock:
            self._tidy()
            ready = any(self._lives(p) for p in self._free)
            return ready or (self._is_default and not self._members and not self._cluster.awaited)

    def workers(self) -> list[int]:
        """List the members."""
        with self._lock:
            self._tidy()
            return sorted(self._members) or ([1] if self._is_default else [])

    def size(self) -> int:
        """Count the members."""
        return len(self.workers())

    def last_left(self) -> int:
        """Name the member that left the cluster last, if none is left; 0: none ever did."""
        with self._lock:
            self._tidy()
            return 0 if self._members else self._last_left

    def usable(self) -> list[int]:
        """List the members nobody has taken; all, if all are taken."""
        with self._lock:
            self._tidy()
            taken = {e[2] for e in self._held}
            members = sorted(self._members)
        free = [p for p in members if p not in taken and self._lives(p)]
        return free or [p for p in members if self._lives(p)]

    def waited_for(self) -> tuple[str, int, int] | None:
        """Tell the tag, how many wait for a worker, and how many have one.

        None: nobody waits, or no worker that joins would enter by itself.
        """
        with self._lock:
            if not (self._follows and self._takers):
                return None
            return self.tag, len(self._takers), len(self._held)

    def _lives(self, pid: int) -> bool:
        return pid == 1 or pid in self._cluster.living


class Pools(Service):
    """The pools that this process owns."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._references = node.service(References)
        self._states: weakref.WeakValueDictionary[RefId, State] = weakref.WeakValueDictionary()
        self.watchers: list[Callable[[], None]] = []  # called when some pool has changed
        node.on_join.append(self._on_join)
        node.on_death.append(self._on_death)
        node.on_forsaken.append(self._on_forsaken)

    def own(
        self, ref: RefId, pids: Iterable[int], *, is_default: bool = False, tag: str = ""
    ) -> None:
        """Make a pool, which lives as long as it is referred to."""
        state = State(pids, self.node, self.changed, is_default=is_default, tag=tag)
        self._references.count(ref, self.node.me, 1, lambda: state)
        self._states[ref] = state
        for pid in self.node.members.tagged(tag) if tag else ():  # some may join at this moment
            state.push(pid)

    def state_of(self, ref: RefId) -> State | None:
        """Find a pool of this process; None: it has been freed."""
        entry = self._references.owned.get(ref)
        return entry.value if entry is not None and isinstance(entry.value, State) else None

    def waited_for(self) -> list[tuple[str, int, int]]:
        """Tell of each pool that workers are waited for: see `State.waited_for`."""
        return [found for state in list(self._states.values()) if (found := state.waited_for())]

    def changed(self) -> None:
        """Let those look anew who use pools: a pool, or the workers there are, have changed."""
        for fn in self.watchers:
            fn()

    def _on_join(self, pid: int) -> None:
        member = self.node.members.living.get(pid)
        for state in list(self._states.values()) if member is not None and member.tags else ():
            if state.tag and member is not None and state.tag in member.tags:
                state.push(pid)

    def _on_death(self, pid: int) -> None:
        for state in list(self._states.values()):
            state.lost(pid)

    def _on_forsaken(self) -> None:
        for state in list(self._states.values()):
            state.look()

    @on(OperatePool)
    def _on_operate_pool(self, said: OperatePool, mail: Mail) -> None:
        node, peer, ident, name, arg = self.node, mail.peer, mail.ident, said.name, said.argument
        state = self.state_of(said.ref)
        if state is None:
            if ident:
                error = _errors.HpcdistError("this pool no longer exists")
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
