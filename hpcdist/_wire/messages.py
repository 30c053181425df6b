"""The controls as types: what each one says, who sends it to whom, and its number.

A control is a named tuple. It travels as its number, the pickled tuple of its fields, and whatever
bytes its sender puts behind it. Search for a name to find its sender (`Peer.send`, `Node.request`)
and its handler (`@node.on(Name)`). Replies have a type as well, and no number: the request's id
says what they answer.

The raw numbers are for controls that lay out their own bytes, as they travel with nearly every
call: no type could be read as fast. The types are named tuples, not dataclasses: making these fifty
takes 5 ms at start-up, against 40.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from hpcdist._wire.frames import CONTROL, Body, Buffer, pack
from hpcdist._wire.member import JobEnd, Member

M = TypeVar("M", bound=NamedTuple)
RefId = tuple[int, int]  # (whence, id) of a future, channel, pool or value

RELEASE = 1  # references counted down: triples (whence, id, n); peers gather them
ACKNOWLEDGE = 12  # an item that was taken has come: the id of the take; peers gather them
PUT_ITEM, TAKE_ITEM = 15, 16  # on a remote channel: (whence, id), the timeout, and the item
INVOKE = 17  # a method of a remote object: see `_remote/object_owners.py` for its layout
VIA = 33  # a message for, or from, a worker that no link joins to this process: its pid as the id

NUMBERS: dict[type[Any], int] = {}


def control(number: int) -> Callable[[type[M]], type[M]]:
    """Give a type of control its number."""

    def note(kind: type[M]) -> type[M]:
        NUMBERS[kind] = number
        return kind

    return note


def encode(message: NamedTuple, body: Buffer = b"") -> bytes:
    """Lay out a message's fields before a body."""
    fields = pickle.dumps(tuple(message), 5)
    return len(fields).to_bytes(4, "little") + fields + body


def decode(kind: type[M], data: Body) -> tuple[M, Body]:
    """Take a message and the body behind it apart."""
    size = int.from_bytes(data[:4], "little")
    return kind._make(pickle.loads(data[4 : 4 + size])), data[4 + size :]


def packed(
    message: NamedTuple, ident: int = 0, body: Buffer = b"", buffers: Sequence[Buffer] = ()
) -> tuple[bytes, Sequence[Buffer]]:
    """Lay out a control as one message: its bytes, and the buffers that follow them."""
    return pack(CONTROL, 0, ident, NUMBERS[type(message)], encode(message, body), buffers)


# References and futures


@control(2)
class Sent(NamedTuple):
    """To an owner: its reference is being sent to a process, which holds it from now on."""

    whence: int
    ident: int
    to: int


@control(3)
class Fetch(NamedTuple):
    """To an owner, a request: the outcome of a future, as soon as it is there."""

    ref: RefId
    whole: bool  # the value, too, if it is large


@control(4)
class AskReady(NamedTuple):
    """To an owner, a request: whether a future has its value. The reply is b"1" or b""."""

    ref: RefId


@control(5)
class SetFuture(NamedTuple):
    """To an owner, a request: the value of an empty future."""

    ref: RefId
    with_refs: bool


@control(6)
class CancelCall(NamedTuple):
    """To a call's process, a request: drop it if it has not started."""

    ref: RefId


@control(7)
class AskRunning(NamedTuple):
    """To a call's process, a request: whether the call has left the queue."""

    ref: RefId


@control(9)
class Interrupt(NamedTuple):
    """End the calls that run with KeyboardInterrupt."""


@control(18)
class InterruptCall(NamedTuple):
    """To a call's process: end it with KeyboardInterrupt, if it has started."""

    ref: RefId


@control(68)
class Unlearn(NamedTuple):
    """To a caller: its call was lost, and with it the function and the globals it told of."""

    function: int


# Remote channels


@control(10)
class Operate(NamedTuple):
    """To a channel's owner, a request: an operation, whose arguments lie behind it."""

    ref: RefId
    name: str
    builtin: bool  # as `Channel` has it: nothing of the user's runs
    with_refs: bool
    timeout: float | None


@control(11)
class Withdraw(NamedTuple):
    """To a channel's owner: an operation of ours is given up, by the id it was asked with."""

    operation: int


@control(13)
class GiveBack(NamedTuple):
    """To a channel's owner: nothing waits for this take's item any more."""

    take: int


@control(14)
class Free(NamedTuple):
    """To an owner, a request: free this value, even if others hold references to it."""

    ref: RefId


@control(19)
class Farewell(NamedTuple):
    """From a worker that leaves to a channel's owner, a request: have you all our word of items?"""


# Workers: how they come and go


