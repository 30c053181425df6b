"""`trace()`: process 1 takes from all processes what they note, and makes a file of it.

While a trace goes on, what comes is only appended to a file beside the one that is wanted (its
name with `.part`), as it came: turning it into events would take the time of the program. That
is done at the end.

Clocks: each answer to a question says what time it is there. It was said some time between the
question and the answer, so the quicker the two, the less is the doubt. The best answer counts,
and ages, since clocks drift apart. Processes of one host share a clock: where the answers allow
that the difference is none, it is none.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from hpcdist import _config
from hpcdist._errors import ProcessExitedException
from hpcdist._events.chrome import Ended, Frame, Person, convert
from hpcdist._events.records import Recorder, boot
from hpcdist._frames import brief
from hpcdist._monitor.output import say
from hpcdist._public import public
from hpcdist._runtime.node import Mail, Node, Service, here, on
from hpcdist._transport.contracts import Waitable
from hpcdist._wire import messages
from hpcdist._wire.messages import LastRecords, StartRecording, Taken, TakeRecords

_EVERY = 0.25  # seconds between two takings
_ROUNDS = 8  # questions about the time, one after the other, as a worker comes in
_DRIFT = 20e-6  # of a second each second: what clocks of two hosts may drift apart
_PROMPT = 1.0  # seconds that workers have to answer; later answers are taken the next time
_PATIENCE = 5.0  # seconds that they have at the end


class Clock(NamedTuple):
    """How far another process's clock is ahead of ours, in nanoseconds."""

    ahead: int
    doubt: int  # either way
    known_at: int

    def doubt_at(self, now: int) -> float:
        """Return what the doubt has grown to."""
        return self.doubt + _DRIFT * max(0, now - self.known_at)


def estimate(asked: int, answered: int, theirs: int, *, same_host: bool) -> Clock:
    """Work out from a question and its answer how far another clock is ahead of ours.

    >>> estimate(100, 300, 5200, same_host=False)
    Clock(ahead=5000, doubt=100, known_at=300)
    >>> estimate(100, 300, 220, same_host=True).ahead
    0
    """
    ahead, doubt = theirs - (asked + answered) // 2, (answered - asked + 1) // 2
    if same_host and abs(ahead) <= doubt:
        return Clock(0, 0, answered)
    return Clock(ahead, doubt, answered)


class _Question(Waitable):
    """A question to a process for what it has noted; it knows when the answer came."""

    def __init__(self, node: Node, pid: int) -> None:
        self.where = pid
        self.asked = self.answered = node.machine.clock()
        self._clock = node.machine.clock

    def arrived(self) -> None:
        self.answered = self._clock()


