"""The network of a simulation: pipes between processes, with delays and in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from hpcdist._transport.contracts import Deliver, Item
from hpcdist._wire import messages
from hpcdist._wire.frames import (
    BODY_APART,
    CALL,
    CONTROL,
    HEAD,
    HEAD_SIZE,
    OUTCOME,
    RESULT,
)
from hpcdist.testing.baton import Baton
from hpcdist.testing.records import Trace

_DELAYS = (0.00002, 0.001)  # seconds: between processes of one host, and through a busy network
_NAMES = {number: kind.__name__ for kind, number in messages.NUMBERS.items()}
_NAMES |= {messages.RELEASE: "release", messages.ACKNOWLEDGE: "acknowledge", messages.VIA: "via"}
_NAMES |= {messages.PUT_ITEM: "put item", messages.TAKE_ITEM: "take item"}
_OUTCOMES = ("", " failed", " cancelled", " kept", " ours", " waited", " closed")


class Traffic(NamedTuple):
    """What one process has sent to another."""

    messages: int = 0
    nbytes: int = 0


class Network:
    """Decides when what arrives."""

    def __init__(self, baton: Baton, trace: Trace) -> None:
        self._baton = baton
        self.trace = trace
        self.traffic: dict[tuple[int, int], Traffic] = {}
        self._delays: dict[tuple[int, int], tuple[float, float]] = {}
        self._usual = _DELAYS
        self._cut: set[tuple[int, int]] = set()
        self._held_back: list[Pipe] = []

    # What the test says

    def delay(self, low: float, high: float, pairs: Sequence[tuple[int, int]] = ()) -> None:
        """Let messages take between so many seconds: those of some pairs, or all."""
        if pairs:
            self._delays.update((pair, (low, high)) for pair in pairs)
        else:
            self._usual = (low, high)
            self._delays.clear()

    def cut(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Let nothing through between pairs of processes."""
        self._cut.update(pairs)

    def heal(self) -> None:
        """Let everything through again; what was held back goes on its way."""
        self._cut.clear()
        held_back, self._held_back = self._held_back, []
        for pipe in held_back:
            pipe.resume()

    # What pipes ask

    def carry(self, pipe: Pipe, come: Callable[[], None]) -> None:
        """Have something come out at the other end, after all that was sent before."""
        low, high = self._delays.get((pipe.sender, pipe.receiver), self._usual)
        due = max(pipe.last, self._baton.now + low + (high - low) * self._baton.chance())
        pipe.last = due
        self._baton.at(due, come)

    def holds_back(self, pipe: Pipe) -> bool:
        """Tell whether nothing gets through just now."""
        if (pipe.sender, pipe.receiver) not in self._cut:
            return False
        if pipe not in self._held_back:
            self._held_back.append(pipe)
        return True

    def note_sent(self, pipe: Pipe, data: bytes, nbytes: int) -> None:
        """Write down what was sent."""
        way = pipe.sender, pipe.receiver
        count, total = self.traffic.get(way, Traffic())
        self.traffic[way] = Traffic(count + 1, total + nbytes)
        if self.trace.is_on:
            for words in describe(data):
                self.trace.add(self._baton.now, pipe.sender, "send", f"-> {pipe.receiver}  {words}")

    def note_received(self, sender: int, receiver: int, data: bytes) -> None:
        """Write down what was received."""
        if self.trace.is_on:
            for words in describe(data):
                self.trace.add(self._baton.now, receiver, "receive", f"<- {sender}  {words}")


class Pipe:
    """One direction between two processes: what goes in comes out in order, later."""

    def __init__(self, network: Network, sender: int, receiver: int) -> None:
        self.sender = sender
        self.receiver = receiver
        self.last = 0.0  # when what was sent last comes out
        self._network = network
        self._line: deque[Callable[[], None]] = deque()
        self._turn = 0  # how often what was inside has been sent off anew

    def put(self, act: Callable[[], None]) -> None:
        """Have something done at the other end."""
        self._line.append(act)
        self._send_off()

    def send(self, item: Item, arrive: Callable[[Parcel], None], through: Through) -> None:
        """Send a message.

        Args:
            item: The message.
            arrive: Called with it at the other end.
            through: Called with what the sender is to be told, once its buffers are its own again.
        """
        data, buffers = item[:2] if isinstance(item, tuple) else (item, ())
        nbytes = len(data) + sum(memoryview(b).nbytes for b in buffers)
        self._network.note_sent(self, data, nbytes)

        def come() -> None:
            own = [bytearray(memoryview(buffer).cast("B")) for buffer in buffers]
            arrive(Parcel(data, own))
            if isinstance(item, tuple) and item[2] is not None:
                through(item[2])

        self.put(come)

    def _send_off(self) -> None:
        turn = self._turn
        self._network.carry(self, lambda: self._come(turn))

    def _come(self, turn: int) -> None:
        """Let what is first in line out, if the way is free."""
        if turn == self._turn and not self._network.holds_back(self):
            self._line.popleft()()

    def resume(self) -> None:
        """Send off anew what was held back."""
        self._turn += 1
        self.last = 0.0
        for _ in self._line:
            self._send_off()


class Parcel(NamedTuple):
    """A message, or several, as they arrive, and the buffers beside them."""

    data: bytes
    buffers: list[bytearray]


Through = Callable[[Callable[[], None]], None]


def hand_on(parcel: Parcel, peer: Any, deliver: Deliver) -> None:
    """Deliver the messages of a parcel."""
    data = parcel.data
    for kind, flags, count, ident, aux, start, stop in heads(data):
        body: Any = data[start + 8 * count : stop]
        buffers: Sequence[bytearray] = parcel.buffers if count else ()
        if count and flags & BODY_APART:
            body, buffers = buffers[0], buffers[1:]
        deliver(peer, kind, flags, ident, aux, body, buffers)


def heads(data: bytes) -> Iterator[tuple[int, int, int, int, int, int, int]]:
    """Yield kind, flags, number of buffers, id, aux, and where the body begins and ends."""
    offset = 0
    while offset < len(data):
        kind, flags, count, length, ident, aux = HEAD.unpack_from(data, offset)
        offset += HEAD_SIZE
        yield kind, flags, count, ident, aux, offset, offset + length
        offset += length


def _outcome(code: int) -> str:
    return _OUTCOMES[code] if code < len(_OUTCOMES) else f" {code}"


def describe(data: bytes) -> Iterator[str]:
    """Yield words for each message in some bytes."""
    for kind, flags, _, ident, aux, _, _ in heads(data):
        if kind == CALL:
            yield f"call {ident}"
        elif kind == RESULT:
            yield f"result {ident}{_outcome(flags & OUTCOME)}"
        elif kind == CONTROL:
            yield f"{_NAMES.get(aux, aux)} {ident}" if ident else str(_NAMES.get(aux, aux))
