"""The fast plane: messages of one world over MPI point-to-point.

Frames travel with tag 0, buffers that stand beside them with tag 1; MPI keeps the order of each.
All calls are made by the driver of the wait loop, on a duplicate of the world's communicator.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from hpcdist._transport.bells import Bells
from hpcdist._transport.contracts import Deliver, Item
from hpcdist._wire.blocks import NoRoom, blank, scrap
from hpcdist._wire.frames import (
    BODY_APART,
    CALL,
    CONTROL,
    HEAD,
    HEAD_SIZE,
    Buffer,
    sizes,
)

FRAME, BUFFER = 0, 1
_SENDS_MANY = 16  # requests that are tested even while messages keep coming
_PIECE = 1 << 30  # counts are C ints in many an MPI
_unpack = HEAD.unpack_from


def _with_ends(
    items: Sequence[Item],
) -> list[tuple[Buffer, Callable[[], None] | None]]:
    """List all buffers in order, each message's last with what to call when it is through."""
    found: list[tuple[Buffer, Callable[[], None] | None]] = []
    for item in items:
        if isinstance(item, tuple):
            found.extend((buffer, None) for buffer in item[1][:-1])
            found.append((item[1][-1], item[2]))
    return found


Message = tuple[int, int, int, int, Buffer]  # kind, flags, id, aux and body


class _Arriving:
    """A message whose buffers are on their way, or one that must wait behind such a message."""

    __slots__ = ("buffers", "message", "requests")

    def __init__(self, message: Message) -> None:
        self.message = message
        self.buffers: Sequence[Buffer] | NoRoom = []
        self.requests: list[Any] = []