@control(20)
class Welcome(NamedTuple):
    """Process 1 to a new worker: who it is. It learns of the others when they learn of it."""

    me: int
    member: Member  # what the others get to know of it
    topology: str
    concurrency: int | None
    first: int  # the pid of rank 0 of its world


@control(21)
class Joined(NamedTuple):
    """Process 1 to workers: these have joined."""

    members: list[tuple[int, Member]]


@control(22)
class Left(NamedTuple):
    """Process 1 to workers: these are being removed."""

    pids: list[int]


class DeathNotice(NamedTuple):
    """A worker that is dead, and what is known of it."""

    pid: int
    why: str
    host: str
    stderr: list[str]
    older: list[str]
    peak_rss: int | None


@control(23)
class Died(NamedTuple):
    """Process 1 to workers: these are dead, or more is known of why."""

    deaths: list[DeathNotice]


@control(24)
class Leave(NamedTuple):
    """Process 1 to a worker: end."""

    others_stay: bool = False  # and count on what it has told them


@control(25)
class Output(NamedTuple):
    """A worker to process 1: lines it has printed."""

    descriptor: int
    text: str
    ident: int = 0  # of the call of process 1 that has printed them; 0: none, or not known


@control(26)
class AskStatus(NamedTuple):
    """To a worker, a request: how it is. The reply is a `Condition`."""


class Condition(NamedTuple):
    """How a worker is."""

    running: int
    queued: int
    rss: int
    begun: int  # calls since it is there
    lent: int  # values of its own that others refer to


@control(49)
class AskStacks(NamedTuple):
    """To any process, a request: where its threads are. The reply is a text."""


@control(90)
class AskSample(NamedTuple):
    """Process 1 to a worker, a request: what it is doing and has done. The reply is a `Sample`."""


class RunningCall(NamedTuple):
    """A call that has started."""

    name: str
    seconds: float  # since it has started
    waits: bool  # in one of our waits: it has given its turn away


class Sample(NamedTuple):
    """What a process is doing, and has done until now."""

    at: float  # by its own clock
    calls: list[tuple[str, float, bool]]  # `RunningCall`s as plain tuples
    running: int  # with the coroutines, whose names are not known
    queued: int
    rss: int
    cpu: float  # seconds of processor time
    sent: dict[int, int]  # bytes to each process


@control(91)
class StartRecording(NamedTuple):
    """Process 1 to workers, as a trace begins: note what happens."""

    arguments: bool  # of calls, too


@control(92)
class TakeRecords(NamedTuple):
    """Process 1 to a worker, a request: what it has noted. The reply is a `Taken`."""

    last: bool  # note nothing more


class Taken(NamedTuple):
    """Records, which lie behind it."""

    clock: int  # of the process, now
    boot: str  # tells hosts apart: the clocks of one are the same
    left_out: int  # records for which there was no room, since the last time


@control(93)
class LastRecords(NamedTuple):
    """A worker that leaves to process 1: what it has noted and nobody has taken."""

    clock: int  # of the process, now
    left_out: int


@control(48)
class JobEnds(NamedTuple):
    """Process 1 to workers: when the jobs of some of them end."""

    ends: dict[int, JobEnd | None]  # by pid; None: nothing is known any more


@control(27)
class Park(NamedTuple):
    """Process 1 to a rank that leaves before its world can: run nothing more."""


@control(28)
class Trust(NamedTuple):
    """Process 1 to a worker: the certificate by which workers on other hosts are known."""

    certificate: str


@control(29)
class CallMe(NamedTuple):
    """By way of process 1 to a worker that cannot be dialled: dial us."""

    whom: int
    who: int


# Pools and maps


@control(30)
class OperatePool(NamedTuple):
    """To a pool's owner, mostly a request: an operation on it."""

    ref: RefId
    name: str
    argument: Any


@control(31)
class TakeBack(NamedTuple):
    """To a worker, a request: items of batches that have not started. The reply: `TakenBack`."""

    everything: bool
    batches: list[int]


class TakenBack(NamedTuple):
    """How many items of which batches will not run; -1: the whole batch."""

    items: list[tuple[int, int]]


@control(32)
class Forget(NamedTuple):
    """To a worker: functions it keeps, and batches, that are no longer wanted."""

    tokens: list[RefId]
    batches: list[int]


@control(69)
class HandedOver(NamedTuple):
    """From a worker: results of a batch that goes on; the list of them lies behind."""

    batch: int
    first: int  # which of the batch's items the first of them belongs to


# Trees, and values on many processes