class Trace:
    """A trace that goes on.

    Args:
        node: Of process 1.
        file: What it is to become.
        arguments: Whether to note those of calls.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, node: Node, file: str, *, arguments: bool) -> None:
        self._node = node
        self._file = file
        self._arguments = arguments
        self._recorder = node.service(Recorder)
        # Without a buffer: what cannot be written is noticed at once, and what was is there.
        self._spool = open(file + ".part", "wb", buffering=0)  # noqa: SIM115 - closed by `end`
        self._begun = node.machine.clock()
        self._boot = boot()
        self._clocks: dict[int, Clock] = {}
        self._asked: dict[int, _Question] = {}  # those that have not been answered
        self._left_out = 0
        self._broken = False  # nothing can be written any more
        self._over = False
        self._taking = node.machine.lock()  # held by the thread that takes what was noted
        self._write(self._begun)

    def begin(self) -> None:
        """Have everything noted from now on."""
        node = self._node
        self._write(Person(node.me, f"process {node.me}, the driver, on {node.machine.hostname()}"))
        self._recorder.start(arguments=self._arguments)
        for pid in sorted(node.members.living):
            self.on_join(pid)
        self._take_soon()

    def on_join(self, pid: int) -> None:
        """Have a worker note what happens, too."""
        peer, member = self._node.peers.get(pid), self._node.members.living.get(pid)
        if peer is None or member is None or self._broken:
            return
        peer.send(StartRecording(self._arguments))
        self._write(Person(pid, f"worker {pid} on {member.host}"))

    def on_death(self, pid: int) -> None:
        """Note that a worker is gone."""
        death = self._node.members.gone.get(pid)
        self._write(Ended(pid, self._node.machine.clock(), death.why if death else ""))

    def end(self) -> None:
        """Take the last of it, and make the file."""
        try:
            with self._taking:
                self._over = True
                self._take(last=True)
        finally:  # Ctrl-C, too
            self._recorder.stop()
            self._spool.close()
            self._make_file()
            self._broken = True
        late = sorted(self._asked.keys() & self._node.members.living.keys())
        if late:
            say(f"hpcdist: workers {late} do not answer: the trace {self._file} lacks their last")
        if self._left_out:
            say(f"hpcdist: {self._left_out} records did not fit into the trace {self._file}")

    # While it goes on

    def _take_soon(self) -> None:
        """Take what was noted a little later, on a thread that is there only meanwhile.

        One that waited all the time would be woken at every message.
        """
        later = self._node.progress.call_later
        later(_EVERY, lambda: self._node.turns.background(self._take_again))

    def _take_again(self) -> None:
        with self._taking:
            if self._over:
                return
            self._take(last=self._broken)
        if not self._broken:
            self._take_soon()

    def _take(self, *, last: bool) -> None:
        """Take what all processes have noted since the last time, and write it down."""
        node = self._node
        everyone = sorted(node.members.living)
        known = [pid for pid in everyone if pid in self._clocks or last]
        deadline = node.machine.now() + (_PATIENCE if last else _PROMPT)
        for pid in everyone if not last else ():
            rounds = 0 if pid in self._clocks else _ROUNDS
            while rounds and pid not in self._asked:  # one that is late is not asked again
                self._await([pid], deadline, last=False)
                rounds -= 1
        self._await(known, deadline, last=last)
        recorder = self._recorder
        left_out, blob = recorder.take_last() if last else recorder.take()
        self._write_records(Frame(node.me, 0, left_out, blob))

    def _await(self, pids: list[int], deadline: float, *, last: bool) -> None:
        """Ask workers, but those that have not answered yet; take in what comes in time."""
        node = self._node
        for pid in pids:
            if last or pid not in self._asked:
                self._ask(pid, last)
        for pid, question in [(pid, self._asked.get(pid)) for pid in pids]:
            if question is None:
                continue
            with suppress(TimeoutError):  # it is stopped, or in C: the next taking looks again
                _wait(node, question, max(0.0, deadline - node.machine.now()))
                self._asked.pop(pid, None)
                if question.error is None:
                    self._take_in(question)

    def take_last(self, pid: int, said: LastRecords, records: bytes) -> None:
        """Take in what a worker sends that leaves."""
        known = self._clocks.get(pid)
        ahead = said.clock - self._node.machine.clock() if known is None else known.ahead
        self._write_records(Frame(pid, ahead, said.left_out, records))

    def _ask(self, pid: int, last: bool) -> None:
        """Ask a worker for what it has noted; a last time, if it has not answered before."""
        node, ident = self._node, next(self._node.ids)
        question = _Question(node, pid)
        node.pending[ident] = question
        try:
            node.peer(pid).send(TakeRecords(last), ident)
        except (ProcessExitedException, ValueError):  # it died this moment
            node.pending.pop(ident, None)
            return
        node.progress.nudge()
        self._asked.setdefault(pid, question)  # an earlier one is answered first, and has more

    def _take_in(self, question: _Question) -> None:
        _, body, buffers = question.value
        taken, _ = messages.decode(Taken, body)
        same_host = taken.boot == self._boot != ""
        found = estimate(question.asked, question.answered, taken.clock, same_host=same_host)
        best = self._clocks.get(question.where)
        if best is None or found.doubt < best.doubt_at(found.known_at):
            best = self._clocks[question.where] = found
        frame = Frame(question.where, best.ahead, taken.left_out, bytes(buffers[0]))
        self._write_records(frame)

    def _write_records(self, frame: Frame) -> None:
        self._left_out += frame.left_out
        self._write(frame)

    # Writing

    def _write(self, what: object) -> None:
        if self._broken:
            return
        try:
            rest = memoryview(pickle.dumps(what, 5))
            while rest:
                rest = rest[self._spool.write(rest) :]
        except (OSError, ValueError) as exc:  # ValueError: it is closed
            self._give_up(exc)

    def _make_file(self) -> None:
        """Make events of what was written; a trace that was broken off has some, too."""
        try:
            with open(self._file + ".part", "rb") as spool, open(self._file, "w") as out:
                for text in convert(spool):
                    out.write(text)
            os.unlink(self._file + ".part")
        except (OSError, ValueError) as exc:
            self._give_up(exc)

    def _give_up(self, why: Exception) -> None:
        """Say once that nothing can be written; the program goes on."""
        if not self._broken:
            say(f"hpcdist: the trace {self._file} ends here: {why}")
        self._broken = True


def _wait(node: Node, slot: Waitable, seconds: float) -> None:
    """Wait on a thread of a trace, without a trace of it."""
    Node.wait(node, slot, seconds)


class Traces(Service):
    """The trace of this process, if one goes on."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._current: Trace | None = None
        self._asked_for = False  # by the settings: looked up with the first worker
        node.on_join.append(self._on_join)
        node.on_death.append(self._on_death)

    def begin(self, file: str, *, arguments: bool) -> Trace:
        """Begin a trace.

        Raises:
            RuntimeError: One goes on, or this is not process 1.
            OSError: The file cannot be written.
        """
        if self.node.me != 1:
            raise RuntimeError("Only process 1 can trace the cluster")
        if self._current is not None:
            raise RuntimeError(f"a trace goes on already: {self._current._file}")
        self.node.start()
        self._current = started = Trace(self.node, file, arguments=arguments)
        started.begin()
        return started

    def end(self, started: Trace) -> None:
        """End a trace."""
        if self._current is started:
            self._current = None
            started.end()

    @on(LastRecords)
    def _on_last(self, said: LastRecords, mail: Mail) -> None:
        if self._current is not None:
            self._current.take_last(mail.peer.pid, said, bytes(mail.buffers[0]))

    def _on_join(self, pid: int) -> None:
        if self._current is not None:
            self._current.on_join(pid)
        elif not self._asked_for and self.node.me == 1 and self.node.machine.shares_memory:
            self._asked_for = True
            self._begin_as_set()

    def _begin_as_set(self) -> None:
        """Begin the trace that `HPCDIST_TRACE` asks for; it ends with the program."""
        file = _config.setting("trace")
        if not file:
            return
        try:
            started = self.begin(file, arguments=False)
        except OSError as exc:
            say(f"hpcdist: no trace: {exc}")
            return
        self.node.machine.at_exit(lambda: self.end(started))

    def _on_death(self, pid: int) -> None:
        if self._current is not None:
            self._current.on_death(pid)


@public
@contextmanager
@brief
def trace(file: str | os.PathLike[str], *, arguments: bool = False) -> Iterator[None]:
    """Write down, for the length of a block, what all processes do when.

    The file opens in Perfetto (https://ui.perfetto.dev) and in Chrome (chrome://tracing);
    `hpcdist trace FILE -o run.html` makes a page of it.

    Args:
        file: The file to make.
        arguments: Also write down the arguments of calls, in short.

    Raises:
        OSError: The file cannot be written.
        RuntimeError: A trace goes on already, or this is not process 1.

    Example:
        >>> import hpcdist, tempfile
        >>> with tempfile.NamedTemporaryFile() as file, hpcdist.trace(file.name):
        ...     hpcdist.remotecall_fetch(len, 1, "four")
        4
    """
    node = here.node
    node.admit()
    traces = node.service(Traces)
    started = traces.begin(os.fspath(file), arguments=arguments)
    try:
        yield
    finally:
        traces.end(started)