class MpiPlane:
    """Sends and receives for one world."""

    def __init__(self, comm: Any, deliver: Deliver, bells: Bells | None) -> None:
        from mpi4py import MPI

        self.comm = comm
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self.peers: dict[int, Any] = {}
        self.dead: set[int] = set()
        # Set while a user's thread makes a communicator: Open MPI 5.0.11 was seen to hang in
        # Create_group while another thread polled beside it.
        self.paused = False
        self.woke = False  # a sleeper was rung: its answer takes longer
        self.moved = 0  # large buffers that have come or gone
        self._deliver = deliver
        self._bells = bells
        self._asleep = bytes(self.size) if bells is None else bells.asleep  # by rank
        self._probe, self._isend = comm.Improbe, comm.Isend
        self._byte = MPI.BYTE
        self._any = MPI.ANY_SOURCE
        self._failed = self.failure = MPI.Exception
        self._status = MPI.Status()
        self._sends: deque[tuple[Any, Any, int, Callable[[], None] | None]] = deque()
        self._arriving: dict[int, deque[_Arriving]] = {}
        self._parked: list[Any] = []  # requests to the dead, with their memory: never waited for

    # Sending

    def send(self, rank: int, items: Sequence[Item]) -> None:
        """Send messages as one frame, their buffers after it."""
        if rank in self.dead:
            for _, end in _with_ends(items):
                if end is not None:
                    end()
            return
        comm, sends = self.comm, self._sends
        if len(items) == 1 and type(items[0]) is bytes:
            frame = items[0]
            buffers: list[tuple[Buffer, Callable[[], None] | None]] = []
        else:
            frame = b"".join([i[0] if isinstance(i, tuple) else i for i in items])
            buffers = _with_ends(items)
        begun = 0
        try:
            request = comm.Isend(frame, rank, FRAME)
            if buffers or not request.Test():
                sends.append((request, frame, rank, None))
            for buffer, end in buffers:
                view = memoryview(buffer).cast("B")
                for start in range(0, view.nbytes, _PIECE):
                    piece = view[start : start + _PIECE]
                    request = comm.Isend([piece, self._byte], rank, BUFFER)
                    last = end if start + _PIECE >= view.nbytes else None
                    sends.append((request, piece, rank, last))
                begun += 1
        except self._failed:  # towards a peer that is lost: its keeper and its link will tell
            for _, end in buffers[begun:]:
                if end is not None:
                    end()
            return
        if self._asleep[rank] and self._bells is not None and self._bells.ring(rank):
            self.woke = True

    def send_frame(self, rank: int, frame: bytes) -> None:
        """Send one frame without buffers, for a thread that waits next."""
        if rank in self.dead:
            return
        try:
            # Not tested at once: that can be done while we wait for the answer.
            self._sends.append((self._isend(frame, rank, FRAME), frame, rank, None))
        except self._failed:  # towards a peer that is lost: its keeper and its link will tell
            return
        if self._asleep[rank] and self._bells is not None and self._bells.ring(rank):
            self.woke = True

    def rouse(self, rank: int) -> None:
        """Wake a rank that sleeps: a message follows."""
        if self._asleep[rank] and self._bells is not None and self._bells.ring(rank):
            self.woke = True

    def busy(self) -> bool:
        """Tell whether something is under way that only polling completes."""
        return bool(self._sends or self._arriving)

    # Receiving

    def poll(self) -> bool:
        """Receive what has arrived and complete what was sent; tell whether anything was."""
        if self.paused:
            return False
        try:
            message = self._probe(self._any, FRAME, self._status)
        except self._failed:  # ULFM: some peer has died; which one, we hear from pid 1
            self._acknowledge_failures()
            message = None
        if message is not None:
            source, size = self._status.source, self._status.Get_count(self._byte)
            frame = bytearray(size)
            message.Recv(frame)
            self._read(source, frame, size)
            if len(self._sends) < _SENDS_MANY and not self._arriving:
                return True
        active = message is not None
        if self._sends and self._test_sends():
            active = True
        if self._arriving and self._test_arrivals():
            active = True
        return active

    def _read(self, source: int, frame: bytearray, size: int) -> None:
        peer = self.peers.get(source)
        kind, flags, count, length, ident, aux = _unpack(frame)
        if HEAD_SIZE + length == size and not (count or self._arriving):  # alone, as most are
            body = frame[HEAD_SIZE:] if length else b""
            self._deliver(peer, kind, flags, ident, aux, body, ())
            return
        offset = 0
        while offset < size:
            kind, flags, count, length, ident, aux = _unpack(frame, offset)
            offset += HEAD_SIZE
            body = frame[offset : offset + length] if length else b""
            offset += length
            if count or self._arriving:
                self._arrive(source, (kind, flags, ident, aux, body), count)
            else:
                self._deliver(peer, kind, flags, ident, aux, body, ())

    def _arrive(self, source: int, message: Message, count: int) -> None:
        """Take in a message with buffers, or one that may have to wait behind such a one."""
        kind, flags, ident, aux, body = message
        waiting = self._arriving.get(source)
        if not count and (waiting is None or kind not in (CALL, CONTROL)):
            self._deliver(self.peers.get(source), kind, flags, ident, aux, body, ())
            return
        if waiting is None:
            waiting = self._arriving[source] = deque()
        entry = _Arriving((kind, flags, ident, aux, body[8 * count :]))
        announced = sizes(body, count)
        try:
            entry.buffers = [blank(nbytes) for nbytes in announced]
            for nbytes, buffer in zip(announced, entry.buffers, strict=True):
                view = memoryview(buffer)
                for start in range(0, nbytes, _PIECE):
                    piece = [view[start : start + _PIECE], self._byte]
                    entry.requests.append(self.comm.Irecv(piece, source, BUFFER))
        except MemoryError:
            entry.buffers = NoRoom(sum(announced))
            for nbytes in announced:
                for start in range(0, nbytes, _PIECE):
                    self._receive_away(entry, source, min(_PIECE, nbytes - start))
        waiting.append(entry)

    def _receive_away(self, entry: _Arriving, source: int, nbytes: int) -> None:
        """Receive a piece for which there is no memory: it is written over itself, bit by bit.

        It cannot be left where it is: what follows it would take its place.
        """
        lengths = [len(scrap)] * (nbytes // len(scrap))
        if nbytes % len(scrap):
            lengths.append(nbytes % len(scrap))
        kind = self._byte.Create_hindexed(lengths, [0] * len(lengths)).Commit()
        entry.requests.append(self.comm.Irecv([scrap, 1, kind], source, BUFFER))
        kind.Free()  # MPI keeps it until the message is here

    def _test_arrivals(self) -> bool:
        active = False
        for source in list(self._arriving):
            waiting = self._arriving[source]
            while waiting and self._all_here(waiting[0]):
                entry = waiting.popleft()
                active = True
                self.moved += 1
                kind, flags, ident, aux, body = entry.message
                buffers = entry.buffers
                if flags & BODY_APART and not isinstance(buffers, NoRoom):
                    body, buffers = buffers[0], buffers[1:]
                self._deliver(self.peers.get(source), kind, flags, ident, aux, body, buffers)
            if not waiting:
                del self._arriving[source]
        return active

    def _all_here(self, entry: _Arriving) -> bool:
        requests = entry.requests
        try:
            while requests and requests[0].Test():
                requests.pop(0)
        except self._failed:
            return False
        return not requests

    def _test_sends(self) -> bool:
        """Let go of what has been sent, oldest first, up to the first that is not done."""
        active = False
        sends = self._sends
        while sends:
            entry = sends[0]  # in its place until it is done: Ctrl-C may come between
            try:
                done = entry[0].Test()
            except self._failed:  # before anybody has told us of the death
                self._parked.append(sends.popleft())
                if entry[3] is not None:
                    entry[3]()
                continue
            if not done:
                sends.rotate(-1)  # behind the others: a slow peer must not hold them up
                break
            sends.popleft()
            active = True
            if type(entry[1]) is memoryview:
                self.moved += 1
            if entry[3] is not None:
                entry[3]()
        return active

    # Communicators

    def make_comm(self, pids: Sequence[int], number: int) -> Any:
        """Make a communicator of some processes: a collective call of theirs alone.

        Args:
            pids: These processes, us among them.
            number: Tells it from others that are made at the same time.
        """
        from mpi4py import MPI

        rank_of = {peer.pid: rank for rank, peer in self.peers.items()}
        everyone = self.comm.Get_group()
        group = everyone.Incl([rank_of.get(pid, self.rank) for pid in pids])
        self.paused = True
        try:
            made = self._make(group, number)
        finally:
            self.paused = False
            group.Free()
            everyone.Free()
        made.Set_errhandler(MPI.ERRORS_RETURN)
        return made

    def _make(self, group: Any, number: int) -> Any:
        from mpi4py import MPI

        if "Open MPI" in MPI.Get_library_version():
            # Create_group fails in a process that knows of a death anywhere in the world, and
            # leaves one that does not know yet waiting for it, for ever (5.0.11). This, which
            # knows of no world, does neither. It takes some 10 ms instead of 0.1.
            try:
                return MPI.Intracomm.Create_from_group(group, f"hpcdist-{number}")
            except MPI.Exception as exc:  # from Slurm's PMI, whose steps end with the first death
                if exc.Get_error_class() != MPI.ERR_UNSUPPORTED_OPERATION:
                    raise
        return self.comm.Create_group(group, number % 32768)

    def free_comm(self, made: Any) -> None:
        """Let go of a communicator whose other members do the same, each when it can.

        It was left in good order by all. MPI calls this collective; no MPI here waits in it.
        """
        self.paused = True
        try:
            made.Free()
        except self._failed:  # a member has died meanwhile
            pass
        finally:
            self.paused = False

    # Deaths

    def lose(self, rank: int) -> None:
        """Forget a dead rank: what was under way to or from it is parked, not waited for."""
        self.dead.add(rank)
        lost = self._arriving.pop(rank, None)
        if lost:
            self._parked.extend(lost)
        sends, self._sends = self._sends, deque(s for s in self._sends if s[2] != rank)
        for send in sends:
            if send[2] == rank:
                self._parked.append(send)
                if send[3] is not None:
                    send[3]()

    def _acknowledge_failures(self) -> None:
        acknowledge = getattr(self.comm, "Ack_failed", None)
        if acknowledge is not None:
            try:
                acknowledge()
            except self._failed:
                pass

    # Sleeping

    def arm(self) -> None:
        """Say that we are about to sleep."""
        if self._bells is not None:
            self._bells.arm()

    def disarm(self) -> None:
        """Say that we are awake."""
        if self._bells is not None:
            self._bells.disarm()