@control(40)
class Down(NamedTuple):
    """Work for a process and those below it; what is to be done lies behind."""

    root: int
    number: int
    kind: int
    forwards: bool  # whether it hands the work on
    combines: bool
    with_refs: bool
    position: int
    below: tuple[Any, ...]  # `trees.Branch`es
    above: tuple[int, int]  # pid and position of who wants the outcomes
    oldest: int  # of the root's jobs: older ones need not be remembered


@control(41)
class Up(NamedTuple):
    """Outcomes, to the process above."""

    root: int
    number: int
    position: int  # of the one above
    below: int  # position of the sender
    outcomes: list[tuple[Any, ...]]  # `trees.Outcome`s as plain tuples


@control(42)
class Chunk(NamedTuple):
    """A piece of a broadcast value, to be kept and passed on."""

    root: int
    number: int
    position: int  # of the receiver
    part: int
    start: int


@control(43)
class Store(NamedTuple):
    """To a worker, a request: keep this value."""

    ref: RefId
    with_refs: bool


@control(44)
class Pull(NamedTuple):
    """To a process that has a value, a request: send it. The reply is a `Pulled`."""

    ref: RefId
    shared: bool  # where it lies in shared memory will do


class Place(NamedTuple):
    """Where a segment of shared memory is found."""

    maker: int
    os_pid: int  # of its maker
    descriptor: int  # there
    inode: int
    size: int


class Pulled(NamedTuple):
    """A value behind it, or where in shared memory it lies."""

    how: int
    place: Place | None = None
    layout: tuple[list[int], list[int]] | None = None
    with_refs: bool = False


@control(45)
class Drop(NamedTuple):
    """An owner to those who have copies of its value: it is freed."""

    ref: RefId


@control(46)
class Dropped(NamedTuple):
    """To the maker of a shared segment: we have no view of it any more."""

    inode: int


@control(47)
class Unmap(NamedTuple):
    """The maker of shared segments to those who may have mapped them: they are closed."""

    inodes: list[int]


# spmd: between a caller, process 1 and the members of a section


@control(60)
class SectionEnter(NamedTuple):
    """Caller to process 1, a request: that these may enter. The reply is `Entered`."""

    pids: list[int]  # with `ranks`: those to choose from; none: all workers
    grace: float
    ranks: int = 0  # how many of them process 1 is to choose; 0: it chooses none, all enter


class Entered(NamedTuple):
    """Process 1 to the caller: a section may enter."""

    number: int
    pids: list[int]


@control(59)
class SectionWithdraw(NamedTuple):
    """Caller to process 1: these need not enter any more."""

    ident: int  # of the request; if it has not been answered, it now is


@control(61)
class SectionHere(NamedTuple):
    """Member to process 1: it is at the gate, with the communicator it has kept (or 0)."""

    number: int
    comm: int


@control(62)
class SectionGo(NamedTuple):
    """Process 1 to a member: go in, or go home if somebody has failed."""

    number: int
    comm: int = 0
    fresh: bool = False  # the communicator is to be made
    culprit: int = 0  # the process that has failed
    unkept: Sequence[int] = ()  # communicators that are to be freed


@control(63)
class SectionOver(NamedTuple):
    """Member, or the caller for it, to process 1: its part is over."""

    number: int
    pid: int
    failed: str  # how, or ""


@control(64)
class SectionFree(NamedTuple):
    """Process 1 to a member: leave MPI, a colleague has failed."""

    number: int


@control(65)
class SectionStuck(NamedTuple):
    """Member to process 1: whether it is still inside MPI."""

    number: int
    stuck: bool


@control(66)
class AskVerdict(NamedTuple):
    """Caller to process 1, a request: what became of a section. The reply is a `Verdict`."""

    number: int


class Verdict(NamedTuple):
    """Who failed first in a section, and who was killed for it after so many seconds."""

    culprit: int
    killed: list[int]
    grace: float


@control(67)
class SectionDie(NamedTuple):
    """Process 1 to a member that no keeper can kill: end."""

    number: int


class Line(NamedTuple):
    """A record of `logging`, as it travels."""

    name: str  # of its logger
    level: int
    path: str = ""
    number: int = 0
    function: str = ""
    text: str = ""
    trace: str = ""
    extra: tuple[tuple[str, object], ...] = ()  # what its maker added, if that is plain
    created: float = 0.0
    thread: str = ""
    process: int = 0


@control(80)
class ForwardRecords(NamedTuple):
    """Process 1 to a worker: send what is logged from a level on; 0: no more."""

    level: int


@control(81)
class Records(NamedTuple):
    """Worker to process 1: what was logged there, and how many records were left out."""

    lines: Sequence[Line]
    left_out: int


@control(82)
class InterruptSince(NamedTuple):
    """Process 1 to a worker: end its calls from a number on with KeyboardInterrupt."""

    first: int
